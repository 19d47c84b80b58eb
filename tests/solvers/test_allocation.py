"""Allocations against exhaustive search."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.solvers import Choice, allocate, equal_loss_bits


@settings(max_examples=40, deadline=None)
@given(matrices=st.integers(1, 5), formats=st.integers(1, 4), seed=st.integers(0, 999), share=st.floats(0, 1))
def test_no_allocation_within_the_budget_is_better(matrices, formats, seed, share):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-9, 9)
    candidates = {
        f"m{i}": {f"f{j}": Choice(scale * rng.random(), float(rng.integers(1, 10**6))) for j in range(formats)}
        for i in range(matrices)
    }
    all_bits = [[c.bits for c in choices.values()] for choices in candidates.values()]
    low, high = sum(map(min, all_bits)), sum(map(max, all_bits))
    budget = low + share * (high - low)
    found = allocate(candidates, budget)
    assert set(found.formats) == set(candidates)
    picked = [candidates[name][spelling] for name, spelling in found.formats.items()]
    assert found.bits == pytest.approx(sum(c.bits for c in picked))
    assert found.bits <= budget * (1 + 1e-6)
    affordable = [
        sum(c.loss for c in combination)
        for combination in product(*[choices.values() for choices in candidates.values()])
        if sum(c.bits for c in combination) <= budget
    ]
    assert found.loss <= min(affordable) * (1 + 1e-6)


def test_sensitive_matrices_get_the_bits():
    choices = {"int4": 1.0, "int8": 0.01}
    candidates = {
        name: {fmt: Choice(factor * loss, 100 * int(fmt[3:])) for fmt, loss in choices.items()}
        for name, factor in [("robust", 1), ("fragile", 50), ("middling", 5)]
    }
    assert allocate(candidates, 2000).formats == {"robust": "int4", "fragile": "int8", "middling": "int8"}
    assert allocate(candidates, 1600).formats == {"robust": "int4", "fragile": "int8", "middling": "int4"}


def test_impossible_requests_are_refused():
    with pytest.raises(RecipeError, match="smallest formats take 8"):
        allocate({"w": {"int8": Choice(1, 8)}}, 7)
    with pytest.raises(RecipeError, match="w: no format"):
        allocate({"w": {}}, 7)
    with pytest.raises(RecipeError, match="w: int8 has loss nan"):
        allocate({"w": {"int8": Choice(float("nan"), 8)}}, 9)
    assert allocate({}, 0).formats == {}


def test_equal_loss_bits_equalise_the_loss_within_the_mean():
    rng = np.random.default_rng(0)
    sensitivity, sizes = np.exp(rng.standard_normal(20)), rng.integers(1, 9, 20)
    bits = equal_loss_bits(sensitivity, sizes, 4, 0, 16)
    assert np.average(bits, weights=sizes) == pytest.approx(4)
    np.testing.assert_allclose(sensitivity * 4.0**-bits, (sensitivity * 4.0**-bits)[0])
    clipped = equal_loss_bits(sensitivity, sizes, 4, 3.8, 4.1)
    assert clipped.min() >= 3.8 and clipped.max() <= 4.1
    assert np.average(clipped, weights=sizes) == pytest.approx(4)


def test_equal_loss_bits_refuse_nonsense():
    with pytest.raises(RecipeError):
        equal_loss_bits(np.array([1.0, 0.0]), np.ones(2), 4, 2, 8)
    with pytest.raises(RecipeError):
        equal_loss_bits(np.ones(2), np.ones(2), 9, 2, 8)
