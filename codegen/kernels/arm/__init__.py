"""Kernels for 64-bit ARM processors: integer GEMM on SDOT or 16-bit multiply-adds, look-up tables, bit planes,
tables of levels, small floats, and weight-only GEMM."""

from qcompile.codegen.kernels.arm.floats import FloatGemm, FloatTableGemm, MinifloatGemm
from qcompile.codegen.kernels.arm.integers import DotGemm, NeonGemm
from qcompile.codegen.kernels.arm.lut import TableLookupGemm
from qcompile.codegen.kernels.arm.mmla import MmlaGemm
from qcompile.codegen.kernels.arm.planes import PlaneDotGemm, PlaneNeonGemm
from qcompile.codegen.kernels.arm.tables import ByteTableGemm, NeonByteTableGemm, NeonWordTableGemm, WordTableGemm

FAMILIES = (
    MmlaGemm,
    DotGemm,
    NeonGemm,
    TableLookupGemm,
    PlaneDotGemm,
    PlaneNeonGemm,
    ByteTableGemm,
    WordTableGemm,
    NeonByteTableGemm,
    NeonWordTableGemm,
    FloatGemm,
    MinifloatGemm,
    FloatTableGemm,
)
"""Families of linear kernels, the one to prefer among equals first."""

__all__ = [
    "FAMILIES",
    "ByteTableGemm",
    "DotGemm",
    "FloatGemm",
    "FloatTableGemm",
    "MinifloatGemm",
    "MmlaGemm",
    "NeonByteTableGemm",
    "NeonGemm",
    "NeonWordTableGemm",
    "PlaneDotGemm",
    "PlaneNeonGemm",
    "TableLookupGemm",
    "WordTableGemm",
]
