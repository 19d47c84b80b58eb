"""Embedding tables: integers with one scale per row, so that a gathered row needs one scale.

    t[v, :] ~ s[v] * q[v, :]

A table is ``(V, D)``, one row per token. In terms of `IntFormat`, whose scales belong to columns, it is transposed.
"""

from __future__ import annotations

import numpy as np

from qcompile.formats.base import Quantized, check_weight
from qcompile.formats.integer import IntFormat


def quantize_rows(table: np.ndarray, bits: int = 8) -> Quantized:
    """Quantize a table ``(V, D)`` symmetrically, each row with the scale of the least squared error.

    Returns:
        int8 codes ``(V, D)`` and float32 scales ``(V, 1)``.

    Raises:
        FormatError: the table is not a matrix of finite floats, or there is no integer format of ``bits`` bits.
    """
    fmt = IntFormat(bits)
    table = check_weight(table, fmt)
    columns = table.T
    quantized = fmt.quantize(columns, fmt.fit_grid(columns))
    return Quantized(np.ascontiguousarray(quantized.codes.T), np.ascontiguousarray(quantized.scale.T))


def dequantize_rows(quantized: Quantized) -> np.ndarray:
    """Return the float32 table ``(V, D)`` that the codes stand for."""
    return quantized.codes.astype(np.float32) * quantized.scale
