"""Operators that act on each channel by itself, and the arithmetic of two tensors.

For a function f applied per channel, f(A x) = B f(x) forces A to be a permutation times a diagonal D with
f(d t) = d' f(t): which d are possible is the degree of homogeneity of f.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from qcompile.passes.graph import constant
from qcompile.passes.spaces.groups import FIXED, GL, ORTHOGONAL, POSITIVE, Limit
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.rules.structure import claimed
from qcompile.passes.spaces.walk import Layout, NodeView

pointwise = partial(rule, pointwise=True)


def per_channel(n: NodeView, limit: Limit, i: int = 0) -> None:
    """Input ``i`` and the output share their channels, which do not mix."""
    for index_map in n.maps(i):
        n.use(index_map.table, "input", limit, single=True)
    n.set(n.maps(i))


@pointwise("Identity", "Neg", "Cast", "CastLike", "Dropout", always=True)
def linear_per_tensor(n: NodeView) -> None:
    """f(x) = c x: B = A for every matrix. A cast to integers rounds: permutations only."""
    maps = claimed(n)
    if n.op == "Cast" and n.attr("to") not in (1, 10, 11, 16):
        n.fixed(maps, "cast to integers")
    n.set(maps)


@pointwise("Relu", "LeakyRelu", "ThresholdedRelu")
def homogeneous(n: NodeView) -> None:
    """f(d t) = d f(t) for d > 0: permutation x R+."""
    if n.op == "ThresholdedRelu":
        per_channel(n, FIXED)
    else:
        per_channel(n, POSITIVE)


@pointwise("Tanh", "Erf", "Asinh", "Atan", "Sin", "Asin", "Sinh", "Tan", "Sign", "Round", "Atanh")
def odd(n: NodeView) -> None:
    """f(-t) = -f(t): signed permutations."""
    per_channel(n, ORTHOGONAL)


@pointwise(
    "Sigmoid",
    "Gelu",
    "Swish",
    "Silu",
    "Softplus",
    "Softsign",
    "Exp",
    "Log",
    "Sqrt",
    "Cos",
    "Cosh",
    "Elu",
    "Celu",
    "Selu",
)
@pointwise("HardSigmoid", "HardSwish", "Mish", "Floor", "Ceil", "Acos", "Acosh", "Shrink", "Erfc")
def nonlinear(n: NodeView) -> None:
    """No homogeneity: permutations only. (An operator f(s x) with per-channel s would admit scales.)"""
    per_channel(n, FIXED)


@pointwise("Abs", "Reciprocal")
def power_of_magnitude(n: NodeView) -> None:
    """|d t| = |d| |t|; 1 / (d t) = (1 / d)(1 / t)."""
    out = []
    for index_map in n.maps(0):
        y = n.fresh_like(index_map)
        absolute = n.op == "Abs"
        n.c.product(n.name, y.table, [index_map.table], [1.0 if absolute else -1.0], [0 if absolute else 1])
        out.append(y)
    n.set(out)


@pointwise("Clip")
def clip(n: NodeView) -> None:
    """min(max(t, a), b) with scalar bounds: permutations only, unless the bounds are 0 or absent (then as ReLU)."""
    bounds = [n.array(i) for i in (1, 2) if n.has(i)]
    one_sided = len(bounds) == 1 and bounds[0] is not None and not np.any(bounds[0])
    per_channel(n, POSITIVE if one_sided else FIXED)


@pointwise("Max", "Min")
def extremum(n: NodeView) -> None:
    """max(d a, d b) = d max(a, b) for d > 0: all operands share permutation x R+; constant bounds are members."""
    out = additive(n, list(range(len(n.node.inputs))))
    for index_map in out:
        n.use(index_map.table, "operand", POSITIVE, single=True)
    n.set(out)


@pointwise("PRelu")
def prelu(n: NodeView) -> None:
    """As ReLU; the slopes are permuted and not scaled."""
    per_channel(n, POSITIVE)
    for x, slope in operands(n, 0, 1):
        if isinstance(slope, IndexMap):
            n.use(slope.table, "slope", FIXED, single=True)
            n.c.link(x.table, np.broadcast_to(slope.table, x.table.shape))


@pointwise("Pow")
def power(n: NodeView) -> None:
    """(d t)^k = d^k t^k for a constant exponent k; integer k keep track of the sign, others admit d > 0 only.

    A sum of squares over all channels is preserved by O(n).
    """
    exponent = n.array(1)
    if exponent is None or exponent.size != 1 or n.maps(1):
        n.pin_inputs("exponent is not a constant scalar")
        return
    k = float(exponent.reshape(-1)[0])
    if k == 2 and _squares_are_summed(n):
        n.set([units for m in n.maps(0) for units in _sum_of_squares(n, m)])
        return
    out = []
    for index_map in n.maps(0):
        y = n.fresh_like(index_map)
        if not k.is_integer():
            n.use(index_map.table, "input", POSITIVE, single=True)
        n.c.product(n.name, y.table, [index_map.table], [k], [int(k) % 2 if k.is_integer() else 0])
        out.append(y)
    n.set(out)


def _squares_are_summed(n: NodeView) -> bool:
    """Whether the output only goes into sums or means over the last axis, along which the channels run."""
    uses = n.node.outputs[0].uses()
    return bool(uses) and all(_sums_last_axis(u.node) for u in uses) and all(m.along(-1) for m in n.maps(0))


def _sums_last_axis(node) -> bool:
    if node.op_type not in ("ReduceMean", "ReduceSum") or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes, shape = constant(node.inputs[1]), node.inputs[0].shape
    return (
        axes is not None and shape is not None and axes.size == 1 and int(axes.reshape(-1)[0]) in (-1, len(shape) - 1)
    )


def _sum_of_squares(n: NodeView, m: IndexMap) -> list[IndexMap]:
    """sum (Q x)^2 = sum x^2: O(n) on the last axis, per index of the other axes."""
    rest = m.axes[:-1]
    if not rest:
        n.use(m.table, "squared", ORTHOGONAL)
        return []
    units = n.units_of(m, rest)
    blocks = np.broadcast_to(np.arange(units.size).reshape(units.table.shape), m.table.shape)
    n.use(m.table, "squared", ORTHOGONAL, mix=blocks, unit=blocks)
    return [units]


@pointwise("Add", "Sub", "Sum", "Mean")
def addition(n: NodeView) -> None:
    """A (a + b) = A a + A b: one element on all operands (residual stream, bias, positional table).

    A constant number added to all channels is a vector that may be scaled (the 1 of an adaptive norm's 1 + s); a number
    computed at run time is only preserved by permutations.
    """
    n.set(additive(n, list(range(len(n.node.inputs)))))


@pointwise("Where")
def selection(n: NodeView) -> None:
    """A choice per position between two tensors is linear in both.

    A choice per channel lets channels trade places together with their condition, if that is computed per channel too.
    """
    out = additive(n, [1, 2])
    shape = n.shape(0)
    for m in out:
        axes = [a for a in m.axes if shape is None or (a - m.rank >= -len(shape) and shape[a - m.rank] != 1)]
        if not axes:
            continue
        n.use(m.table, "choice", GL, single=True)
        condition = next((x.pad_rank(m.rank) for x in n.maps(0) if x.pad_rank(m.rank).axes == m.axes), None)
        if condition is None:
            n.use(m.table, "choice", color=np.arange(m.size).reshape(m.table.shape))
        else:
            n.fixed([condition], "condition")
            n.c.link(m.table, condition.table)
    n.set(out)


@pointwise("Mul")
def multiplication(n: NodeView) -> None:
    """(D a)(D' b) = (D D')(a b): one permutation, log d_out = log d_a + log d_b; x * x has d_out = d^2.

    A factor that is the same for all channels of a block commutes with every matrix on that block.
    A constant factor is absorbed: y = G x, A_y G = G' A_x.
    """
    x, y = (1, 0) if (n.is_constant(0), len(n.maps(0))) > (n.is_constant(1), len(n.maps(1))) else (0, 1)
    if not n.maps(x) and n.maps(y) and not n.is_constant(y):
        x, y = y, x
    if n.is_zero(x) or n.is_zero(y):
        return
    # A constant that also varies along positions cannot be peeled: it stays an ordinary factor.
    peelable = n.is_constant(y) and not n.is_constant(x) and sum(d != 1 for d in n.shape(y) or ()) <= 1
    if n.value(x) is n.value(y) and _squares_are_summed(n):
        n.set([units for m in n.maps(x) for units in _sum_of_squares(n, m)])
        return
    n.set(_with_leftovers(n, x, y, [_product(n, a, b, 1.0, peelable) for a, b in operands(n, x, y)]))


@pointwise("Div")
def division(n: NodeView) -> None:
    """As multiplication, with the exponent -1 for the divisor."""
    if not n.maps(0) and n.maps(1):
        n.pin_inputs("a number that is not transformed is divided by its channels")
        return
    n.set(_with_leftovers(n, 0, 1, [_product(n, a, b, -1.0, False) for a, b in operands(n, 0, 1)]))


def _product(n: NodeView, a: IndexMap, b: Counterpart, power: float, peelable: bool) -> IndexMap:
    if b is None:
        return a
    if isinstance(b, Untransformed):
        # Matrices within one index of the other operand commute with it; such blocks may not trade places.
        shape = [a.table.shape[x] if x in b.axes else 1 for x in range(a.rank)]
        blocks = np.arange(int(np.prod(shape))).reshape(shape)
        n.use(a.table, "factor", GL, mix=blocks, unit=blocks, color=blocks)
        return a
    if set(a.axes) - set(b.axes) and not (peelable and a.axes[-1] in b.axes):
        # b multiplies each block of a (the channels of a head) by a number.
        n.use(b.table, "block factor", FIXED, single=True)
        n.move_with(a, b)
        return a
    y = n.fresh_like(a)
    factor = np.broadcast_to(b.table, a.table.shape)
    if peelable and power == 1.0:
        n.c.scaled(n.name, y.table, a.table, factor)
    else:
        n.c.product(n.name, y.table, [a.table, factor], [1.0, power])
    return y


@dataclass(frozen=True)
class Untransformed:
    """Channels along ``axes`` that an operand has but that belong to no space (they come from a graph input, say)."""

    axes: tuple[int, ...]


Counterpart: TypeAlias = IndexMap | Untransformed | None


def operands(n: NodeView, i: int, j: int) -> list[tuple[IndexMap, Counterpart]]:
    """Pair the factors of two broadcast operands, in the output's rank.

    Each factor of ``i`` comes with the factor of ``j`` on the same channels (or on a part of its axes), with None if
    ``j`` is the same for all those channels, or with `Untransformed`. A constant ``j`` is claimed in the image of ``i``.
    """
    left, right = n.shape(i), n.shape(j)
    if left is None or right is None:
        n.pin_inputs("rank of an operand is unknown")
        return []
    rank = max(len(left), len(right))
    pairs: list[tuple[IndexMap, Counterpart]] = []
    for a in n.maps(i):
        a = a.pad_rank(rank)
        axes = [x for x in a.axes if x - rank + len(right) >= 0 and right[x - rank + len(right)] != 1]
        pairs.append((a, _counterpart(n, j, rank, len(right), axes) if axes else None))
    return pairs


def _counterpart(n: NodeView, j: int, rank: int, own: int, axes: list[int]) -> Counterpart:
    for b in n.maps(j):
        if set(b.pad_rank(rank).axes) == set(axes):
            return b.pad_rank(rank)
    if n.is_constant(j):
        found = n.claim(j, [x - rank + own for x in axes])
        if found is not None:
            return found.pad_rank(rank)
    for b in n.maps(j):
        if set(b.pad_rank(rank).axes) & set(axes):
            n.pin(b.table, f"input {j}", "its channels meet others in a way that is not elementwise")
    return Untransformed(tuple(axes))


def _with_leftovers(n: NodeView, i: int, j: int, out: list[IndexMap]) -> Layout:
    """Factors of ``j`` on axes where ``i`` has none pass on, as in an outer product."""
    left, right = n.shape(i), n.shape(j)
    if left is None or right is None:
        return ()
    taken = {a for m in out for a in m.axes}
    rank = max(len(left), len(right))
    if n.is_constant(j) and n.is_float(j) and not n.is_constant(i) and out:
        # What else a constant varies along, where the other operand does not: an outer product.
        for axis in range(rank - len(right), rank):
            size = right[axis - rank + len(right)]
            alone = axis - rank + len(left) < 0 or left[axis - rank + len(left)] == 1
            if alone and isinstance(size, int) and size != 1 and axis not in taken:
                n.claim(j, [axis - rank + len(right)])
    for b in n.maps(j):
        b = b.pad_rank(rank)
        if set(b.axes) & taken:
            continue
        if any(left[x - rank + len(left)] != 1 for x in b.axes if x - rank + len(left) >= 0):
            n.use(b.table, "factor", GL, single=True, color=np.arange(b.size).reshape(b.table.shape))
        out.append(b)
    return tuple(out)


def _elements(n: NodeView, i: int) -> int:
    shape = n.shape(i)
    return 1 if not shape else int(np.prod([d if isinstance(d, int) else 2 for d in shape]))


def additive(n: NodeView, inputs: list[int]) -> Layout:
    """Join the factors of all operands; returns the layout of the sum."""
    inputs = [i for i in inputs if n.has(i)]
    first = next(
        (i for i in inputs if n.maps(i) and not n.is_constant(i)), next((i for i in inputs if n.maps(i)), None)
    )
    if first is None:
        return ()
    rank = max(len(n.shape(i) or ()) for i in inputs)
    out = [m.pad_rank(rank) for m in n.maps(first)]
    for j in inputs:
        if j == first:
            continue
        pairs = operands(n, first, j)
        for k, (a, b) in enumerate(pairs):
            if isinstance(b, IndexMap):
                n.c.same(a.table, np.broadcast_to(b.table, a.table.shape))
            elif n.is_zero(j):
                pass
            elif isinstance(b, Untransformed):
                n.pin(a.table, f"input {first}", f"meets channels of {n.value(j).name!r} that belong to no space")
            elif n.is_constant(j) and _elements(n, j) == 1:
                n.c.same(a.table, n.promote(j, a).table)
            else:
                n.use(a.table, "operand", FIXED, single=True, reason="a number is added to all its channels alike")
            out[k] = a
        out = list(_with_leftovers_of_sum(n, first, j, out))
    return tuple(out)


def _with_leftovers_of_sum(n: NodeView, i: int, j: int, out: list[IndexMap]) -> Layout:
    covered = [set(m.axes) for m in out]
    for b in n.maps(j):
        b = b.pad_rank(out[0].rank if out else b.rank)
        if not any(set(b.axes) <= axes for axes in covered):
            n.pin(b.table, f"input {j}", f"meets channels of {n.value(i).name!r} that belong to no space")
    return tuple(out)
