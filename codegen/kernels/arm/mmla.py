"""Integer GEMM on matrix instructions (i8mm): SMMLA multiplies 2 rows x 8 k by 8 k x 2 columns into a 2 x 2 block of int32.

A register of weights holds 2 columns x 8 consecutive k. Two rows of activations are interleaved by halves, and a pair of
accumulators is brought back to rows of 4 columns when a group ends. A single row, as in text generation, would waste half of
every instruction; it uses SDOT on the same weights, whose lanes then hold half a sum of a column each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.integers import PLANES, DotGemm
from qcompile.codegen.kernels.arm.products import BYTES, LANES, DotSum, Word
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.targets.target import Target


class MmlaGemm(DotGemm):
    """SMMLA, 32 products per instruction."""

    name = "arm-smmla"
    needs = ("neon", "dotprod", "i8mm")
    depth = 8

    def lanes(self, target: Target) -> int:
        return 2

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if 0 < problem.weight.group < 64:  # fewer rows bring fewer sums back to rows of columns where groups end
            return [(4, 8), (6, 6), (8, 4)]
        return [(6, 6), (4, 8), (8, 4)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return 60.0, PLANES if 8 % problem.weight.bits else 0.0 if problem.weight.bits == 8 else 0.5

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """One row fills half of a register's lanes with a column each, and takes half as many instructions more."""
        return super().cost(problem, config, target, m) * (1.5 if m == 1 else 1.0)

    def factors(self, rows: int, activations: Callable[[int, int], Word], at: int) -> list[Any]:
        """What codes at position ``at`` are multiplied by: two rows in a register, or the only one twice."""
        if rows == 1:
            return super().factors(rows, activations, at)
        return [v.let(_interleaved(activations(r, at), activations(s, at))) for r, s in _pairs(rows)]

    def products(
        self,
        e: Emission,
        panel: Any,
        first: Any,
        group: Any,
        start: list[Any],
        quads: range,
        held: list[list[Any]] | None = None,
    ) -> list[list[Any]]:
        p = e.panels
        vectors = range(2 * quads.start, 2 * quads.stop)
        rows = len(start)
        parts = bits.partial_sums(p, rows, self.wide)
        pairs = _pairs(rows)
        zero = v.const(0, LANES, "int32")
        kind = DotSum if rows == 1 else MatrixSum
        tile = [[[kind(zero) for _ in parts] for _ in vectors] for _ in pairs]
        self.multiply(e, panel, first, rows, group, vectors, parts, tile, held)
        sums: list[list[Any]] = [[] for _ in start]
        for pair, line in zip(pairs, tile):
            whole = [v.let(bits.combine(parts, [accumulator.total() for accumulator in part], zero)) for part in line]
            for a, b in zip(whole[::2], whole[1::2]):
                if rows == 1:
                    both = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", a, b)
                    sums[0].append(v.let(start[0] + both))
                    continue
                for which, row in enumerate(dict.fromkeys(pair)):
                    low = [2 * which, 2 * which + 1]
                    quad = T.Shuffle([a, b], [*low, *(LANES + i for i in low)])
                    sums[row].append(v.let(start[row] + quad))
        return sums


class MatrixSum(DotSum):
    """SMMLA into one register, a 2 x 2 block: rows by columns."""

    def add(self, codes: Any, activations: Any) -> None:
        self.sum.set(matrix(self.sum.get(), activations, codes))


def _pairs(rows: int) -> list[tuple[int, int]]:
    """Rows that share a register; an odd last one is paired with itself."""
    return [(r, min(r + 1, rows - 1)) for r in range(0, rows, 2)]


def matrix(acc: Any, a: Any, b: Any) -> Any:
    """``acc`` (2 x 2) plus ``a`` (2 x 8) times the transpose of ``b`` (2 x 8)."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla", acc, a, b)


def _interleaved(a: Word, b: Word) -> Any:
    """Eight activations of one row, then eight of another."""
    if a.lanes > 1:
        both = T.Shuffle([a.value, b.value], [a.lane, a.lanes + b.lane])
    else:
        both = T.Shuffle([a.value, b.value], [0, 1])
    return v.bits_of(both, "int8", BYTES)
