"""Number formats: what a stored code means, as plain numpy. Importing the package registers every format."""

from qcompile.formats.base import (
    Format,
    FormatInfo,
    Grid,
    Quantized,
    check_weight,
    joined,
    list_formats,
    parse_format,
    register_format,
    separated,
)
from qcompile.formats.bitplane import BitPlane
from qcompile.formats.codebook import Codebook
from qcompile.formats.dual import DualInt4
from qcompile.formats.floats import Minifloat, NormalFloat
from qcompile.formats.integer import ActivationFormat, IntFormat, parse_activation
from qcompile.formats.layout import BitLayout
from qcompile.formats.microscaling import MxFloat, NvFp4
from qcompile.formats.powers import FixedPoint, PowerOfTwoSum
from qcompile.formats.superblock import SuperBlock
from qcompile.formats.table import dequantize_rows, quantize_rows
from qcompile.formats.ternary import Ternary

__all__ = [
    "ActivationFormat",
    "BitLayout",
    "BitPlane",
    "Codebook",
    "DualInt4",
    "FixedPoint",
    "Format",
    "FormatInfo",
    "Grid",
    "IntFormat",
    "Minifloat",
    "MxFloat",
    "NormalFloat",
    "NvFp4",
    "PowerOfTwoSum",
    "Quantized",
    "SuperBlock",
    "Ternary",
    "check_weight",
    "dequantize_rows",
    "joined",
    "list_formats",
    "parse_activation",
    "parse_format",
    "quantize_rows",
    "register_format",
    "separated",
]
