"""Integer GEMM on 16-bit values: exact for codes that byte products may saturate, on any processor with AVX2.

Codes are stored as bytes and widened in registers (``vpmovsxbw``), once per tile; activations are widened, less their
offset of 128, into a scratch buffer once per item, which covers several panels. ``vpmaddwd`` adds two products of
16-bit numbers into an int32 lane without any saturation; where the processor has VNNI, LLVM fuses it with the addition.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission, Tile, position, vectors
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.refusals import float_activations, no_avx2, overflow
from qcompile.codegen.kernels.cpu.vector import lanes_of
from qcompile.codegen.kernels.x86.instructions import MADDWD
from qcompile.codegen.kernels.x86.maddubs import products
from qcompile.targets.target import Target


class WideGemm(TiledGemm):
    """``vpmaddwd`` on 256- or 512-bit registers."""

    name = "x86-maddwd"
    streams = (4, 2, 1)

    def lanes(self, target: Target) -> int:
        return lanes_of(target)

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := no_avx2(self.name, target) or float_activations(self.name, problem):
            return reason
        if products((1 << problem.weight.bits) - 1) >= 1:
            return f"{self.name} would store {problem.weight} codes as bytes; other families keep them at their width"
        return overflow(self.name, problem.k, problem.weight.group)

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return Panels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], 2, 8, fmt.symmetric)

    def unit(self, panels: Panels) -> int:
        return 1

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if target.has("avx512"):
            return [(8, 3), (6, 4), (12, 2)]
        return [(6, 2), (4, 2), (3, 3), (12, 1)]

    def panels_per_item(self) -> int:
        return 4

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return (34.0, 0.8) if target.has("avx512") else (25.0, 0.5)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        # Rows a power of two apart would fall on the same lines of the first-level cache: 32 elements more than needed.
        width = max(e.problem.k, 2)
        wide = e.extra["wide"] = B.alloc_buffer((e.config["mr"], width + 32), "int16")
        x = e.names["x"]
        with T.serial(rows) as row:
            at = v.let(first + row)

            def widen(start: Any, lanes: int, slot: int) -> None:
                value = v.cast(v.load(x, [at, start], lanes), "int16", lanes) - v.const(128, lanes, "int16")
                v.store(wide, [row, start], value, lanes)

            v.sweep(e.problem.k, 2 * e.panels.lanes, widen)
            if e.problem.k < 2:
                B.buffer_store(wide, T.int16(0), [row, 1])

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self._reduce(e, panel, sums, group))

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        half = 2 * p.lanes
        zeros = None
        if not p.fmt.symmetric:
            codes = self.zero_codes(e, panel, group)
            pairs = [T.bitwise_or(z, T.shift_left(z, v.const(16, p.lanes, "int32"))) for z in codes]
            zeros = [v.let(v.bits_of(pair, "int16", half)) for pair in pairs]
        with T.serial(e.rolled(p.rows_per_group)) as row:
            line = group * p.rows_per_group + row
            weights = []
            for i, (each, at) in enumerate(vectors(p, panel)):
                stored = v.load(e.names["weight"], [each, line, 2 * at], half)
                if zeros is None:
                    stored = v.bits_of(stored, "int8", half)
                wide = v.cast(stored, "int16", half)
                weights.append(v.let(wide if zeros is None else wide - zeros[i]))
            k = position(e, group, row, 0)
            for r, accumulators in enumerate(sums):
                word = v.bits_of(v.load(e.extra["wide"], [r, k], 2), "int32", 1)
                a = v.let(v.bits_of(v.splat(word, p.lanes), "int16", half))
                for acc, w in zip(accumulators, weights):
                    acc.set(acc.get() + T.call_llvm_pure_intrin(f"int32x{p.lanes}", MADDWD[p.lanes], a, w))
