"""GEMM of small floats on x86: ``vcvtph2ps`` and FMA."""

from __future__ import annotations

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import minifloats
from qcompile.codegen.kernels.cpu.refusals import no_avx2
from qcompile.codegen.kernels.cpu.vector import lanes_of
from qcompile.targets.target import Target


class MinifloatGemm(minifloats.MinifloatGemm):
    """FMA on 256- or 512-bit registers."""

    name = "x86-minifloat"
    streams = (2, 4, 1)

    def lanes(self, target: Target) -> int:
        return lanes_of(target)

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        return no_avx2(self.name, target)

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(10, 1), (6, 2), (4, 2)] if target.has("avx512") else [(6, 1), (5, 1), (4, 1), (2, 2)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        return 13.0, 6.0 + (bits if 8 % bits else 0.0)
