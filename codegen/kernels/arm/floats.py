"""Weight-only GEMM on ARM: codes are widened to float32 and multiplied by FMLA."""

from __future__ import annotations

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import floats
from qcompile.targets.target import Target


class FloatGemm(floats.FloatGemm):
    """FMLA on 128-bit registers."""

    name = "arm-float"
    kind = "arm"

    def lanes(self, target: Target) -> int:
        return 4

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if problem.activation.bits:
            return f"{self.name} multiplies float activations; this operator has {problem.activation} ones"
        return ""

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(4, 4), (6, 3), (8, 2)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        return 6.0, 4.0 + bits if 8 % bits else 4.0
