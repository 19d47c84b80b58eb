"""Kernels for 64-bit ARM processors: integer GEMM on SDOT or 16-bit multiply-adds, look-up tables, bit planes,
and weight-only GEMM."""

from qcompile.codegen.kernels.arm.floats import FloatGemm
from qcompile.codegen.kernels.arm.gemm import DotGemm, NeonGemm
from qcompile.codegen.kernels.arm.lut import TableLookupGemm
from qcompile.codegen.kernels.arm.mmla import MmlaGemm
from qcompile.codegen.kernels.arm.planes import PlaneDotGemm, PlaneNeonGemm

FAMILIES = (MmlaGemm, DotGemm, NeonGemm, TableLookupGemm, PlaneDotGemm, PlaneNeonGemm, FloatGemm)
"""Families of linear kernels, the one to prefer among equals first."""

__all__ = [
    "FAMILIES",
    "DotGemm",
    "FloatGemm",
    "MmlaGemm",
    "NeonGemm",
    "PlaneDotGemm",
    "PlaneNeonGemm",
    "TableLookupGemm",
]
