"""Adder graphs compute their matrix, within their levels, with fewer adders than digits; dataflow is numpy's arithmetic."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.verilog.adder_graph import alike_digits, constant_matrix, signed_digits
from qcompile.codegen.verilog.dataflow import Dataflow
from qcompile.errors import TargetError


@given(st.integers(-(2**20), 2**20))
def test_signed_digits_are_the_number_and_never_neighbours(number):
    digits = list(signed_digits(number))
    assert sum(sign << place if sign > 0 else -(1 << place) for place, sign in digits) == number
    places = [place for place, _ in digits]
    assert all(b - a > 1 for a, b in itertools.pairwise(places))


@given(st.integers(-(2**20), 2**20))
def test_digits_of_like_signs_are_the_number_and_no_more(number):
    digits = list(alike_digits(number))
    assert sum(sign << place if sign > 0 else -(1 << place) for place, sign in digits) == number
    assert len(digits) == len(list(signed_digits(number))) == len({place for place, _ in digits})


def evaluate(graph, x):
    """Every output of the graph on vectors ``(V, K)``, from its operations alone."""
    values = []
    for i, value in enumerate(graph.values):
        if i < graph.inputs:
            values.append(x[:, i])
        elif value.a is None:
            values.append(np.full(len(x), value.low))
        else:
            operands = [t for t in (value.a, value.b) if t is not None]
            values.append(sum(t.sign * (values[t.value] << t.shift) for t in operands))
        assert value.low <= values[-1].min() and values[-1].max() <= value.high
    return np.stack([0 * x[:, 0] if t is None else t.sign * (values[t.value] << t.shift) for t in graph.outputs], 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 14), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2), st.integers(0, 10**6)
)
def test_graphs_are_their_matrix_within_their_levels(k, n, bits, signed, more, seed):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-(1 << bits) + 1, 1 << bits, (k, n))
    weight[:, rng.integers(n)] *= rng.integers(0, 2)
    bias = rng.integers(-9, 9, n)
    low, high = (np.full(k, -8), np.full(k, 7)) if signed else (np.zeros(k, int), np.full(k, 15))
    terms = [sum(len(list(signed_digits(int(w)))) for w in column) + int(b != 0) for column, b in zip(weight.T, bias)]
    least = max(max(terms) - 1, 0).bit_length()
    graph = constant_matrix(weight, bias, low, high, least + more)
    x = np.concatenate([low[None], high[None], rng.integers(low, high + 1, (50, k))])
    np.testing.assert_array_equal(evaluate(graph, x), x @ weight + bias)
    assert all(t is None or t.sign > 0 for t in graph.outputs)
    assert graph.levels <= least + more + 1  # one more to negate a column without a positive digit
    assert graph.adders <= sum(terms) + n


def test_expressions_that_occur_twice_are_computed_once():
    weight = np.array([[1, 2, -4], [3, 6, -12], [1, 0, 0]])
    graph = constant_matrix(weight, np.zeros(3, int), np.full(3, -8), np.full(3, 7), 4)
    # 3 x1 once (4 x1 - x1), x0 + 3 x1 once, the first output one more; the last one is negated by copies.
    assert graph.adders <= 5


def test_too_few_levels_are_refused():
    with pytest.raises(TargetError, match="need 3 levels"):
        constant_matrix(np.ones((8, 1), int), np.zeros(1, int), np.zeros(8, int), np.ones(8, int), 2)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_words_are_used_no_earlier_than_they_are_made(every):
    rng = np.random.default_rng(0)
    graph = constant_matrix(rng.integers(-8, 8, (9, 5)), np.zeros(5, int), np.full(9, -8), np.full(9, 7))
    flow = Dataflow()
    inputs = [flow.input(-8, 7) for _ in range(9)]
    flow.outputs = [flow.clamped(flow.shifted(t, 2, exact=False), -8, 7) for t in flow.sums(graph, inputs)]
    stage, until = flow.stage_of(every)
    for j, word in enumerate(flow.words):
        for term in word.operands:
            assert stage[term.value] <= stage[j] <= until[term.value] <= flow.stages(every)
    levels = {}
    for j, word in enumerate(flow.words):  # no chain within a stage is longer than it may be
        own = word.kind not in ("input", "constant", "floor")
        inside = [levels[t.value] for t in word.operands if stage[t.value] == stage[j]]
        levels[j] = max(inside, default=0) + own
        assert levels[j] <= every
