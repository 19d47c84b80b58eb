"""Null spaces against numpy's singular values and against enumeration."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompile.passes.spaces.linear import null_space, null_space_mod2

rows = st.lists(st.dictionaries(st.integers(0, 5), st.integers(-2, 2).map(float), max_size=4), max_size=6)


@given(rows)
def test_null_space_has_the_right_dimension_and_solves(system):
    basis = null_space(system, 6)
    dense = np.zeros((len(system), 6))
    for i, row in enumerate(system):
        for j, a in row.items():
            dense[i, j] = a
    assert np.allclose(dense @ basis, 0)
    assert basis.shape[1] == 6 - (np.linalg.matrix_rank(dense) if system else 0)
    assert np.linalg.matrix_rank(basis) == basis.shape[1]


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5))
def test_signs_solve_modulo_two(system):
    basis = null_space_mod2(system, 5)
    span = {tuple(basis @ np.array(c) % 2) for c in itertools.product((0, 1), repeat=basis.shape[1])}
    solutions = {
        v for v in itertools.product((0, 1), repeat=5) if all(sum(v[j] for j in row) % 2 == 0 for row in system)
    }
    assert span == solutions
