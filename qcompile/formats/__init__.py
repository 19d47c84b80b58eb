"""Number formats: what a stored code means, as plain numpy."""

from qcompile.formats.base import Format, Quantized, parse_format
from qcompile.formats.integer import ActivationFormat, IntFormat, parse_activation
from qcompile.formats.layout import BitLayout

__all__ = ["ActivationFormat", "BitLayout", "Format", "IntFormat", "Quantized", "parse_activation", "parse_format"]
