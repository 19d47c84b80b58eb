"""Permissions intersect as sets of matrices do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.passes.spaces.groups import (
    CENTRED,
    FIXED,
    GL,
    ORTHOGONAL,
    PLANE,
    POSITIVE,
    SCALED_CENTRED,
    SCALED_ORTHOGONAL,
    BlockGroup,
    Limit,
    meet,
    ones_complement,
)

KINDS = [GL, SCALED_ORTHOGONAL, ORTHOGONAL, SCALED_CENTRED, CENTRED, POSITIVE, FIXED]


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 1000))
def test_an_element_of_the_meet_belongs_to_both(a, b, size, seed):
    element = BlockGroup(size, meet(a, b)).random(np.random.default_rng(seed))
    assert BlockGroup(size, a).contains(element)
    assert BlockGroup(size, b).contains(element)


@given(st.sampled_from([GL, PLANE, SCALED_ORTHOGONAL, ORTHOGONAL, POSITIVE, FIXED]), st.integers(0, 1000))
def test_plane_rotations_intersect_with_the_others(other, seed):
    element = BlockGroup(2, meet(PLANE, other)).random(np.random.default_rng(seed))
    assert BlockGroup(2, PLANE).contains(element) and BlockGroup(2, other).contains(element)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_dimension_is_that_of_the_tangent_space(kind, size):
    # The tangent space at 1 of {M : constraints}, by the rank of random infinitesimal elements.
    group = BlockGroup(size, kind)
    rows = []
    for seed in range(3 * size * size + 3):
        a, b = (group.random(np.random.default_rng(seed + 100 * i)) for i in range(2))
        rows.append((_log(a) if size == 1 else _tangent(kind, size, a, b)).reshape(-1))
    rank = np.linalg.matrix_rank(np.array(rows), tol=1e-8)
    assert rank == group.dimension


def _log(a):
    return np.log(np.abs(a))


def _tangent(kind, size, a, b):
    """A random element of the Lie algebra, written down independently of `BlockGroup`."""
    c = float(np.log(np.abs(np.linalg.det(a))) / size) * np.eye(size)
    if kind & Limit.SCALAR:
        return np.zeros((size, size)) if kind & Limit.RIGID else c
    if not kind & Limit.ORTHOGONAL:
        return a
    skew = a @ b - (a @ b).T
    if kind & Limit.FIX_ONES:
        basis = ones_complement(size)
        inner = basis.T @ (a @ b) @ basis
        skew = basis @ (inner - inner.T) @ basis.T
    return skew if kind & Limit.RIGID else skew + c


@pytest.mark.parametrize("size", [2, 3, 8])
def test_centred_elements_fix_the_ones_vector(size):
    q = BlockGroup(size, CENTRED).random(np.random.default_rng(0))
    assert np.allclose(q @ np.ones(size), 1) and np.allclose(q @ q.T, np.eye(size))


def test_names():
    assert str(BlockGroup(8, GL)) == "GL(8)" and str(BlockGroup(1, GL)) == "R*"
    assert str(BlockGroup(8, ORTHOGONAL)) == "O(8)" and str(BlockGroup(1, ORTHOGONAL)) == "±1"
    assert str(BlockGroup(2, PLANE)) == "SO(2)xR+" and str(BlockGroup(1, POSITIVE)) == "R+"
    assert str(BlockGroup(4, SCALED_CENTRED)) == "R+.O(4)|1"
