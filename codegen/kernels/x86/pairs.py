"""Exact 8-bit GEMM with ``vpmaddubsw``, which saturates: activations are split so that it never does.

``vpmaddubsw`` adds two products of an unsigned and a signed byte into an int16 lane. With unsigned weights
``u = w + 128`` and signed activations it fits whenever the two activations of a pair that have the same sign add up to at
most 128 in magnitude, as ``255 * 128 < 2^15``; of different signs they always fit. A row seldom breaks that: its scale
covers its largest activation, and most are far smaller. So once per row

    a = main + excess,    sum_k w a  =  sum_k u main  +  sum_k u excess  -  128 sum_k a,

where both parts keep the bound and the excess is a short list of groups of four activations. With normal
activations of 384 channels about 3 % of the pairs are split. What is gained are three instructions per 32 products instead of
the four that widening to 16 bits takes (`wide.py`), and weights that are used as they are stored: 1.27 to 1.32 times its speed
on one AVX2 core (AMD EPYC) at the shapes of MiniLM and 128 rows. Zero points take the place of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Emission, Register, Tile, beside, position, vectors
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.refusals import float_activations, no_avx2, overflow
from qcompile.codegen.kernels.x86.instructions import MADDUBS, MADDWD, prefetch
from qcompile.targets.target import Target

BOUND = 128
"""What the activations of one sign in a pair may add up to."""

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
    streams = (4, 2, 1)

    def lanes(self, target: Target) -> int:
        return LANES

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := no_avx2(self.name, target) or float_activations(self.name, problem):
            return reason
        if problem.weight.bits != 8:
            return f"{self.name} is for 8-bit codes; {problem.weight} are narrow enough for x86-maddubs"
        return overflow(self.name, problem.k, problem.weight.group)

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

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        found = super().configs(problem, target)
        return [{**config, "prefetch": ahead} for ahead in (2048, 1024, 4096, 0) for config in found]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return 29.0, 0.0

    # Activations, once per item

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        p, mr = e.panels, e.config["mr"]
        words = p.groups * p.rows_per_group
        # Rows a power of two apart would fall on the same lines of the first-level cache.
        e.extra["main"] = B.alloc_buffer((mr, 4 * words + BYTES), "int8")
        e.extra["excess"] = B.alloc_buffer((mr, 2 * words + p.groups + 1), "int32")
        e.extra["begin"] = B.alloc_buffer((mr, p.groups), "int32")
        e.extra["total"] = B.alloc_buffer((mr, p.groups), "int32")
        e.extra["sums"] = B.alloc_buffer((mr, int(e.tile.shape[1])), "int32")
        with T.serial(rows) as row:
            count = Register("int32", 1)
            count.set(T.int32(0))
            with T.serial(p.groups) as group:
                v.store(e.extra["begin"], [row, group], count.get(), 1)
                self._group(e, v.let(first + row), row, group, count)
                v.store(e.extra["excess"], [row, count.get()], T.int32(-1), 1)
                count.set(count.get() + 1)

    def _group(self, e: Emission, at: Any, row: Any, group: Any, count: Register) -> None:
        """Copy the activations of one group, sum them, and split them where they break the bound."""
        p, main = e.panels, e.extra["main"]
        contiguous = not p.clamped and p.group % 4 == 0
        begin = v.let(group * p.rows_per_group)
        full, rest = divmod(p.rows_per_group, LANES)
        if rest:  # the last register of a group is filled with zeros
            v.store(main, [row, 4 * (begin + p.rows_per_group)], v.const(0, BYTES, "int8"), BYTES)
        lines = range(full * LANES, p.rows_per_group) if contiguous else range(p.rows_per_group)
        with T.serial(len(lines)) as i:
            line = v.let(i + lines.start)
            k = position(e, group, line, 0)
            for b in range(4):
                value = T.cast(e.names["x"][at, k + b], "int32") - 128 if b < p.k else T.int32(0)
                B.buffer_store(main, T.cast(value, "int8"), [row, 4 * (begin + line) + b])
        lanes = Register("int32", LANES)
        lanes.set(v.const(0, LANES, "int32"))
        if full:
            with T.serial(full) as i:
                word = v.let(begin + i * LANES)
                if contiguous:
                    raw = v.load(e.names["x"], [at, group * p.group + i * BYTES], BYTES)
                    signed = T.bitwise_xor(v.bits_of(raw, "int8", BYTES), v.const(-128, BYTES, "int8"))
                    v.store(main, [row, 4 * word], signed, BYTES)
                self._register(e, row, word, lanes, count)
        if rest:
            self._register(e, row, v.let(begin + full * LANES), lanes, count)
        v.store(e.extra["total"], [row, group], v.reduce_lanes(v.let(lanes.get()), LANES, v.add), 1)

    def _register(self, e: Emission, row: Any, word: Any, lanes: Register, count: Register) -> None:
        """Sum eight words of activations, and move what exceeds the bound to the list: where its weights are, then four codes."""
        main, excess, short = e.extra["main"], e.extra["excess"], 2 * LANES
        codes = v.let(v.load(main, [row, 4 * word], BYTES))
        sums = v.let(T.call_llvm_pure_intrin(f"int16x{short}", MADDUBS[LANES], v.const(1, BYTES, "int8"), codes))
        wide = T.call_llvm_pure_intrin(f"int32x{LANES}", MADDWD[LANES], sums, v.const(1, short, "int16"))
        lanes.set(lanes.get() + wide)
        low, high = (v.const(s * BOUND, short, "int16") for s in (-1, 1))
        over = v.let(sums - T.max(T.min(sums, high), low))
        zero = v.const(0, short, "int16")
        with T.If(movemask(T.EQ(over, zero)) != -1), T.Then():
            eight = v.const(8, short, "int16")
            pairs = v.let(v.bits_of(codes, "int16", short))
            a, b = v.let(T.shift_right(T.shift_left(pairs, eight), eight)), v.let(T.shift_right(pairs, eight))
            # From the larger of the two, so that it does not change its sign.
            of_a = v.let(T.Select(magnitude(a) < magnitude(b), zero, over))
            part = T.bitwise_or(T.bitwise_and(of_a, v.const(255, short, "int16")), T.shift_left(over - of_a, eight))
            parts = B.alloc_buffer((LANES,), "int32", annotations=ON_STACK)
            v.store(parts, [0], v.bits_of(v.let(part), "int32", LANES), LANES)
            both = v.bits_of(v.load(parts, [0], LANES), "int8", BYTES)
            v.store(main, [row, 4 * word], codes - both, BYTES)
            with T.serial(LANES) as j:
                here = v.let(parts[j])
                index = v.let(count.get())
                v.store(excess, [row, index], (word + j) * e.panels.row_bytes, 1)
                v.store(excess, [row, index + 1], here, 1)
                count.set(index + 2 * T.cast(here != 0, "int32"))

    # Products

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        grouped = bool(e.panels.fmt.group)

        def reduce(group: Any, sums: Tile) -> None:
            self._main(e, panel, sums, group)
            if grouped:
                places = [(r, vec) for r in range(rows) for vec in range(len(sums[r]))]
                for r, vec in places:
                    v.store(e.extra["sums"], [r, vec * LANES], sums[r][vec].get(), LANES)
                self._rest(e, panel, e.extra["sums"], rows, group)
                for r, vec in places:
                    sums[r][vec].set(v.load(e.extra["sums"], [r, vec * LANES], LANES))

        self.by_group(e, panel, "int32", rows, reduce)
        if not grouped:
            self._rest(e, panel, e.tile, rows, T.int32(0))

    def _main(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        """Add the products of one group, as far as the bound holds, with the unsigned weights."""
        p = e.panels
        with T.serial(e.rolled(p.rows_per_group)) as i:
            place = group * p.rows_per_group + i
            weights = [v.let(w) for w in self._weights(e, panel, place * p.row_bytes)]
            if e.config["prefetch"]:
                for each in beside(panel):
                    prefetch(e.names["weight"], [each, place, e.config["prefetch"]])
            for r, line in enumerate(sums):
                self._add(line, weights, v.bits_of(v.load(e.extra["main"], [r, 4 * place], 4), "int32", 1))

    def _rest(self, e: Emission, panel: Any, tile: Any, rows: int, group: Any) -> None:
        """Add what was moved to the list to a tile of sums, and take off what stands for 0 in the weights.

        Rows in a loop and sums from memory: the registers of the main loop stay its own.
        """
        p = e.panels
        zeros = None if p.fmt.symmetric else self.zero_codes(e, panel, group)
        with T.serial(e.rolled(rows)) as r:
            line = [Register("int32", LANES) for _ in vectors(p, panel)]
            total = v.let(e.extra["total"][r, group])
            for vec, acc in enumerate(line):
                offset = v.splat(total * 128, LANES) if zeros is None else zeros[vec] * v.splat(total, LANES)
                acc.set(v.load(tile, [r, vec * LANES], LANES) - offset)
            # A loop of unknown length: LLVM would unroll a counted one, whose remainder costs a mispredicted branch a row.
            at = Register("int32", 1)
            at.set(e.extra["begin"][r, group])
            with T.While(e.extra["excess"][r, at.get()] >= 0):
                index = v.let(at.get())
                offset = v.let(e.extra["excess"][r, index])
                self._add(line, self._weights(e, panel, offset), e.extra["excess"][r, index + 1])
                at.set(index + 2)
            for vec, acc in enumerate(line):
                v.store(tile, [r, vec * LANES], acc.get(), LANES)

    @staticmethod
    def _weights(e: Emission, panel: Any, offset: Any) -> list[Any]:
        places = [[each, 0, offset + 4 * at] for each, at in vectors(e.panels, panel)]
        return [v.bits_of(v.load(e.names["weight"], place, BYTES), "int8", BYTES) for place in places]

    def _add(self, line: list[Register], weights: list[Any], word: Any) -> None:
        """Add the products of four activations with one panel row."""
        a = v.let(v.bits_of(v.splat(word, LANES), "int8", BYTES))
        for acc, w in zip(line, weights, strict=True):
            pair = T.call_llvm_pure_intrin(f"int16x{2 * LANES}", MADDUBS[LANES], w, a)
            ones = v.const(1, 2 * LANES, "int16")
            acc.set(acc.get() + T.call_llvm_pure_intrin(f"int32x{LANES}", MADDWD[LANES], pair, ones))


def movemask(lanes: Any) -> Any:
    """A bit for each byte of int16 lanes of truth values, as int32."""
    short = 2 * LANES
    value = T.Select(lanes, v.const(-1, short, "int16"), v.const(0, short, "int16"))
    return T.call_llvm_pure_intrin("int32", "llvm.x86.avx2.pmovmskb", v.bits_of(value, "int8", BYTES))


def magnitude(value: Any) -> Any:
    """The absolute value of int16 lanes."""
    return T.max(value, v.const(0, 2 * LANES, "int16") - value)
