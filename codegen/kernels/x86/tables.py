"""GEMM of weights whose codes index a table of levels: NF4, FP4, MXFP4, NVFP4, FP6, powers of two, codebooks.

A table of 16 levels lies in a register and ``vpshufb`` looks 32 codes up at once, so that any levels cost what integers cost
and one instruction more. Longer tables take a register per 16 levels, and the higher bits of the code choose between the
registers (``vpblendvb``).

* `ByteTableGemm`: levels that are small integers, less the smallest of them, are unsigned bytes and go through the
  byte products of `maddubs`.
* `WordTableGemm`: other levels are 16-bit integers, looked up as two bytes and interleaved; ``vpmaddwd`` multiplies them by
  16-bit activations. An int32 lane then holds the sum of two consecutive k, so two registers of sums are added crosswise.
  Where a level is that of the low half of its code plus that of the high half (two powers of two), both halves are looked
  up in the 16 entries they share.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission, Register, Tile, beside
from qcompile.codegen.kernels.cpu.levels import ENTRIES, Levels, adds_halves, entries, exact_levels, rounded_levels
from qcompile.codegen.kernels.cpu.minifloats import half_shift
from qcompile.codegen.kernels.cpu.panels import IndexPanels
from qcompile.codegen.kernels.cpu.tables import HALF, LevelTables
from qcompile.codegen.kernels.cpu.unpack import as_bytes, field, shift
from qcompile.codegen.kernels.x86.instructions import MADDWD, PSHUFB, prefetch
from qcompile.codegen.kernels.x86.maddubs import MaddubsGemm, products
from qcompile.codegen.kernels.x86.signed import signed_rows
from qcompile.formats import Format, Quantized
from qcompile.targets.target import Target


class ByteTableGemm(LevelTables, MaddubsGemm):
    """Levels that are integers, in unsigned bytes."""

    name = "x86-table8"

    def refuse_codes(self, problem: LinearProblem) -> str:
        if exact_levels(problem.weight) is None:
            return f"{self.name}: the levels of {problem.weight} are no small integers"
        return super().refuse_codes(problem)

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> IndexPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return IndexPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"])

    def largest(self, problem: LinearProblem) -> int:
        levels = exact_levels(problem.weight)
        return 1 if levels is None else int(levels.level.max() - levels.level.min())

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        levels = exact_levels(problem.weight)
        assert levels is not None
        return levels

    def offset(self, problem: LinearProblem) -> int:
        return _smallest(problem.weight)

    def zero(self, e: Emission) -> int:
        return _smallest(e.problem.weight)

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate * (1.0 if products(self.largest(problem)) >= 4 else 0.8), unpack + _look_ups(problem.weight)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        super().prologue(e, first, rows)
        e.extra["table"] = _registers(e, 0)

    def decoded(self, e: Emission, codes: Any) -> Any:
        return _look_up(e, e.extra["table"], codes)


class WordTableGemm(ByteTableGemm):
    """Any levels, in 16 bits."""

    name = "x86-table16"
    streams = (2, 4, 1)  # sums of four do not fit in registers
    level_bytes = 2

    def refuse_codes(self, problem: LinearProblem) -> str:
        if not super().refuse_codes(problem):
            return f"{self.name}: the levels of {problem.weight} fit in bytes"
        if self._exact(problem) is None and problem.weight.bits > 4 and half_shift(problem.weight) is not None:
            return f"{self.name} would round the levels of {problem.weight} to 16 bits; x86-minifloat keeps them"
        return ""

    def _exact(self, problem: LinearProblem) -> Levels | None:
        return exact_levels(problem.weight, self.largest_level(problem))

    def largest_level(self, problem: LinearProblem) -> int:
        """The largest level for which a group's sum fits in int32."""
        length = min(problem.weight.group or problem.k, problem.k)
        return min(HALF - 1, ((1 << 31) - 1) // (128 * length))

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        look_ups = 1.5 if adds_halves(problem.weight) else 2 * _look_ups(problem.weight) + 0.5
        return 20.0, look_ups + (0.7 * bits if 8 % bits else 0.0)

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if problem.weight.bits > 4:  # many rows share a long look-up
            return [(6, 1), (4, 1), (3, 1), (2, 2)]
        return [(4, 1), (2, 2), (3, 1), (6, 1)]

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        return self._exact(problem) or rounded_levels(problem.weight, weight, self.largest_level(problem))

    def offset(self, problem: LinearProblem) -> int:
        return HALF

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        e.extra["rows"] = signed_rows(e, e.panels, first, rows, 2 * e.panels.lanes, "int16")
        if adds_halves(e.problem.weight):
            e.extra["table"] = [_register(e, 0)]  # low bytes are the levels: they fit in a signed byte
            return
        sign = v.const(-128, 4 * e.panels.lanes, "int8")
        high = [v.let(T.bitwise_xor(register, sign)) for register in _registers(e, entries(e.problem.weight))]
        e.extra["table"] = [_registers(e, 0), high]

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        crossed = [[[Register("int32", p.lanes) for _ in range(2)] for _ in line] for line in sums]
        for line in crossed:
            for registers in line:
                for register in registers:
                    register.set(v.const(0, p.lanes, "int32"))
        with T.serial(e.rolled(p.rows_per_group)) as i:
            line_at = v.let(group * p.rows_per_group + i)
            if e.config["prefetch"]:
                for each, offset in itertools.product(beside(panel), range(0, p.row_bytes, 64)):
                    prefetch(e.names["weight"], [each, line_at, offset + e.config["prefetch"]])
            raw = self.load_row(e, panel, line_at)
            for index in range(p.per_byte):
                weights = [self._words(e, as_bytes(field(planes, index, p, p.bits), p.lanes)) for planes in raw]
                for r, line in enumerate(crossed):
                    four = e.extra["rows"].word(r, line_at * p.step + index * p.depth)
                    a = v.let(v.bits_of(v.splat(four, p.lanes // 2), "int16", 2 * p.lanes))
                    for registers, halves in zip(line, weights):
                        for register, half in zip(registers, halves):
                            product = T.call_llvm_pure_intrin(f"int32x{p.lanes}", MADDWD[p.lanes], half, a)
                            register.set(register.get() + product)
        for line, added in zip(crossed, sums):
            for (low, high), acc in zip(line, added):
                acc.set(acc.get() + _across(low.get(), high.get(), p.lanes))

    def _words(self, e: Emission, codes: Any) -> list[Any]:
        """The levels of a register of codes as int16: the columns in the lower half of every 128 bits, and the others."""
        size, codes = 4 * e.panels.lanes, v.let(codes)
        if adds_halves(e.problem.weight):
            return self._added(e, codes)
        low, high = (v.let(_look_up(e, table, codes)) for table in e.extra["table"])
        return [
            v.let(v.bits_of(T.Shuffle([low, high], _interleaved(size, upper)), "int16", size // 2)) for upper in (0, 1)
        ]

    @staticmethod
    def _added(e: Emission, codes: Any) -> list[Any]:
        """The same where the level of a code is the sum of those of its halves."""
        lanes, size = e.panels.lanes, 4 * e.panels.lanes
        nibble = v.const(15, size, "int8")
        above = as_bytes(shift(v.bits_of(codes, "int32", lanes), -4, lanes), lanes)
        halves = [v.let(T.bitwise_and(part, nibble)) for part in (codes, above)]
        levels = [v.let(_look_up(e, e.extra["table"], half)) for half in halves]

        def wide(bytes_: Any, upper: int) -> Any:
            twice = v.bits_of(T.Shuffle([bytes_, bytes_], _interleaved(size, upper)), "int16", size // 2)
            return T.shift_right(twice, v.const(8, size // 2, "int16"))

        return [v.let(wide(levels[0], upper) + wide(levels[1], upper)) for upper in (0, 1)]


def _smallest(fmt: Format) -> int:
    """What is added to integer levels to make them unsigned."""
    levels = exact_levels(fmt)
    return 0 if levels is None else -int(levels.level.min())


def _look_ups(fmt: Format) -> float:
    """Cycles of a look-up."""
    registers = entries(fmt) // ENTRIES
    return 0.5 * registers + 0.5 * (registers - 1)


def _registers(e: Emission, start: int) -> list[Any]:
    """A table, from byte ``start`` on: one register per 16 entries."""
    return [_register(e, start + at) for at in range(0, entries(e.problem.weight), ENTRIES)]


def _register(e: Emission, start: int) -> Any:
    """16 entries of the table in every 128 bits."""
    table = v.bits_of(v.load(e.names["table"], [start], ENTRIES), "int8", ENTRIES)
    copies = e.panels.lanes // 4
    return v.let(T.Shuffle([table] * copies, list(range(ENTRIES * copies))))


def _look_up(e: Emission, registers: list[Any], codes: Any) -> Any:
    """The bytes at codes. ``vpshufb`` reads their low four bits, the others choose between registers."""
    lanes, size = e.panels.lanes, 4 * e.panels.lanes
    index = codes if len(registers) == 1 else v.let(T.bitwise_and(codes, v.const(15, size, "int8")))
    found = [T.call_llvm_pure_intrin(f"int8x{size}", PSHUFB[lanes], table, index) for table in registers]
    for bit in range(4, 4 + (len(registers) - 1).bit_length()):
        # A bit at the top of its byte chooses; what crosses bytes lies below.
        top = v.let(as_bytes(shift(v.bits_of(codes, "int32", lanes), 7 - bit, lanes), lanes))
        chosen = top < v.const(0, size, "int8")
        found = [v.let(T.Select(chosen, high, low)) for low, high in zip(found[::2], found[1::2])]
    return found[0]


def _interleaved(size: int, upper: int) -> list[int]:
    """The pattern of ``punpcklbw`` (``punpckhbw``): bytes of two registers in turns, within 128 bits."""
    starts = range(8 * upper, size, 16)
    return [place for start in starts for i in range(8) for place in (start + i, size + start + i)]


def _across(low: Any, high: Any, lanes: int) -> Any:
    """Sums of neighbouring lanes, those of ``low`` before those of ``high`` within 128 bits (``vphaddd``)."""
    even = [place for start in range(0, lanes, 4) for place in (start, start + 2, lanes + start, lanes + start + 2)]
    return T.Shuffle([low, high], even) + T.Shuffle([low, high], [place + 1 for place in even])
