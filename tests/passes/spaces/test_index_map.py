"""Index maps follow structural operators exactly: the map of the result is the operator applied to the map."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.passes.spaces.index_map import IndexMap, concat, match_groups


def grid(*shape):
    return IndexMap(np.arange(int(np.prod(shape))).reshape(shape))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_transpose_is_numpy_transpose(shape, random):
    perm = list(range(len(shape)))
    random.shuffle(perm)
    m = grid(*shape)
    assert np.array_equal(m.transpose(perm).table, m.table.transpose(perm))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_heads_are_a_reshape_of_the_same_coordinates(heads, width, rest):
    m = grid(1, 1, heads * width)
    split = m.reshape(("batch", "seq", heads * width), ("batch", "seq", heads, width))
    assert split is not None and np.array_equal(split.flat, m.flat)
    back = split.reshape(("batch", "seq", heads, width), ("batch", "seq", heads * width))
    assert back is not None and np.array_equal(back.table, m.table)
    assert rest > 0


def test_static_positions_merged_with_channels_repeat_coordinates():
    m = IndexMap(np.arange(3).reshape(1, 3, 1, 1))
    flat = m.reshape(("batch", 3, 2, 2), ("batch", 12))
    assert flat is not None
    assert flat.flat.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_channels_merged_with_a_symbolic_axis_have_no_map():
    m = IndexMap(np.arange(4).reshape(1, 4, 1, 1))
    assert m.reshape(("batch", 4, "seq", 8), (None, "seq", 8)) is None


@pytest.mark.parametrize(
    "old, new, groups",
    [
        (("b", "s", 12), ("b", "s", 3, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (("b", 2, 3, 4), ("b", 6, 4), [([0], [0]), ([1, 2], [1]), ([3], [2])]),
        (("b", "s", 6), ("b*s", 6), [([0, 1], [0]), ([2], [1])]),
        ((2, 3, 4), (24,), [([0, 1, 2], [0])]),
        (("4*b", 4, 24), ("b", 2, 2, 2, 2, 24), [([0], [0, 1, 2]), ([1], [3, 4]), ([2], [5])]),
        (("b", 1, 6), ("b", 6), [([0], [0]), ([1, 2], [1])]),
    ],
)
def test_groups_of_a_reshape(old, new, groups):
    found = [(a, b) for a, b in match_groups(old, new) if a or b]
    assert found == groups


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_concatenation_is_a_direct_sum(widths):
    parts, start = [], 0
    for w in widths:
        parts.append(IndexMap(np.arange(start, start + w).reshape(1, w)))
        start += w
    assert concat(parts, -1).flat.tolist() == list(range(start))


def test_describe_recognises_ranges_strides_and_gathers():
    assert grid(8).describe() == "range(0, 8)"
    assert grid(2, 3).transpose((1, 0)).describe() == "(3, 2) from 0 strides (1, 3)"
    assert IndexMap(np.array([0, 2, 4])).describe() == "range(0, 6, 2)"
    assert IndexMap(np.array([0, 2, 1])).describe().startswith("gather")
