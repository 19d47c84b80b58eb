"""Stacks of matrices from which an index picks one at run time: the experts of a mixture.

A weight ``(experts, n, k)`` indexed by a router gives every position the matrix of its own expert, so the hidden
channels of each expert have a basis of their own. An index map cannot say which: the activation behind the weight has
the coordinates of expert 0 on it, and stands for all of them. What is stated about these coordinates is stated about
every copy,

    coordinate(e, j) = coordinate(0, j) + e * stride,      A_a(e) = A_b(e) for every e    from    same(a, b)

and what joins them with coordinates outside of the stack (the residual stream) ties the copies by itself.

This is right only where both sides of a fact belong to the same expert. A *choice* says along which axes of a value
which integers choose; operators that keep those axes in their places keep it, two operands must agree in it, and
whatever else meets such a value (a sum over positions, a norm with an epsilon of its own) ties the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, constant
from qcompile.passes.spaces.index_map import Dim, match_groups


class Stacks:
    """All stacks of a model: coordinates ``start .. start + height * stride - 1``, one row for every matrix.

    Attributes:
        start, stride, height: by stack, in ascending order of ``start``.
        tied: by stack ``(stride,)``, whether all matrices share this basis direction.
    """

    def __init__(self) -> None:
        self.start, self.stride, self.height = (np.zeros(0, np.int64) for _ in range(3))
        self.tied: list[np.ndarray] = []

    def add(self, table: np.ndarray) -> None:
        """Make a stack of consecutive coordinates ``(height, ...)``; nothing happens if they are one."""
        start, height = int(table.flat[0]), len(table)
        if height == 1 or start in self.start:
            return
        stride, place = table.size // height, int(np.searchsorted(self.start, start))
        self.start = np.insert(self.start, place, start)
        self.stride, self.height = np.insert(self.stride, place, stride), np.insert(self.height, place, height)
        self.tied.insert(place, np.zeros(stride, bool))

    def of(self, coordinates: np.ndarray) -> np.ndarray:
        """The stack for all of whose matrices each of the flat ``coordinates`` stands; -1 if for none."""
        if not self.tied:
            return np.full(len(coordinates), -1)
        found = np.searchsorted(self.start, coordinates, side="right") - 1
        place = coordinates - self.start[found]
        found[(found >= 0) & (place >= self.stride[found])] = -1
        for number in np.unique(found[found >= 0]):
            mine = np.flatnonzero(found == number)
            found[mine[self.tied[number][place[mine]]]] = -1
        return found

    def heights(self, *arrays: np.ndarray) -> set[int]:
        """Of all stacks that flat coordinates stand for."""
        if not self.tied:
            return set()
        return {int(self.height[i]) for a in arrays for i in np.unique(self.of(a)) if i >= 0}

    def each(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Flat, aligned coordinates for every matrix, one after the other; all their stacks have one height."""
        heights = self.heights(*arrays)
        if not heights:
            return arrays
        rows = np.arange(heights.pop())[:, None]
        stacks = [self.of(a) for a in arrays]
        return tuple((a + rows * np.where(s >= 0, self.stride[s], 0)).reshape(-1) for a, s in zip(arrays, stacks))

    def tie(self, coordinates: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """From now on ``coordinates`` stand for themselves alone; returns the pairs that have to be the same."""
        pairs, stacks = [], self.of(coordinates)
        for i in np.unique(stacks[stacks >= 0]):
            mine = np.unique(coordinates[stacks == i])
            copies = mine + np.arange(1, self.height[i])[:, None] * self.stride[i]
            pairs.append((np.broadcast_to(mine, copies.shape).reshape(-1), copies.reshape(-1)))
            self.tied[i][mine - self.start[i]] = True
        return pairs


@dataclass(frozen=True)
class Choice:
    """Who chooses the matrix of a stack at every position of a value.

    Attributes:
        index: the integers, where they are computed.
        axes: axes of the value that belong to the axes of ``index``, counted from the last (-1).
    """

    index: ir.Value
    axes: tuple[int, ...]


def choice_of(index: ir.Value, positions: Sequence[Dim], behind: int) -> Choice:
    """The choice of what an index picks: axes of sizes ``positions`` come first, ``behind`` axes of a matrix follow.

    ``index`` is traced back to its source through operators that only add or drop axes of length 1, so that two
    gathers by the same integers agree.
    """
    varying = [a for a, d in enumerate(positions) if d != 1]
    while (node := index.producer()) is not None and node.op_type in ("Unsqueeze", "Squeeze", "Cast", "Identity"):
        source = node.inputs[0]
        assert source is not None
        index = source
    return Choice(index, tuple(a - len(positions) - behind for a in varying))


def summed_axes(value: ir.Value) -> set[int]:
    """Axes, counted from the last, along which matrix products sum over ``value``."""
    found = set()
    for use in value.uses():
        if use.node.op_type == "MatMul":
            found.add(-1 if use.idx == 0 else -2)
        elif use.node.op_type == "Transpose" and value.shape is not None:
            rank = len(value.shape)
            order = list(attribute(use.node, "perm") or range(rank)[::-1])  # type: ignore[call-overload]
            found |= {order[a] - rank for a in summed_axes(use.node.outputs[0])}
    return found


def follow(node: ir.Node, choices: Mapping[int, Choice], pointwise: bool) -> Choice | None:
    """The choice of a node's results, given those of some of its inputs; None where a choice cannot be followed."""
    first = next(iter(choices.values()))
    if any(c != first for c in choices.values()):
        return None
    if pointwise:
        return first
    if node.op_type == "MatMul":
        # Positions of the left operand stay, those of the right become columns; batch axes stay on both.
        ranks = [len(_sizes(v) or ()) for v in node.inputs if v is not None]
        last = -3 if 1 in choices else -2
        return first if min(ranks) >= 2 and all(a <= last for a in first.axes) else None
    move = _movement(node)
    return None if move is None else _moved(node, first, move)


def _moved(node: ir.Node, choice: Choice, move: Callable[[int], int | None]) -> Choice | None:
    old, new = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if old is None or new is None:
        return None
    axes = [move(a + len(old)) for a in choice.axes]
    return None if None in axes else Choice(choice.index, tuple(a - len(new) for a in axes if a is not None))


def _movement(node: ir.Node) -> Callable[[int], int | None] | None:
    """Where an operator that moves data puts each axis of its first input; None if the axis does not stay whole."""
    old, new = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if old is None or new is None:
        return None
    if node.op_type == "Reshape":
        whole = {left[0]: right[0] for left, right in match_groups(old, new) if len(left) == len(right) == 1}
        return whole.get
    if node.op_type == "Transpose":
        order = list(attribute(node, "perm") or range(len(old))[::-1])  # type: ignore[call-overload]
        return order.index
    if node.op_type in ("Squeeze", "Unsqueeze"):
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if given is None:
            return None
        rank = max(len(old), len(new))
        special = {int(a) % rank for a in given.reshape(-1)}
        kept = [a for a in range(rank) if a not in special]
        if node.op_type == "Squeeze":
            return lambda axis: kept.index(axis) if axis in kept else None
        return kept.__getitem__
    if node.op_type in ("Split", "Slice", "Gather") and len(old) == len(new):
        cut = {a for a in range(len(old)) if old[a] != new[a]}
        if node.op_type != "Slice":
            cut.add(int(attribute(node, "axis", 0)) % len(old))  # type: ignore[arg-type]
        elif len(node.inputs) > 3 and (given := constant(node.inputs[3])) is not None:
            cut |= {int(a) % len(old) for a in given.reshape(-1)}
        else:
            return None
        return lambda axis: None if axis in cut else axis
    return None


def _sizes(value: ir.Value | None) -> tuple[Dim, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)
