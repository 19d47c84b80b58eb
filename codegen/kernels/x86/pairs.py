"""Exact 8-bit GEMM with ``vpmaddubsw``, which saturates: activations are split so that it never does.

``vpmaddubsw`` adds two products of an unsigned and a signed byte into an int16 lane. With unsigned weights
``u = w + 128`` and signed activations it fits whenever the two activations of a pair that have the same sign add up to at
most 128 in magnitude, as ``255 * 128 < 2^15``; of different signs they always fit. A row seldom breaks that: its scale
covers its largest activation, and most are far smaller. So once per row

    a = main + excess,    sum_k w a  =  sum_k u main  +  sum_k u excess  -  128 sum_k a,

where both parts keep the bound and the excess is a short list of groups of four activations. With normal
activations of 384 channels about 3 % of the pairs are split. What is gained are three instructions per 32 products instead of
the four that widening to 16 bits takes (`wide.py`), and weights that are used as they are stored: 1.13 to 1.24 times its speed
on one AVX2 core (AMD EPYC) at the shapes of MiniLM and 128 rows. Zero points take the place of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import Emission, Register, Tile, TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.x86.instructions import MADDUBS, MADDWD
from qcompile.targets.target import Target

BOUND = 128
"""What the activations of one sign in a pair may add up to."""

PREFETCH = 2048
"""Bytes ahead of the weights in use that are asked for: a tenth of the time of 16 rows with weights in the third-level cache."""

LANES = 8
"""32-bit lanes of a register."""

BYTES = 4 * LANES
"""Bytes of a register."""


@dataclass(frozen=True)
class OffsetPanels(Panels):
    """Panels of unsigned bytes at any symmetry; what stands for 0 is the zero point, or 128."""

    @property
    def bias(self) -> int:
        """What is added to a symmetric code to store it."""
        return -self.fmt.qmin


class PairGemm(TiledGemm):
    """8-bit weights on 256-bit registers."""

    name = "x86-pairs"

    def lanes(self, target: Target) -> int:
        return LANES

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("avx2", "fma", "f16c"):
            return f"{self.name} needs AVX2, FMA and F16C, which {target} does not have"
        if not problem.activation.bits:
            return f"{self.name} multiplies integer activations; this operator has float ones"
        if problem.weight.bits != 8:
            return f"{self.name} is for 8-bit codes; {problem.weight} are narrow enough for x86-maddubs"
        longest = min(problem.weight.group or problem.k, problem.k)
        if longest * 128 * 255 >= 1 << 31:
            return f"{self.name}: {longest} products of 8-bit numbers may overflow an int32 accumulator"
        return ""

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> OffsetPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return OffsetPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"])

    def unit(self, panels: Panels) -> int:
        return 1

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(5, 2), (4, 2), (3, 3), (10, 1)]

    def panels_per_item(self) -> int:
        return 24

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return 29.0, 0.0

    # Activations, once per item

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        p, mr = e.panels, e.config["mr"]
        words = p.groups * p.rows_per_group
        # Rows a power of two apart would fall on the same lines of the first-level cache.
        e.extra["main"] = B.alloc_buffer((mr, 4 * words + BYTES), "int8")
        e.extra["excess"] = B.alloc_buffer((mr, 4 * words), "int8")
        e.extra["place"] = B.alloc_buffer((mr, words), "int32")
        e.extra["begin"] = B.alloc_buffer((mr, p.groups + 1), "int32")
        e.extra["total"] = B.alloc_buffer((mr, p.groups), "int32")
        with T.serial(rows) as row:
            count = Register("int32", 1)
            count.set(T.int32(0))
            with T.serial(p.groups) as group:
                v.store(e.extra["begin"], [row, group], count.get(), 1)
                self._group(e, v.let(first + row), row, group, count)
            v.store(e.extra["begin"], [row, p.groups], count.get(), 1)

    def _group(self, e: Emission, at: Any, row: Any, group: Any, count: Register) -> None:
        """Copy the activations of one group, sum them, and split them where they break the bound."""
        p, main = e.panels, e.extra["main"]
        contiguous = not p.clamped and p.group % 4 == 0
        begin = v.let(group * p.rows_per_group)
        if not contiguous:
            with T.serial(p.rows_per_group) as line:
                k = self.position(e, group, line, 0)
                for i in range(4):
                    value = T.cast(e.names["x"][at, k + i], "int32") - 128 if i < p.k else T.int32(0)
                    B.buffer_store(main, T.cast(value, "int8"), [row, 4 * (begin + line) + i])
        lanes = Register("int32", LANES)
        lanes.set(v.const(0, LANES, "int32"))
        full, rest = divmod(p.rows_per_group, LANES)
        ones = v.const(1, BYTES, "int8")
        with T.serial(full) as i:
            word = v.let(begin + i * LANES)
            if contiguous:
                raw = v.load(e.names["x"], [at, group * p.group + i * BYTES], BYTES)
                signed = T.bitwise_xor(v.bits_of(raw, "int8", BYTES), v.const(-128, BYTES, "int8"))
                v.store(main, [row, 4 * word], signed, BYTES)
            codes = v.load(main, [row, 4 * word], BYTES)
            sums = v.let(T.call_llvm_pure_intrin(f"int16x{2 * LANES}", MADDUBS[LANES], ones, codes))
            lanes.set(
                lanes.get()
                + T.call_llvm_pure_intrin(f"int32x{LANES}", MADDWD[LANES], sums, v.const(1, 2 * LANES, "int16"))
            )
            low, high = (v.const(s * BOUND, 2 * LANES, "int16") for s in (-1, 1))
            within = T.max(T.min(sums, high), low)
            same = T.call_llvm_pure_intrin(
                "int32", "llvm.x86.avx2.pmovmskb", v.bits_of(equal_lanes(sums, within), "int8", BYTES)
            )
            broken = v.let(T.bitwise_xor(same, T.int32(-1)))
            with T.If(broken != 0), T.Then(), T.serial(LANES) as j:
                here = T.bitwise_and(T.shift_right(broken, 4 * j), T.int32(15))
                with T.If(here != 0), T.Then():
                    self._split(e, row, word + j, count)
        total = Register("int32", 1)
        total.set(v.reduce_lanes(v.let(lanes.get()), LANES, v.add))
        if rest:
            with T.serial(rest) as i:
                word = v.let(begin + full * LANES + i)
                if contiguous:
                    for b in range(4):
                        value = T.cast(e.names["x"][at, group * p.group + full * BYTES + 4 * i + b], "int32") - 128
                        B.buffer_store(main, T.cast(value, "int8"), [row, 4 * word + b])
                codes = [T.cast(main[row, 4 * word + b], "int32") for b in range(4)]
                first, second = v.let(codes[0] + codes[1]), v.let(codes[2] + codes[3])
                total.set(total.get() + first + second)
                with T.If(T.max(T.max(first, second), -T.min(first, second)) > BOUND), T.Then():
                    self._split(e, row, word, count)
        v.store(e.extra["total"], [row, group], total.get(), 1)

    def _split(self, e: Emission, row: Any, word: Any, count: Register) -> None:
        """Move what exceeds the bound in four activations to the list."""
        main, excess = e.extra["main"], e.extra["excess"]
        index = v.let(count.get())
        for half in (0, 2):
            at = [4 * word + half + i for i in range(2)]
            a, b = (v.let(T.cast(main[row, place], "int32")) for place in at)
            over = v.let(a + b - T.max(T.min(a + b, BOUND), -BOUND))
            # From the larger of the two, so that it does not change its sign.
            of_a = v.let(T.Select(T.abs(a) >= T.abs(b), over, 0))
            for i, (code, part) in enumerate(((a, of_a), (b, over - of_a))):
                B.buffer_store(excess, T.cast(part, "int8"), [row, 4 * index + half + i])
                B.buffer_store(main, T.cast(code - part, "int8"), [row, at[i]])
        v.store(e.extra["place"], [row, index], word, 1)
        count.set(index + 1)

    # Products

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self._reduce(e, panel, sums, group))

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        zeros = None if p.fmt.symmetric else self.zero_codes(e, panel, group)
        for r, line in enumerate(sums):
            total = v.let(e.extra["total"][r, group])
            for vec, acc in enumerate(line):
                offset = v.splat(total * 128, LANES) if zeros is None else zeros[vec] * v.splat(total, LANES)
                acc.set(acc.get() - offset)
        with T.serial(e.rolled(p.rows_per_group)) as i:
            place = group * p.rows_per_group + i
            weights = [v.let(self._weights(e, panel, place, vec)) for vec in range(p.vectors)]
            if PREFETCH:
                address = T.address_of(e.names["weight"][panel, place, PREFETCH])
                T.evaluate(T.call_intrin("void", "tirx.prefetch", address, T.int32(0), T.int32(3), T.int32(1)))
            for r, line in enumerate(sums):
                self._add(line, weights, _word(e.extra["main"], r, place))
        for r, line in enumerate(sums):
            with T.serial(e.extra["begin"][r, group], e.extra["begin"][r, group + 1]) as i:
                place = v.let(e.extra["place"][r, i])
                weights = [self._weights(e, panel, place, vec) for vec in range(p.vectors)]
                self._add(line, weights, _word(e.extra["excess"], r, i))

    def _weights(self, e: Emission, panel: Any, row: Any, vec: int) -> Any:
        return v.bits_of(v.load(e.names["weight"], [panel, row, vec * BYTES], BYTES), "int8", BYTES)

    def _add(self, line: list[Register], weights: list[Any], word: Any) -> None:
        """Add the products of four activations with one panel row."""
        a = v.let(v.bits_of(v.splat(word, LANES), "int8", BYTES))
        for acc, w in zip(line, weights, strict=True):
            pair = T.call_llvm_pure_intrin(f"int16x{2 * LANES}", MADDUBS[LANES], w, a)
            ones = v.const(1, 2 * LANES, "int16")
            acc.set(acc.get() + T.call_llvm_pure_intrin(f"int32x{LANES}", MADDWD[LANES], pair, ones))


def _word(buffer: Any, row: Any, index: Any) -> Any:
    """Four bytes of a row as one int32."""
    return v.bits_of(v.load(buffer, [row, 4 * index], 4), "int32", 1)


def equal_lanes(a: Any, b: Any) -> Any:
    """All ones in each int16 lane where ``a`` equals ``b``, as int16."""
    lanes = 2 * LANES
    return T.Select(T.EQ(a, b), v.const(-1, lanes, "int16"), v.const(0, lanes, "int16"))
