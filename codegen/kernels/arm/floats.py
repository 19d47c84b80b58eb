"""Weight-only GEMM on ARM: codes are widened to float32 and multiplied by FMLA."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.codegen.kernels.arm.gemm import integer_format
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import floats
from qcompile.codegen.kernels.cpu.lut import group_scales
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target


class FloatGemm(floats.FloatGemm):
    """FMLA on 128-bit registers."""

    name = "arm-float"
    kind = "arm"

    def lanes(self, target: Target) -> int:
        return 4

    def integers(self, fmt: Format) -> IntFormat | None:
        return integer_format(fmt)

    def levels(
        self, problem: LinearProblem, config: dict[str, Any], weight: Quantized
    ) -> tuple[np.ndarray, np.ndarray]:
        stored, column = group_scales(problem.weight, weight, config["scales"])
        return stored[0], column

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return Panels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], twos_complement=fmt.symmetric)

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if problem.activation.bits:
            return f"{self.name} multiplies float activations; this operator has {problem.activation} ones"
        return ""

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(4, 4), (6, 3), (8, 2)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        return 6.0, 4.0 + bits if 8 % bits else 4.0
