"""Corrections against brute-force least squares."""

import numpy as np
import pytest

from qcompile.errors import CalibrationError
from qcompile.solvers import correct_bias, correct_weight


def inputs(seed=0, tokens=500, k=20):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) @ rng.standard_normal((k, k)) + rng.standard_normal(k)
    return x, x + 0.3 * rng.standard_normal((tokens, k)), rng.standard_normal((k, 6))


def test_corrected_weight_is_the_least_squares_fit_to_the_float_output():
    x, seen, weight = inputs()
    found = correct_weight(weight, seen.T @ seen / 500, seen.T @ x / 500, damping=1e-9)
    expected = np.linalg.lstsq(seen, x @ weight, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_damping_pulls_towards_the_weight():
    x, seen, weight = inputs()
    moments = seen.T @ seen / 500, seen.T @ x / 500
    moved = [np.abs(correct_weight(weight, *moments, damping=d) - weight).max() for d in (1e-6, 1e-1, 1e3)]
    assert moved[0] > moved[1] > 100 * moved[2]


def test_equal_inputs_need_no_correction():
    x, _, weight = inputs()
    moment = x.T @ x / 500
    np.testing.assert_allclose(correct_weight(weight, moment, moment), weight, atol=1e-6)
    np.testing.assert_array_equal(correct_weight(weight, np.zeros((20, 20)), np.zeros((20, 20))), weight.astype("f"))


def test_corrected_bias_removes_the_mean_error():
    x, seen, weight = inputs()
    bias, rounded = np.arange(6.0), np.round(weight)
    found = correct_bias(bias, weight, rounded, x.mean(0), seen.mean(0))
    np.testing.assert_allclose((seen @ rounded + found).mean(0), (x @ weight + bias).mean(0), atol=1e-4)
    same = correct_bias(bias, weight, rounded, x.mean(0))
    np.testing.assert_allclose((x @ rounded + same).mean(0), (x @ weight + bias).mean(0), atol=1e-4)


def test_wrong_moments_are_refused():
    _, _, weight = inputs()
    with pytest.raises(CalibrationError, match="cross moments"):
        correct_weight(weight, np.eye(20), np.eye(19))
    with pytest.raises(CalibrationError, match="cross moments"):
        correct_weight(weight, np.eye(20), np.full((20, 20), np.nan))
