"""Kernels for x86 processors with AVX2 or more: integer GEMM, weight-only GEMM, and the vector math they share."""

from qcompile.codegen.kernels.x86.floats import FloatGemm, FloatTableGemm
from qcompile.codegen.kernels.x86.lut import LutGemm
from qcompile.codegen.kernels.x86.maddubs import MaddubsGemm
from qcompile.codegen.kernels.x86.minifloats import MinifloatGemm
from qcompile.codegen.kernels.x86.pairs import PairGemm
from qcompile.codegen.kernels.x86.tables import ByteTableGemm, WordTableGemm
from qcompile.codegen.kernels.x86.vnni import VnniGemm
from qcompile.codegen.kernels.x86.wide import WideGemm

FAMILIES = (
    VnniGemm,
    MaddubsGemm,
    LutGemm,
    ByteTableGemm,
    WordTableGemm,
    PairGemm,
    WideGemm,
    FloatGemm,
    MinifloatGemm,
    FloatTableGemm,
)
"""Families of linear kernels, the one to prefer among equals first."""

__all__ = [
    "FAMILIES",
    "ByteTableGemm",
    "FloatGemm",
    "FloatTableGemm",
    "LutGemm",
    "MaddubsGemm",
    "MinifloatGemm",
    "PairGemm",
    "VnniGemm",
    "WideGemm",
    "WordTableGemm",
]
