"""Number formats: what a stored code means, as plain numpy."""

from qcompile.formats.base import Format, FormatInfo, Grid, Quantized, list_formats, parse_format
from qcompile.formats.integer import ActivationFormat, IntFormat, parse_activation
from qcompile.formats.layout import BitLayout

__all__ = [
    "ActivationFormat",
    "BitLayout",
    "Format",
    "FormatInfo",
    "Grid",
    "IntFormat",
    "Quantized",
    "list_formats",
    "parse_activation",
    "parse_format",
]
