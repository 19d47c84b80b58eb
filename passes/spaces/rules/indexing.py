"""Gather, scatter, top-k and other operators that pick positions at run time.

Along an axis without channels they only choose positions: every element passes. Along a channel axis the chosen index
is visible from outside, so the channels keep their places.
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import FIXED, GL
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.rules.elementwise import additive
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.rules.structure import claimed
from qcompile.passes.spaces.walk import NodeView


@rule("Gather", always=True)
def gather(n: NodeView) -> None:
    """Rows of a table (embedding): GL on its channels. A constant index along channels is a sub-permutation."""
    shape, index_shape = n.shape(0), n.shape(1)
    if shape is None or index_shape is None:
        n.pin_inputs("rank of an operand is unknown")
        return
    if not n.is_float(0):
        return
    rank = len(shape)
    axis = int(n.attr("axis", 0)) % rank
    if n.is_constant(0) and not n.is_constant(1):
        if axis == 0 and _is_stack(n):
            n.choose(0, n.value(1), index_shape)
            return
        # Rows chosen at run time share one basis per remaining axis.
        for other in range(rank):
            if other != axis and shape[other] != 1 and isinstance(shape[other], int):
                n.claim(0, [other])
    indices = n.array(1) if n.is_constant(1) else None
    maps = claimed(n) if indices is not None else n.maps(0)
    out = []
    for m in maps:
        if m.along(axis):
            if indices is None:
                n.pin(m.table, "input", "indexed at run time")
                continue
            table = np.take(m.table, indices, axis)
        else:
            table = m.table.reshape(m.table.shape[:axis] + (1,) * len(index_shape) + m.table.shape[axis + 1 :])
        out.append(IndexMap(table))
    n.set(out)


def _is_stack(n: NodeView) -> bool:
    """Whether the constant at input 0 is a stack of matrices (weights of experts) that nobody has claimed as one tensor."""
    shape = n.shape(0) or ()
    stacked = len(shape) > 2 and all(isinstance(d, int) for d in shape) and all(d != 1 for d in shape[-2:])
    return stacked and all(m.along(0) for m in n.maps(0))


@rule("GatherND", always=True)
def gather_nd(n: NodeView) -> None:
    """Picks positions along the leading axes; channels on the trailing axes pass, for each matrix of a stack its own."""
    shape, index_shape = n.shape(0), n.shape(1)
    if shape is None or index_shape is None or not isinstance(index_shape[-1], int):
        n.pin_inputs("rank of an operand is unknown")
        return
    batch = int(n.attr("batch_dims", 0))
    picked = batch + index_shape[-1]
    if n.is_constant(0) and n.is_float(0) and not n.is_constant(1):
        if picked == 1 and not batch and _is_stack(n):
            n.choose(0, n.value(1), index_shape[:-1])
            return
        for axis in range(picked, len(shape)):
            if shape[axis] != 1 and isinstance(shape[axis], int):
                n.claim(0, [axis])
    lead = len(index_shape) - 1
    out = []
    for m in n.maps(0):
        if any(a < picked for a in m.axes):
            n.pin(m.table, "input", "indexed at run time")
            continue
        out.append(IndexMap(m.table.reshape((1,) * lead + m.table.shape[picked:])))
    n.set(out)


@rule("GatherElements")
def gather_elements(n: NodeView) -> None:
    """Chooses per element: channels are indexed from outside."""
    n.pin_inputs("indexed element by element at run time")


@rule("ScatterND", "ScatterElements", "Scatter")
def scatter(n: NodeView) -> None:
    """Rows are written (or added) into a tensor of the same channels: one element on data and updates."""
    shape, index_shape, update_shape = n.shape(0), n.shape(1), n.shape(2)
    if shape is None or index_shape is None or update_shape is None:
        n.pin_inputs("rank of an operand is unknown")
        return
    elements = n.op != "ScatterND"
    axis = int(n.attr("axis", 0)) % len(shape)
    reduction = n.attr("reduction", "none")
    picked = 0 if elements else index_shape[-1]
    if not isinstance(picked, int):
        n.pin_inputs("the depth of the index is not static")
        return
    out = []
    source = n.maps(2) or n.maps(0)
    if not n.maps(2):
        for m in source:
            n.pin(m.table, "data", "updates belong to no space")
    for m in n.maps(2):
        trailing = range(axis + 1, len(shape)) if elements else range(len(index_shape) - 1, len(update_shape))
        if any(a not in trailing for a in m.axes) or (elements and axis in m.axes):
            n.pin(m.table, "updates", "written element by element at run time")
            continue
        if elements and not _same_rows(n, m):
            # Each channel is written to rows of its own: channels stay apart and in their places.
            n.use(m.table, "updates", GL, single=True, color=np.arange(m.size).reshape(m.table.shape))
        moved = m if elements else IndexMap(m.table.reshape((1,) * picked + m.table.shape[len(index_shape) - 1 :]))
        data = next((x for x in n.maps(0) if x.axes == moved.axes), None)
        if data is not None:
            n.c.same(moved.table, data.table)
        elif not n.is_zero(0):
            n.pin(m.table, "updates", f"is written into {n.value(0).name!r}, which belongs to no space")
            continue
        if reduction not in ("none", "add"):
            n.use(moved.table, "updates", FIXED, single=True)
        out.append(moved)
    if n.maps(2):
        for x in n.maps(0):
            if not any(m.axes == x.axes for m in out):
                n.pin(x.table, "data", "updates belong to no space")
    n.set(out)


def _same_rows(n: NodeView, m: IndexMap) -> bool:
    """Whether a constant index is the same for all channels."""
    index = n.array(1) if n.is_constant(1) else None
    return index is not None and all((index == np.take(index, [0], a)).all() for a in m.axes)


@rule("TopK", "ArgMax", "ArgMin", "NonZero", "OneHot", "Unique")
def selection_by_value(n: NodeView) -> None:
    """The chosen index leaves the tensor: channels along that axis keep their places and values."""
    n.pin_inputs("an index chosen from its values is used outside")


@rule("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "IsNaN", "IsInf", "And", "Or", "Not", "Xor")
def comparison(n: NodeView) -> None:
    """A yes or no per channel: permutations only."""
    out = additive(n, list(range(len(n.node.inputs)))) if len(n.node.inputs) > 1 else n.maps(0)
    n.fixed(out, "compared")
    n.set(out)


@rule("Shape", "Size")
def sizes(n: NodeView) -> None:
    """Does not look at values."""
