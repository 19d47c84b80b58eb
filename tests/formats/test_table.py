"""Embedding tables with one scale per row."""

import numpy as np
import pytest

from qcompile.errors import FormatError
from qcompile.formats import dequantize_rows, quantize_rows


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_quantized_independently(bits):
    table = np.random.default_rng(0).standard_normal((50, 33)).astype(np.float32) * np.geomspace(1e-3, 1e3, 50)[:, None]
    table[7] = 0
    quantized = quantize_rows(table, bits)
    assert quantized.codes.shape == (50, 33) and quantized.scale.shape == (50, 1)
    assert np.abs(quantized.codes.astype(int)).max() <= 1 << (bits - 1)
    decoded = dequantize_rows(quantized)
    error = np.square(decoded - table).sum(1) / np.maximum(np.square(table).sum(1), 1e-30)
    assert error.max() < {2: 0.25, 4: 0.03, 8: 1e-4}[bits]
    np.testing.assert_array_equal(decoded[7], 0)
    alone = quantize_rows(table[11:12], bits)
    np.testing.assert_array_equal(alone.codes[0], quantized.codes[11])


def test_bad_tables_are_refused():
    with pytest.raises(FormatError):
        quantize_rows(np.full((3, 4), np.nan))
    with pytest.raises(FormatError):
        quantize_rows(np.ones((3, 4)), bits=9)
