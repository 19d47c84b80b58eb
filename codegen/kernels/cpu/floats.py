"""Weight-only GEMM: float32 activations, integer weights turned to float32 in registers.

A code is cut out of its 32-bit lane by two shifts (signed) or a shift and a mask, converted, and multiplied by one FMA
per row. Scales multiply the sum of a group, not every weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import Emission, Tile, position
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.unpack import field, signed_field, unsigned_field


class FloatGemm(TiledGemm):
    """Base of the weight-only families; a subclass says for which processors and gives the register tiles."""

    float_tile = True

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        lanes, vectors = config["lanes"], config["vectors"]
        return Panels(problem.k, problem.n, fmt, lanes, vectors, twos_complement=fmt.symmetric)

    def unit(self, panels: Panels) -> int:
        return 1

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
                k = position(e, group, row, index)
                for offset, weights in self.floats(e, raw, index, zeros):
                    at = T.min(k + offset, p.k - 1) if p.k < p.depth else k + offset
                    for r, accumulators in enumerate(sums):
                        a = v.let(v.splat(e.names["x"][first + r, at], p.lanes))
                        for acc, w in zip(accumulators, weights):
                            acc.set(vmath.fma(a, w, acc.get()))

    def floats(
        self, e: Emission, raw: list[list[Any]], index: int, zeros: list[Any] | None
    ) -> Iterator[tuple[int, Any]]:
        """For each of the consecutive k at ``index``: its offset and the weights of every vector, without scales."""
        p = e.panels
        cut = signed_field if zeros is None else unsigned_field
        if p.planes:  # gather the bits of a code in its byte first
            sources = [v.let(field(planes, index, p, 8)) for planes in raw]
        else:
            sources = [planes[0] for planes in raw]
        for offset in range(p.depth):
            end = 8 * (offset + 1) if p.planes else 8 * offset + (index + 1) * p.bits
            codes = [v.cast(cut(words, end, p.bits, p.lanes), "float32", p.lanes) for words in sources]
            yield offset, [v.let(c if zeros is None else c - zeros[i]) for i, c in enumerate(codes)]
