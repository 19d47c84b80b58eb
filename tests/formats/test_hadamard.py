"""Hadamard matrices: entries +-1, orthogonal rows, every order that is promised."""

import numpy as np
import pytest

from qcompile.errors import FormatError
from qcompile.formats.hadamard import factors, hadamard_matrix, hadamard_signs, largest_block

KNOWN = [n for n in (1, 2, *range(4, 92, 4)) if n != 52]


@pytest.mark.parametrize("n", [*KNOWN, 128, 384, 512, 1408, 1536])
def test_rows_are_orthogonal(n):
    h = hadamard_signs(n).astype(int)
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))
    core, power = factors(n)
    assert core << power == n


@pytest.mark.parametrize("n", [0, -4, 3, 6, 7, 52, 92, 1000003])
def test_unknown_orders_are_refused(n):
    with pytest.raises(FormatError, match=str(n)):
        hadamard_matrix(n)


def test_the_largest_block_divides():
    assert [largest_block(n) for n in (1, 6, 384, 1408, 4096)] == [1, 2, 128, 128, 4096]
    assert largest_block(4096, most=128) == 128
