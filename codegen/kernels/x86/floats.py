"""Weight-only GEMM: float32 activations, integer weights turned to float32 in registers.

A code is cut out of its 32-bit lane by two shifts (signed) or a shift and a mask, converted, and multiplied by one FMA
per row. With AVX-512 a code of at most 4 bits is shifted to the bottom of its lane and looked up in a register of 16
floats (``vpermps`` reads 4 index bits and ignores the others). Scales multiply the sum of a group, not every weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.gemm import Emission, Tile, TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.unpack import field, shift, signed_field, unsigned_field
from qcompile.targets.target import Target

PERMUTE = "llvm.x86.avx512.permvar.sf.512"


class FloatGemm(TiledGemm):
    """FMA on 256- or 512-bit registers."""

    name = "x86-float"
    float_tile = True

    def lanes(self, target: Target) -> int:
        return 16 if target.has("avx512") else 8

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("avx2", "fma", "f16c"):
            return f"{self.name} needs AVX2, FMA and F16C, which {target} does not have"
        if problem.activation.bits:
            return f"{self.name} multiplies float activations; this operator has {problem.activation} ones"
        return ""

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        fmt = problem.weight
        lanes, vectors = config["lanes"], config["vectors"]
        return Panels(problem.k, problem.n, fmt, lanes, vectors, twos_complement=fmt.symmetric)

    def unit(self, panels: Panels) -> int:
        return 1

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if target.has("avx512") and 8 % problem.weight.bits == 0:
            return [(8, 3), (6, 4), (12, 2)]
        return [(4, 2), (6, 2), (4, 3), (12, 1)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        if target.has("avx512"):
            return 16.0, 8.0 + bits if 8 % bits else 8.0 if bits == 8 else 4.0
        return 15.0, 5.0 + bits if 8 % bits else 5.0

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "float32", rows, lambda group, sums: self._reduce(e, panel, first, sums, group))

    def _reduce(self, e: Emission, panel: Any, first: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        zeros = None
        if not p.fmt.symmetric:
            zeros = [v.let(v.cast(z, "float32", p.lanes)) for z in self.zero_codes(e, panel, group)]
        with T.serial(e.rolled(p.rows_per_group)) as row:
            raw = self.load_row(e, panel, group * p.rows_per_group + row)
            for index in range(p.per_byte):
                k = self.position(e, group, row, index)
                for offset, weights in self._floats(p, raw, index, zeros):
                    at = T.min(k + offset, p.k - 1) if p.k < p.depth else k + offset
                    for r, accumulators in enumerate(sums):
                        a = v.let(v.splat(e.names["x"][first + r, at], p.lanes))
                        for acc, w in zip(accumulators, weights):
                            acc.set(vmath.fma(a, w, acc.get()))

    def _floats(
        self, p: Panels, raw: list[list[Any]], index: int, zeros: list[Any] | None
    ) -> Iterator[tuple[int, Any]]:
        """For each of the consecutive k at ``index``: its offset and the weights of every vector, without scales."""
        cut = signed_field if zeros is None else unsigned_field
        if p.lanes == 16 and p.bits in (1, 2, 4):
            sign = 1 << (p.bits - 1) if p.twos_complement else 0
            values = [((i & ((1 << p.bits) - 1)) ^ sign) - sign for i in range(16)]
            table = v.let(T.Shuffle([T.float32(value) for value in values], list(range(16))))
            for offset in range(p.depth):
                shifts = [shift(planes[0], -(8 * offset + index * p.bits), p.lanes) for planes in raw]
                codes = [T.call_llvm_pure_intrin("float32x16", PERMUTE, table, moved) for moved in shifts]
                yield offset, [v.let(c if zeros is None else c - zeros[i]) for i, c in enumerate(codes)]
            return
        if p.planes:  # gather the bits of a code in its byte first
            sources = [v.let(field(planes, index, p, 8)) for planes in raw]
        else:
            sources = [planes[0] for planes in raw]
        for offset in range(p.depth):
            end = 8 * (offset + 1) if p.planes else 8 * offset + (index + 1) * p.bits
            codes = [v.cast(cut(words, end, p.bits, p.lanes), "float32", p.lanes) for words in sources]
            yield offset, [v.let(c if zeros is None else c - zeros[i]) for i, c in enumerate(codes)]
