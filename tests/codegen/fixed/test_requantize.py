"""Requantization: half to even, thresholds, exact ranges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.fixed.rounding import with_rounding
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType, Requantize, shift_half_even


@given(st.integers(-(2**40), 2**40), st.integers(1, 20))
def test_shifts_round_half_to_even(product, shift):
    from fractions import Fraction

    assert int(shift_half_even(np.array([product]), shift)[0]) == round(Fraction(product, 2**shift))


@given(st.integers(-(2**30), 2**30), st.integers(0, 2**30))
def test_the_covering_type_is_the_narrowest(low, more):
    kind = IntType.covering(low, low + more)
    assert kind.low <= low and low + more <= kind.high
    if kind.bits > 1:
        smaller = IntType(kind.bits - 1, kind.signed)
        assert low < smaller.low or low + more > smaller.high


@given(st.floats(1e-4, 0.9), st.integers(1, 4))
def test_thresholds_are_the_same_function(scale, bits):
    step = Requantize.from_scale(np.array([scale]), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    accumulator = np.arange(-3000, 3001)[:, None]
    thresholds = step.thresholds(np.array([-3000]), np.array([3000]))
    counted = step.low + (accumulator[:, None] >= thresholds).sum(1)
    np.testing.assert_array_equal(counted, step.apply(accumulator))


@given(st.lists(st.floats(0.1, 1.5), min_size=1, max_size=5))
def test_multipliers_err_by_less_than_a_64th_of_a_step(scales):
    scale = np.array(scales)
    step = Requantize.from_scale(scale, -128, 127)
    reach = np.floor(128 / scale)
    assert (np.abs(step.multiplier / 2.0**step.shift - scale) * reach).max() <= 2**-6 * 1.01


@given(st.lists(st.integers(-500, 500), min_size=1), st.integers(0, 6))
def test_other_roundings_are_half_to_even_with_a_bit_more(accumulators, shift):
    p = np.array(accumulators)[:, None]
    weight, bias, step = (
        np.ones((1, 1), np.int64),
        np.zeros(1, np.int64),
        Requantize(np.ones(1, np.int64), shift, -999, 999),
    )
    expected = {
        "half-even": np.rint(p / 2**shift),
        "half-up": np.floor(p / 2**shift + 0.5),
        "floor": np.floor(p / 2**shift),
        "ceil": np.ceil(p / 2**shift),
    }
    for mode, wanted in expected.items():
        w, b, s = with_rounding(weight, bias, step, mode)
        np.testing.assert_array_equal(s.apply(p @ w + b), wanted, mode)


def test_products_that_do_not_fit_are_refused():
    step = Requantize(np.array([1 << 17]), 20, -128, 127)
    with pytest.raises(FormatError, match="bits"):
        step.bounds(np.array([-(2**50)]), np.array([2**50]))
