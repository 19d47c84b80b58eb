"""Operators that sum over channels: linear layers, convolutions, matrix products.

    y_j = sum_k x_k W_kj        x' = A x,  W' = A^-T W B^T,  y' = B y

so the summed axes of both operands are dual, and any invertible A and B are possible: GL on both sides. A weight is not
special: the product of queries and keys obeys the same law, and there neither side is a constant.
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import FIXED, GL
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.walk import NodeView


@rule("MatMul", always=True)
def matmul(n: NodeView) -> None:
    """y[..i, j] = sum_k a[..i, k] b[..k, j]: A_b = A_a^-T on k, per index of batch axes; i and j pass through.

    Where both operands have channels on a batch axis (heads), their units move together; where only one has, the
    other is shared by all of them, which ties their elements.
    """
    _product(n, 0, 1)


@rule("Gemm", always=True)
def gemm(n: NodeView) -> None:
    """y = a b + c with transposition flags: as MatMul; the bias lives in the output's space."""
    a, b = n.shape(0), n.shape(1)
    if a is None or b is None:
        n.pin_inputs("rank of an operand is unknown")
        return
    k, i = (0, 1) if n.attr("transA", 0) else (1, 0)
    l, j = (1, 0) if n.attr("transB", 0) else (0, 1)
    out = _contract_plain(n, (0, k, i), (1, l, j))
    if n.has(2):
        bias = n.shape(2) or ()
        for index_map in out:
            axis = index_map.axes[0] if index_map.axes else 1
            at = axis - 2 + len(bias)
            if at < 0 or bias[at] == 1:
                n.use(index_map.table, "output", FIXED, single=True, reason="a number is added to all channels alike")
                continue
            claimed = n.claim(2, [at]) if n.is_constant(2) else next(iter(n.maps(2)), None)
            if claimed is None:
                n.pin(index_map.table, "output", f"the bias {n.value(2).name!r} belongs to no space")
            else:
                n.c.same(index_map.table, claimed.pad_rank(2).table)
    n.set(out)


@rule("Conv", "ConvTranspose", always=True)
def convolution(n: NodeView) -> None:
    """y_o = sum_{c, taps} x_c W_oc: GL on input and output channels, whatever the kernel size.

    With groups, per group; groups move as units. Depthwise, each channel is its own group: permutation shared between
    input and output, independent R* on both sides.
    """
    x, w = n.shape(0), n.shape(1)
    if w is None or not all(isinstance(d, int) for d in w):
        n.pin_inputs("the kernel's shape is not static")
        return
    groups = int(n.attr("group", 1))
    transposed = n.op == "ConvTranspose"
    # Conv stores (out, in / groups, taps), ConvTranspose (in, out / groups, taps).
    if not n.is_constant(1) or n.maps(1):
        n.pin_inputs("the kernel is not a constant of its own")
        return
    rank = len(w)
    major, minor = int(w[0]), int(w[1])  # type: ignore[arg-type]
    per = major // groups
    name = n.value(1).name or n.name
    small = n.c.fresh(groups * minor, name, (1,), reader=not transposed)
    big = n.c.fresh(major, name, (0,), reader=transposed)
    group_small, group_big = np.arange(groups * minor) // minor, np.arange(major) // per
    for coordinates, group in ((small, group_small), (big, group_big)):
        keys = {} if groups == 1 else {"mix": group, "unit": group}
        n.use(coordinates, "kernel axis", GL, **keys)
    # The minor axis is another space for each group: it varies along both axes of the kernel.
    by_row = small.reshape(groups, minor)[group_big]
    tail = (1,) * (rank - 2)
    first = by_row if groups > 1 else by_row[:1]
    n.walk.constants[n.value(1)] = (
        IndexMap(first.reshape(*first.shape, *tail)),
        IndexMap(big.reshape(major, 1, *tail)),
    )
    if groups > 1:
        n.c.unit_link(by_row, big[:, None])
        if minor == 1:
            n.c.link(by_row[:, 0], big)
    inputs, outputs = (big, small) if transposed else (small, big)
    _read(n, 0, inputs, axis=1)
    out = IndexMap(outputs.reshape(1, -1, *tail))
    if n.has(2):
        claimed = n.claim(2, [0]) if n.is_constant(2) else None
        if claimed is None:
            n.pin(out.table, "output", f"the bias {n.value(2).name!r} belongs to no space")
        else:
            n.c.same(out.flat, claimed.flat)
    others = [m for m in n.maps(0) if m.axes and not m.along(1)] if x is not None else []
    for index_map in others:
        n.pin(index_map.table, "input", "image positions are convolved")
    n.set([out])


def _read(n: NodeView, i: int, reader: np.ndarray, axis: int) -> None:
    """Sum input ``i`` along ``axis`` with the reader coordinates of a weight."""
    for index_map in n.maps(i):
        if index_map.axes == (axis,):
            n.c.dual(index_map.flat, reader)
            return
        if axis in index_map.axes:
            n.pin(index_map.table, f"input {i}", "channels also vary along another axis of this operand")
    if len(reader) > 1 or not n.maps(i):
        n.pin(reader, "weight", f"reads {n.value(i).name!r}, which belongs to no space")


def _contract_plain(n: NodeView, a: tuple[int, int, int], b: tuple[int, int, int]) -> list[IndexMap]:
    """Two matrices: ``a = (input, summed axis, kept axis)``."""
    out = []
    summed: dict[int, IndexMap] = {}
    for (i, k, kept), position in ((a, 0), (b, 1)):
        constant = n.is_constant(i)
        if constant:
            n.claim(i, [k], reader=True)
            n.claim(i, [kept])
        for index_map in n.maps(i):
            if index_map.axes == (k,):
                summed[i] = index_map
            elif index_map.axes == (kept,):
                shape = (-1, 1) if position == 0 else (1, -1)
                out.append(IndexMap(index_map.table.reshape(shape)))
            elif index_map.axes:
                n.pin(index_map.table, f"input {i}", "channels vary along both axes of a matrix product")
    _join(n, summed)
    return out


def _join(n: NodeView, summed: dict[int, IndexMap]) -> None:
    if len(summed) == 2:
        p, q = summed.values()
        n.c.dual(p.flat, q.flat)
    for i, index_map in summed.items():
        if len(summed) == 1:
            n.pin(index_map.table, f"input {i}", "the other operand of the product belongs to no space")


def _product(n: NodeView, i: int, j: int) -> None:
    """MatMul with numpy's rules for batch axes."""
    left, right = n.shape(i), n.shape(j)
    if left is None or right is None:
        n.pin_inputs("rank of an operand is unknown")
        return
    if len(left) == 1 or len(right) == 1:
        _vector_product(n, i, j)
        return
    for operand, shape in ((i, left), (j, right)):
        if n.is_constant(operand):
            summed, kept = (-1, -2) if operand == i else (-2, -1)
            batch = [x for x in range(len(shape) - 2) if shape[x] != 1]
            for axis in (summed, kept):
                n.claim(operand, [*batch, axis % len(shape)], reader=axis == summed)
    rank = max(len(left), len(right))
    a = [m.pad_rank(rank) for m in n.maps(i)]
    b = [m.pad_rank(rank) for m in n.maps(j)]
    batch_axes = range(rank - 2)
    a_sum = [m for m in a if m.along(-1)]
    b_sum = [m for m in b if m.along(-2)]
    for m in [*(x for x in a_sum if x.along(-2)), *(x for x in b_sum if x.along(-1))]:
        n.pin(m.table, "operand", "channels vary along both axes of a matrix product")
        return
    out = [m for m in a if not m.along(-1)] + [m for m in b if not m.along(-2)]
    if len(a_sum) == 1 and len(b_sum) == 1:
        p, q = a_sum[0], b_sum[0]
        p_table = np.swapaxes(p.table, -1, -2)
        p_table, q = _tie_missing_batch(n, IndexMap(p_table), q, rank)
        n.c.dual(p_table.table, q.table)
        heads = tuple(x for x in batch_axes if p_table.along(x) and q.along(x))
        if heads:
            out.append(_head_map(n, q, heads))
    else:
        for m in (*a_sum, *b_sum):
            n.pin(m.table, "operand", "the other operand of the product belongs to no space along the summed axis")
    n.set(_merge_heads(n, out, rank))


def _tie_missing_batch(n: NodeView, p: IndexMap, q: IndexMap, rank: int) -> tuple[IndexMap, IndexMap]:
    """Where one operand is shared along a batch axis, the other has one basis for all indices of that axis."""
    for axis in range(rank - 2):
        if p.along(axis) and not q.along(axis):
            p = n.tie(p, [axis])
        elif q.along(axis) and not p.along(axis):
            q = n.tie(q, [axis])
    return p, q


def _head_map(n: NodeView, q: IndexMap, heads: tuple[int, ...]) -> IndexMap:
    """New coordinates for the batch axes of a product of two head-wise operands: only their order can change."""
    shape = [q.table.shape[x] if x in heads else 1 for x in range(q.rank)]
    count = int(np.prod(shape))
    coordinates = n.c.fresh(count, n.node.outputs[0].name or n.name, heads, constant=False).reshape(shape)
    n.use(coordinates, "heads", FIXED, single=True)
    blocks = np.arange(count).reshape(shape)
    n.use(q.table, "per head", GL, mix=blocks, unit=blocks)
    n.c.unit_link(q.table, np.broadcast_to(coordinates, q.table.shape))
    return IndexMap(coordinates)


def _merge_heads(n: NodeView, maps: list[IndexMap], rank: int) -> list[IndexMap]:
    """Reconcile factors that vary along batch axes only (heads) with those that vary along a matrix axis.

    If a matrix factor varies along the same heads, the head factor only says that its units move together. If it does
    not, all heads share one operand: flattened, heads and channels would be two factors of one axis, so heads stay put.
    """
    channels = [m for m in maps if any(x >= rank - 2 for x in m.axes)]
    result = list(channels)
    for m in maps:
        if m in channels:
            continue
        covering = [r for r in channels if set(m.axes) <= set(r.axes)]
        for other in covering:
            blocks = np.broadcast_to(np.arange(m.size).reshape(m.table.shape), other.table.shape)
            n.use(other.table, "per head", GL, mix=blocks, unit=blocks)
            n.c.unit_link(other.table, np.broadcast_to(m.table, other.table.shape))
        if not channels:
            result.append(m)
        elif not covering:
            n.pin(m.table, "heads", "all heads share the other operand")
    return result


def _vector_product(n: NodeView, i: int, j: int) -> None:
    """A vector on one side: only the sum over a common axis is followed, everything else is pinned."""
    left, right = n.shape(i), n.shape(j)
    assert left is not None and right is not None
    sides = []
    for operand, shape, axis in ((i, left, len(left) - 1), (j, right, max(0, len(right) - 2))):
        if n.is_constant(operand) and shape[axis] != 1:
            n.claim(operand, [axis], reader=True)
        match = [m for m in n.maps(operand) if m.axes == (axis,)]
        sides.append(match[0] if match else None)
    out = []
    for operand, axis, found in ((i, len(left) - 1, sides[0]), (j, max(0, len(right) - 2), sides[1])):
        for m in n.maps(operand):
            if m is found:
                continue
            if axis in m.axes:
                n.pin(m.table, "operand", "channels vary along several axes of a matrix-vector product")
            elif operand == i and len(left) > 1:
                out.append(IndexMap(m.table.reshape(m.table.shape[:-1])))
            elif operand == j and len(right) > 1:
                out.append(IndexMap(np.squeeze(m.table, axis)))
    if sides[0] is not None and sides[1] is not None:
        n.c.dual(sides[0].flat, sides[1].flat)
    else:
        for m in sides:
            if m is not None:
                n.pin(m.table, "operand", "the other operand of the product belongs to no space")
    n.set(out)
