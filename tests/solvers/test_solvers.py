"""Solvers on weights and correlated inputs drawn at random; the reference for a loss is its definition."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import CalibrationError, FormatError, RecipeError
from qcompile.formats import IntFormat, list_formats, parse_format
from qcompile.solvers import Gptq, QuantEase, get_solver, list_solvers, output_error
from qcompile.solvers.gptq import grouped_order, inverse_factor
from qcompile.solvers.quantease import descend, refit_scales

SOLVERS = ["rtn", "mse", "gptq", "quantease"]


def problem(k=96, n=24, tokens=400, seed=0):
    """A weight and the Hessian of inputs with a decaying spectrum and channels of unequal power."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * (np.arange(1, k + 1) ** -0.7)[:, None]
    x = rng.standard_normal((tokens, k)) @ mix * np.exp(0.5 * rng.standard_normal(k))
    return rng.standard_normal((k, n)).astype(np.float32), x.T @ x / tokens, x


def loss(solver, spelling, weight, hessian, **options):
    fmt = parse_format(spelling)
    return output_error(weight, fmt.decode(get_solver(solver, **options).solve(weight, fmt, hessian=hessian)), hessian)


def test_output_error_is_the_squared_output_error_per_token():
    weight, hessian, x = problem()
    other = np.round(weight, 1)
    expected = np.square(x @ weight - x @ other).sum() / len(x)
    assert output_error(weight, other, hessian) == pytest.approx(expected)
    assert output_error(weight, other) == pytest.approx(np.square(weight - other).sum())


@pytest.mark.parametrize(
    "spelling", ["int4/g32", "int4", "int3/g32/asym", "int2/g16", "nf4/g32", "bitplane2/g32", "mxfp4"]
)
def test_each_solver_beats_the_one_before(spelling):
    weight, hessian, _ = problem()
    rtn, mse, gptq, quantease = (loss(name, spelling, weight, hessian) for name in SOLVERS)
    assert mse < rtn
    assert gptq < 0.6 * mse
    assert quantease < gptq


@pytest.mark.parametrize("info", list_formats(), ids=lambda info: info.spelling)
def test_gptq_works_for_every_format(info):
    weight, hessian, _ = problem(k=70, n=5)
    fmt = info.example
    found = Gptq().solve(weight, fmt, hessian=hessian)
    assert found.codes.shape == weight.shape and found.codes.dtype == fmt.encode(weight).codes.dtype
    better = output_error(weight, fmt.decode(found), hessian)
    assert better < output_error(weight, fmt.decode(fmt.encode(weight)), hessian)
    refined = output_error(weight, fmt.decode(QuantEase(sweeps=2).solve(weight, fmt, hessian=hessian)), hessian)
    assert refined <= 1.001 * better


@pytest.mark.parametrize("solver", ["gptq", "quantease"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spelling", ["int4/g16", "int3/asym", "nf4/g16"])
def test_uncorrelated_inputs_need_no_compensation(solver, act_order, spelling):
    """With the identity as Hessian the best grid and plain rounding are optimal, and found."""
    weight, _, _ = problem(k=48, n=7)
    fmt = parse_format(spelling)
    found = (
        get_solver(solver, act_order=act_order, rescale=False) if solver == "quantease" else Gptq(act_order=act_order)
    )
    expected = get_solver("mse").solve(weight, fmt)
    np.testing.assert_array_equal(fmt.decode(found.solve(weight, fmt, hessian=np.eye(48))), fmt.decode(expected))


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_data_every_solver_works(solver):
    weight, _, _ = problem()
    fmt = IntFormat(4, 32)
    best = fmt.decode(get_solver("mse").solve(weight, fmt))
    found = fmt.decode(get_solver(solver).solve(weight, fmt))
    np.testing.assert_array_equal(found, fmt.decode(fmt.encode(weight)) if solver == "rtn" else best)


def test_order_of_channels_does_not_matter_with_act_order():
    weight, hessian, _ = problem(k=40)
    shuffle = np.random.default_rng(1).permutation(40)
    fmt = IntFormat(4)
    plain = Gptq().solve(weight, fmt, hessian=hessian)
    shuffled = Gptq().solve(weight[shuffle], fmt, hessian=hessian[np.ix_(shuffle, shuffle)])
    np.testing.assert_allclose(shuffled.scale, plain.scale, rtol=1e-5)
    assert (shuffled.codes == plain.codes[shuffle]).mean() > 0.999


@pytest.mark.parametrize("refit", [False, True])
def test_act_order_helps_when_channels_differ(refit):
    weight, hessian, _ = problem(k=128, seed=3)
    gain = np.exp(1.5 * np.random.default_rng(4).standard_normal(128))
    hessian = hessian * gain[:, None] * gain
    ordered, natural = (
        loss("gptq", "int3/g16", weight, hessian, act_order=order, refit=refit) for order in (True, False)
    )
    assert ordered < natural


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_size_changes_speed_only(block):
    weight, hessian, _ = problem(k=50)
    fmt = IntFormat(4, 16)
    expected = Gptq(block=50).solve(weight, fmt, hessian=hessian)
    assert (Gptq(block=block).solve(weight, fmt, hessian=hessian).codes == expected.codes).mean() > 0.99


@pytest.mark.parametrize("solver", ["gptq", "quantease"])
@settings(max_examples=10, deadline=None)
@given(
    k=st.integers(1, 40), n=st.integers(1, 5), rank=st.integers(0, 50), dead=st.integers(0, 40), seed=st.integers(0, 99)
)
def test_degenerate_hessians(solver, k, n, rank, dead, seed):
    """Fewer tokens than channels, channels that never fire, no signal at all."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rank, k)) if rank else np.zeros((1, k))
    x[:, rng.permutation(k)[:dead]] = 0
    hessian = x.T @ x / len(x)
    weight = rng.standard_normal((k, n)).astype(np.float32)
    fmt = IntFormat(4, 16)
    decoded = fmt.decode(get_solver(solver).solve(weight, fmt, hessian=hessian))
    assert np.isfinite(decoded).all()
    assert (
        output_error(weight, decoded, hessian)
        <= 1.5 * output_error(weight, fmt.decode(fmt.encode(weight)), hessian) + 1e-6
    )


@pytest.mark.parametrize("solver", ["gptq", "quantease"])
def test_channels_that_never_fire_are_rounded_not_dropped(solver):
    weight, hessian, _ = problem(k=64)
    hessian[:, 10] = hessian[10] = 0
    fmt = IntFormat(8, 16)
    decoded = fmt.decode(get_solver(solver).solve(weight, fmt, hessian=hessian))
    np.testing.assert_allclose(decoded[10], weight[10], atol=0.05)


def test_solving_twice_gives_the_same_codes():
    weight, hessian, _ = problem()
    for name in SOLVERS:
        first, second = (get_solver(name).solve(weight, IntFormat(3, 32), hessian=hessian) for _ in range(2))
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first.scale, second.scale)


def test_arguments_are_not_modified():
    weight, hessian, _ = problem()
    kept = weight.copy(), hessian.copy()
    for name in SOLVERS:
        get_solver(name).solve(weight, IntFormat(4, 32, symmetric=False), hessian=hessian)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(hessian, kept[1])


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, hessian, _ = problem(k=30)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(30)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped), rtol=1e-8, atol=1e-10)


def test_grouped_order_keeps_groups_together():
    power = np.array([1.0, 5, 9, 2, 3, 8, 7])
    np.testing.assert_array_equal(grouped_order(power, 3), [6, 2, 1, 0, 5, 4, 3])


def test_coordinate_descent_never_raises_the_loss_and_ends_in_an_optimum():
    weight, hessian, _ = problem()
    hessian = (hessian + 0.01 * np.eye(96)).astype(np.float32)
    fmt = IntFormat(3, 32)
    state = fmt.encode(weight)
    losses = [output_error(weight, fmt.decode(state), hessian)]
    for _ in range(60):
        state, changed = descend(weight, fmt, state, hessian, block=17)
        losses.append(output_error(weight, fmt.decode(state), hessian))
        if not changed:
            break
    assert not changed
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    # No single code can be moved by one for the better.
    rng = np.random.default_rng(0)
    for row, column, step in zip(
        rng.integers(0, 96, 50), rng.integers(0, 24, 50), rng.choice([-1, 1], 50), strict=True
    ):
        codes = state.codes.copy()
        codes[row, column] = np.clip(codes[row, column] + step, fmt.qmin, fmt.qmax)
        moved = output_error(weight, fmt.decode(state.grid.with_codes(codes)), hessian)
        assert moved >= losses[-1] * (1 - 1e-5)


@pytest.mark.parametrize("spelling", ["int3/g32", "int3", "int4/g32/asym", "bitplane2/g32"])
def test_refitted_scales_are_the_least_squares_solution(spelling):
    weight, hessian, _ = problem(n=3)
    fmt = parse_format(spelling)
    start = fmt.encode(weight)
    found = refit_scales(weight, fmt, start, hessian.astype(np.float32))
    values = fmt.decode(start)
    owner = np.arange(96) // fmt.group_length(96)
    for column in range(3):
        basis = np.stack([np.where(owner == g, values[:, column], 0) for g in range(fmt.groups(96))], axis=1)
        best = np.linalg.solve(basis.T @ hessian @ basis, basis.T @ hessian @ weight[:, column])
        least = output_error(weight[:, column], basis @ best, hessian)
        assert output_error(weight[:, column], fmt.decode(found)[:, column], hessian) == pytest.approx(least, rel=2e-3)


def test_progress_reaches_one_and_never_falls():
    weight, hessian, _ = problem(k=300)
    for name in SOLVERS:
        seen = []
        get_solver(name).solve(weight, IntFormat(4, 32), hessian=hessian, progress=seen.append)
        assert seen[-1] == 1 and all(a <= b for a, b in pairwise(seen))


def test_the_registry_explains_mistakes():
    assert {*SOLVERS} <= {*list_solvers()}
    assert get_solver("gptq", damping=0.05) == Gptq(damping=0.05)
    with pytest.raises(RecipeError, match="unknown solver 'gtpq'; known: gptq, mse, quantease, rtn"):
        get_solver("gtpq")
    with pytest.raises(RecipeError, match="no option 'dampening'; its options: act_order, block, damping"):
        get_solver("gptq", dampening=0.1)
    for name, options in [("gptq", {"damping": 0}), ("gptq", {"block": 0}), ("quantease", {"sweeps": -1})]:
        with pytest.raises(RecipeError):
            get_solver(name, **options)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.eye(5), r"is \(96, 96\), got \(5, 5\)"),
        (np.full((96, 96), np.nan), "NaN or infinity"),
        (-np.eye(96), "negative diagonal"),
        (1e3 - 2e3 * np.eye(96) + np.diag(np.full(96, 1e3)), "positive semi-definite"),
    ],
)
def test_impossible_hessians_are_refused(hessian, message):
    weight, _, _ = problem()
    with pytest.raises(CalibrationError, match=message):
        Gptq().solve(weight, IntFormat(4), hessian=hessian)


def test_nan_weights_are_refused():
    weight, hessian, _ = problem()
    weight[3, 4] = np.nan
    with pytest.raises(FormatError, match=r"weight\[3, 4\]"):
        Gptq().solve(weight, IntFormat(4), hessian=hessian)
