"""Bit layouts against a bit-by-bit definition of what they mean."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError
from qcompile.formats import BitLayout

LAYOUTS = [
    BitLayout(4, (-1, 2, 4), (-1, 8), "n0 k0 n1 k2 k1 b"),
    BitLayout(4, (-1, 2, 4), (-1, 8), "n0 k0 n1 k1 k2 b", pad_code=8),
    BitLayout(8, (-1, 4), (-1, 16), "n0 k0 n1 k1 b"),
    BitLayout(2, (-1, 4, 4), (-1, 8), "n0 k0 n1 k2 k1 b", pad_code=2),
    BitLayout(1, (-1, 8), (-1,), "n0 k0 b k1"),
    BitLayout(3, (-1, 8, 4), (-1, 2), "n0 k0 b n1 k2 k1"),
    BitLayout(2, (-1, 16), (-1,), "n0 b k0 k1"),  # 16 codes of a plane: two bytes of the fastest axis
    BitLayout(4, (-1, 2), (-1, 4), "k0 n0 n1 b k1"),  # bits between codes
    BitLayout(4, (-1, 4), (-1,), "k0 n0 b k1"),  # the bit axis itself is cut
    BitLayout(3, (-1, 8), (-1,), "n0 k0 k1 b"),  # codes straddle bytes
    BitLayout(5, (-1,), (-1, 8), "k0 n0 n1 b"),
]


def packed_bit_by_bit(layout: BitLayout, codes: np.ndarray) -> np.ndarray:
    k, n = codes.shape
    sizes = layout.factors(k, n)
    names = layout.order.split()
    bits = []
    for index in np.ndindex(*[sizes[a] for a in names]):
        at = dict(zip(names, index, strict=True))
        row = column = 0
        for i in range(len(layout.k)):
            row = row * sizes[f"k{i}"] + at[f"k{i}"]
        for i in range(len(layout.n)):
            column = column * sizes[f"n{i}"] + at[f"n{i}"]
        code = int(codes[row, column]) if row < k and column < n else layout.pad_code
        bits.append(code >> at["b"] & 1)
    return np.packbits(np.array(bits, np.uint8), bitorder="little")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.bits}-{layout.order}")
@settings(max_examples=12, deadline=None)
@given(k=st.integers(1, 37), n=st.integers(1, 19), seed=st.integers(0, 99))
def test_pack_matches_definition_and_unpack_inverts_it(layout, k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << layout.bits, (k, n)).astype(np.uint8)
    packed = layout.pack(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == layout.shape(k, n)
    np.testing.assert_array_equal(packed.ravel(), packed_bit_by_bit(layout, codes))
    np.testing.assert_array_equal(layout.unpack(packed, k, n), codes)


def test_only_the_low_bits_of_a_code_are_stored():
    layout = LAYOUTS[0]
    signed = np.array([[-1, 3], [-8, 7]], np.int8)
    np.testing.assert_array_equal(layout.unpack(layout.pack(signed), 2, 2), signed & 15)


def test_unpack_accepts_any_view_of_the_bytes():
    layout = LAYOUTS[0]
    codes = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
    np.testing.assert_array_equal(layout.unpack(layout.pack(codes).reshape(-1)[::1], 8, 8), codes)


@pytest.mark.parametrize(
    ("k", "n", "order", "message"),
    [((-1, 2), (-1,), "k0 n0 b", "must name each"), ((2, 2), (-1,), "k0 k1 n0 b", "leading factor")],
)
def test_malformed_layouts_are_refused(k, n, order, message):
    with pytest.raises(FormatError, match=message):
        BitLayout(4, k, n, order)


def test_layouts_that_do_not_fill_bytes_are_refused():
    with pytest.raises(FormatError, match="whole bytes"):
        BitLayout(4, (-1, 3), (-1,), "n0 k0 k1 b").shape(3, 1)
