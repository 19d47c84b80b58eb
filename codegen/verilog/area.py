"""How large a unit will be, before synthesis: look-up tables, flip-flops, multipliers, memory bits.

The model counts what a family's mapping does with each part of a unit, per bit:

    adder       a look-up table per bit; its sign copies are free. ECP5's carry cells take two tables for two bits
    selection   of n signals: a table for 4 with 6 inputs, for 2 with 4 inputs
    contents    a constant memory of d words: a table per bit and 2^inputs words, and no more functions than there are
    FIFO        dual-port memory in tables, 6 bits by 32 words in 4 (7 series) or 4 bits by 16 words in 4 (ECP5)

Control and the odd bits left are constants fitted once to Yosys 0.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qcompile.codegen.verilog.netlist import Memory, Unit
from qcompile.targets.fpga import DEFAULT, TARGETS, FpgaTarget


@dataclass(frozen=True)
class Area:
    """An estimate."""

    luts: float = 0.0
    flipflops: float = 0.0
    multipliers: float = 0.0
    memory_bits: float = 0.0

    def __add__(self, other: Area) -> Area:
        return Area(
            self.luts + other.luts,
            self.flipflops + other.flipflops,
            self.multipliers + other.multipliers,
            self.memory_bits + other.memory_bits,
        )


@dataclass(frozen=True)
class Family:
    """What the look-up tables of a family cost.

    Attributes:
        inputs: of a table.
        ram: (bits, words, tables) of the smallest dual-port memory made of tables.
        block_bits, block_words: constant memories of so many bits and words go to block memory.
    """

    inputs: int
    ram: tuple[int, int, int]
    block_bits: int
    block_words: int

    def adder(self, bits: float) -> float:
        """An adder of so many bits."""
        return bits if self.inputs == 6 else 2 * -(-(bits + 1) // 2)

    def select(self, signals: int) -> float:
        """One bit of ``signals``."""
        return -(-(signals - 1) // (3 if self.inputs == 6 else 1)) if signals > 1 else 0.0

    def contents(self, memory: Memory) -> tuple[float, float]:
        """A constant memory: tables, and bits in block memory."""
        words, bits = len(memory.words), memory.words.shape[1] * memory.bits
        if words * bits >= self.block_bits and words >= self.block_words:
            return 0.0, float(words * bits)
        return self.contents_of(words, bits), 0.0

    def contents_of(self, words: int, bits: int) -> float:
        """The same in tables."""
        address = max(words - 1, 0).bit_length()
        if address <= 1:
            return 0.0
        functions = 2.0 ** min(2**address, 40) - 2 * address - 2
        return min(bits, functions) * max(1, -(-words // 2**self.inputs))

    def ports(self, bits: int, words: int) -> float:
        """A memory that is written and read."""
        width, depth, tables = self.ram
        return -(-bits // width) * -(-words // depth) * tables + bits * (-(-words // depth) - 1)


FAMILIES = {6: Family(6, (6, 32, 4), 16384, 512), 4: Family(4, (4, 16, 4), 8192, 128)}


def estimate(unit: Unit, target: FpgaTarget = TARGETS[DEFAULT]) -> Area:
    """The area of one unit on a device."""
    family = FAMILIES[target.lut_inputs]
    fifos = sum((_fifo(family, c.width, unit.depths[p], p in unit.deep) for p, c in unit.outputs.items()), Area())
    return _BODIES.get(unit.module.split("_")[0] if unit.source else unit.module, _other)(unit, family) + fifos


def _fifo(family: Family, width: int, depth: int, deep: bool) -> Area:
    count = max(depth, 1).bit_length()
    if deep:
        return Area(family.ports(width, 4) + 5 * count + 12, 5.0 * count + 12, memory_bits=float(width * depth))
    return Area(family.ports(width, depth) + 4 * count, 4.0 * count)


def _blocks(a_bits: int, b_bits: int, family: Family) -> int:
    """Multipliers of the device that one ``rtl/multiply.v`` takes: 25 x 18 bits on 7 series, parts of 18 x 18 on ECP5."""
    if family.inputs == 6 and max(a_bits, b_bits) <= 25 and min(a_bits, b_bits) <= 18:
        return 1
    return int(np.prod([1 if bits <= 18 else (bits + 15) // 17 for bits in (a_bits, b_bits)]))


def _requantize(p: Mapping[str, int], family: Family) -> Area:
    """One ``rtl/requantize.v``."""
    multiply = p.get("MULTIPLY", 0)
    kept = p["Q_BITS"] - p["SHIFT"] if p["SHIFT"] else 0
    luts, registers = p["SHIFT"] / (family.inputs - 1), kept * p.get("ROUND", 0) + p["Y_BITS"]
    if p["SHIFT"]:
        luts += family.adder(kept)
    if p["CLAMP_LOW"] or p["CLAMP_HIGH"]:
        luts += p["Y_BITS"] + (kept - p["Y_BITS"]) / 3 * (family.inputs == 4)
    if multiply == 2:  # a barrel shifter
        luts += p["Q_BITS"] * family.select(1 << p["M_BITS"])
        registers += p["A_BITS"] + p["M_BITS"] + p["Q_BITS"]
    return Area(luts, registers, _blocks(p["A_BITS"], p["M_BITS"], family) if multiply == 1 else 0)


def _scale_array(p: Mapping[str, int], family: Family) -> Area:
    """``rtl/scale_array.v``: PE / TURNS units, sums that wait for them and outputs that wait for each other."""
    one = _thresholds(p, family) if p.get("THRESHOLDS") else _requantize(p, family)
    units, waiting = p["PE"] // p["TURNS"], p["PE"] - p["PE"] // p["TURNS"]
    registers = waiting * (p["A_BITS"] + p["Y_BITS"])
    # A word is loaded or moved; the last one is only loaded.
    moved = (p["PE"] - units if p["TURNS"] > 1 else 0) * p["A_BITS"]
    return Area(units * one.luts + moved, units * one.flipflops + registers, units * one.multipliers)


def _thresholds(p: Mapping[str, int], family: Family) -> Area:
    """One sum in ``rtl/thresholds.v``: a comparison per bit, with one of a few constants."""
    bits = p["THRESHOLDS"]
    constants = sum(family.contents_of(p["COLUMNS"] * p["TURNS"] << i, p["T_BITS"]) for i in range(bits))
    return Area(bits * family.adder(p["A_BITS"]) + constants, bits * (p["A_BITS"] + bits))


def _products(p: Mapping[str, int], family: Family) -> Area:
    """One ``rtl/product.v``."""
    if p["STYLE"] == 0:
        return Area(multipliers=1)
    if p["STYLE"] == 2:
        return Area(p["P_BITS"] * p["X_BITS"] / 2, p["P_BITS"])
    digits, bits = (p["W_BITS"] + 1) // 2, p["X_BITS"] + (not p["X_SIGNED"]) + 2
    if family.inputs == 6:  # a digit selects among four in the table that adds it
        luts = digits * (bits + 4.0)
    else:  # two tables select among four; the signed digit needs no multiple of three, and one
        luts = 2 * digits * bits - p["W_SIGNED"] * bits + (digits - 1) * family.adder(bits)
    return Area(luts, digits * bits + p["W_BITS"])


def _tree(count: int, width: int, limit: int, family: Family) -> Area:
    """``rtl/adder_tree.v``."""
    total = Area()
    while count > 1:
        pairs = count // 2
        total += Area(pairs * family.adder(width), (count - pairs) * (width + 1))
        count, width = count - pairs, min(width + 1, limit)
    return total


def mac_array(p: Mapping[str, int], family: Family) -> Area:
    """``rtl/mac_array.v`` with parameters ``p``."""
    pe, simd = p["PE"], p.get("SIMD", 1)
    lanes = pe if p.get("EACH") else simd
    one = _products(p, family)
    total = Area(pe * simd * one.luts, pe * simd * one.flipflops, pe * simd * one.multipliers)
    if p["STYLE"] == 1 and p["W_BITS"] > 1 + p["W_SIGNED"]:  # 3x, which waits for the digits of the weights
        digits, x = (p["W_BITS"] + 1) // 2, p["X_BITS"] + (not p["X_SIGNED"])
        total += Area(lanes * family.adder(x), lanes * digits * (2 * x + 2))
    tree = _tree(simd, p["P_BITS"], p["A_BITS"], family)
    accumulator = family.adder(p["A_BITS"])
    if family.inputs == 4:  # the selection of its start takes tables of its own
        accumulator += p["A_BITS"]
    elif p["STYLE"] == 0:  # the adders of DSP blocks take the first level of the tree, and one more
        accumulator = -(simd // 2) * p["P_BITS"]
    return total + Area(pe * (tree.luts + accumulator), pe * (tree.flipflops + p["A_BITS"])) + _scale_array(p, family)


def _macs(unit: Unit, family: Family) -> Area:
    """Units around ``rtl/mac_array.v``."""
    p = unit.parameters
    simd = p.get("SIMD", 1)
    counters = sum(max(n - 1, 1).bit_length() for n in (p["ROWS"], p["COLUMNS"], p["ROWS"] * p["COLUMNS"]))
    total = Area(10 + counters * (2 if family.inputs == 6 else 4), 40) + mac_array(p, family)
    for memory in unit.memories.values():
        luts, bits = family.contents(memory)
        total += Area(luts, memory.words.shape[1] * memory.bits, memory_bits=bits)
    if unit.module == "matvec" and p["COLUMNS"] > 1 and not p.get("EACH"):  # the input is kept and replayed
        total += Area(family.ports(simd * p["X_BITS"], p["ROWS"]) + simd * p["X_BITS"], simd * p["X_BITS"])
    if unit.module == "matmul":
        taken = unit.inputs["b"] if "b" in unit.inputs else list(unit.inputs.values())[-1]
        total += Area(family.ports(taken.width, taken.beats), taken.width)
    return total


def _bitserial(unit: Unit, family: Family) -> Area:
    """``rtl/bitserial.v``: a pair of gated inputs per adder of the first level, the sum of a group, its multiplication."""
    p = unit.parameters
    pe, simd, x = p["PE"], p["SIMD"], p["X_BITS"] + (not p["X_SIGNED"])
    steps = [p[n] for n in ("ROWS", "PLANES", "GROUPS", "COLUMNS")]
    counters = sum(max(n - 1, 1).bit_length() for n in (*steps, int(np.prod(steps))))
    total = Area(20 + counters * (2 if family.inputs == 6 else 4), 60)
    pairs = (simd + 1) // 2
    if family.inputs == 6:  # one operand of an adder is gated in the adder's tables; the last one may have no partner
        gates = simd // 2 * family.adder(x) + pairs * x
    else:
        gates = pairs * (family.adder(x) + 2 * x)
    tree = _tree(pairs, x + 1, p["P_BITS"], family)
    # The sum of a group selects among itself, twice itself and 0, and adds or subtracts.
    summed = family.adder(p["P_BITS"]) + (1 if family.inputs == 6 else 2) * p["P_BITS"]
    whole = family.adder(p["A_BITS"]) + p["A_BITS"] * (2 if p["SCALES"] else 0 if family.inputs == 6 else 1)
    registers = pairs * (x + 1) + tree.flipflops + p["P_BITS"] + p["A_BITS"]
    if p["SCALES"]:
        registers += 2 * p["A_BITS"] + 2 * p["S_BITS"] + 1
        whole += p["S_BITS"]
    total += Area(pe * (gates + tree.luts + summed + whole), pe * registers) + _scale_array(p, family)
    for memory in unit.memories.values():
        luts, bits = family.contents(memory)
        total += Area(luts, memory.words.shape[1] * memory.bits, memory_bits=bits)
    kept = family.ports(simd * p["X_BITS"], p["ROWS"] * p["GROUPS"]) + simd * p["X_BITS"]
    return total + Area(kept, simd * p["X_BITS"])


def _unrolled(unit: Unit, family: Family) -> Area:
    """A pipeline made for its constants."""
    luts, flipflops = unit.area()  # type: ignore[attr-defined]
    return Area(luts if family.inputs == 6 else 1.05 * luts, flipflops)


def _affine(unit: Unit, family: Family) -> Area:
    """``rtl/affine.v``."""
    p = unit.parameters
    blocks = _blocks(p["X_BITS"] + 1, p["M_BITS"], family) if p["SCALE"] else 0
    return _other(unit, family) + Area(multipliers=p["PE"] * blocks)


def _combine(unit: Unit, family: Family) -> Area:
    """``rtl/combine.v``: two scales, or a product and one."""
    p = unit.parameters
    a, b, m = p["A_BITS"] + 1, p["B_BITS"] + 1, p["M_BITS"]
    if p["PRODUCT"]:
        blocks = _blocks(a, b, family) + (_blocks(a + b, m, family) if p["SCALING"] else 0)
    else:
        blocks = 2 * _blocks(max(a, b), m, family) if p["SCALING"] else 0
    return _other(unit, family) + Area(multipliers=p["PE"] * blocks)


def _other(unit: Unit, family: Family) -> Area:
    """Units that move, compare or look up: a few tables per bit of their ports."""
    width = sum(c.width for c in (*unit.inputs.values(), *unit.outputs.values()))
    total = Area(20.0 + width, 30.0 + 2.0 * width)
    for memory in unit.memories.values():
        luts, bits = family.contents(memory)
        total += Area(luts, memory_bits=bits)
    p = unit.parameters
    if "SHIFT" in p and "Q_BITS" in p and "Y_BITS" in p:
        lanes = p.get("PE", 1)
        one = _requantize(p, family)
        total += Area(lanes * one.luts, lanes * one.flipflops, lanes * one.multipliers)
    return total


_BODIES: dict[str, Callable[[Unit, Family], Area]] = {
    "matvec": _macs,
    "matmul": _macs,
    "bitserial": _bitserial,
    "unrolled": _unrolled,
    "affine": _affine,
    "combine": _combine,
}
