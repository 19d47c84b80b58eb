"""GEMM in floats on ARM: codes are widened to float32, looked up by TBL, or converted from float16, and multiplied by FMLA."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.arm.products import BYTES
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import float_tables, floats, minifloats
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.codegen.kernels.cpu.levels import ENTRIES
from qcompile.codegen.kernels.cpu.lut import group_scales
from qcompile.codegen.kernels.cpu.panels import Panels, integer_format
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


class FloatTableGemm(float_tables.FloatTableGemm, FloatGemm):
    """FMLA with weights looked up in a table of floats, whose 64 bytes fill four registers."""

    name = "arm-table-float"

    def integers(self, fmt: Format) -> IntFormat | None:
        return float_tables.FloatTableGemm.integers(self, fmt)

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> float_tables.LevelPanels:
        return float_tables.FloatTableGemm.panels(self, problem, config)

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if problem.weight.bits > 4:  # many rows share a long look-up
            return [(8, 2), (12, 1), (4, 4)]
        return [(4, 3), (6, 2), (2, 4)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate, unpack + (12.0 if problem.weight.bits > 4 else 6.0)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        if e.problem.weight.bits > 4:
            return
        at = range(0, ENTRIES, 4)
        e.extra["table"] = [v.let(v.bits_of(v.load(e.names["table"], [i], 4), "uint8", BYTES)) for i in at]

    def level(self, e: Emission, codes: Any) -> Any:
        lanes = e.panels.lanes
        first = codes * v.const(0x04040404, lanes, "int32") + v.const(0x03020100, lanes, "int32")
        index = v.let(v.bits_of(first, "uint8", BYTES))
        found = T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.tbl4", *e.extra["table"], index)
        return v.bits_of(found, "float32", lanes)


class MinifloatGemm(minifloats.MinifloatGemm):
    """FCVTL and FMLA; float or int8 activations."""

    name = "arm-minifloat"
    kind = "arm"

    def lanes(self, target: Target) -> int:
        return 4

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(6, 2), (4, 2), (8, 1)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        return 6.0, 4.0 + (bits if 8 % bits else 0.0)
