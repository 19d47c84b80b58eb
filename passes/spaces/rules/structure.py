"""Operators that move data: their rule is the operator itself, applied to the index map.

y = P x with a selection P:   B P = P A,   so every coordinate keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcompile.passes.spaces.groups import FIXED
from qcompile.passes.spaces.index_map import IndexMap, concat
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.walk import Layout, NodeView


def claimed(n: NodeView, i: int = 0) -> Layout:
    """Maps of input ``i``; a constant that nobody has split yet gets one factor per axis.

    A constant of rank three or more is taken as a stack of matrices: its last two axes are separate for each index of
    the leading ones.
    """
    shape = n.shape(i)
    if n.is_constant(i) and not n.maps(i) and n.is_float(i) and shape and all(isinstance(d, int) for d in shape):
        rank = len(shape)
        lead = [a for a in range(rank - 2) if shape[a] != 1] if rank > 2 else []
        for axis in range(max(0, rank - 2), rank):
            if shape[axis] != 1:
                n.claim(i, [*lead, axis])
    return n.maps(i)


def follow(n: NodeView, move: Callable[[IndexMap], IndexMap | None], reason: str) -> None:
    """Apply ``move`` to every factor; a factor that cannot follow is pinned with ``reason``."""
    out = []
    for index_map in claimed(n):
        moved = move(index_map)
        if moved is None:
            n.pin(index_map.table, "input", reason)
        else:
            out.append(moved)
    n.set(out)


def axes_of(n: NodeView, i: int, name: str = "axes") -> list[int] | None:
    """Axes given as an input (newer opsets) or as an attribute."""
    array = n.array(i) if n.has(i) else None
    if array is not None:
        return [int(a) for a in array.reshape(-1)]
    attr = n.attr(name)
    return None if attr is None else [int(a) for a in attr]


@rule("Transpose", always=True)
def transpose(n: NodeView) -> None:
    """Coordinates move with their axes."""
    shape = n.shape(0)
    perm = n.attr("perm") or (list(range(len(shape)))[::-1] if shape is not None else None)
    follow(n, lambda m: m.transpose(perm), "")


@rule("Reshape", "Flatten")
def reshape(n: NodeView) -> None:
    """Axes are factored and merged in row-major order; heads are ``(heads, head_dim)`` of the same coordinates.

    If channels are merged with a symbolic axis (batch and heads), all indices along that channel axis are given one
    basis, because the result no longer says which of them a position belongs to.
    """
    old, new = n.shape(0), n.out_shape()
    if old is None or new is None:
        n.pin_inputs("a shape of this reshape is unknown")
        return

    def move(m: IndexMap) -> IndexMap | None:
        moved = m.reshape(old, new)
        for axis in m.axes if moved is None else ():
            m = n.tie(m, [axis])
            moved = m.reshape(old, new)
            if moved is not None:
                break
        return moved

    follow(n, move, "channels are merged with an axis of symbolic size")


@rule("Squeeze")
def squeeze(n: NodeView) -> None:
    """Axes of length 1 disappear."""
    shape = n.shape(0)
    axes = axes_of(n, 1)
    if shape is None:
        n.pin_inputs("rank of the input is unknown")
        return
    drop = [a % len(shape) for a in axes] if axes is not None else [a for a, d in enumerate(shape) if d == 1]
    follow(n, lambda m: m.drop_axes(drop), "")


@rule("Unsqueeze")
def unsqueeze(n: NodeView) -> None:
    """Axes of length 1 appear."""
    axes = axes_of(n, 1)
    if axes is None:
        n.pin_inputs("axes are not constant")
        return
    follow(n, lambda m: m.insert_axes(axes), "")


@rule("Expand", "Tile", always=True)
def expand(n: NodeView) -> None:
    """Copies share their coordinates: one element for all repetitions (repeat_kv ties the group)."""
    old, new = n.shape(0), n.out_shape()
    repeats = n.array(1) if n.op == "Tile" else None
    if old is None or new is None:
        n.pin_inputs("a shape of this operator is unknown")
        return

    def move(m: IndexMap) -> IndexMap | None:
        m = m.pad_rank(len(new))
        for axis in m.axes:
            if n.op == "Tile":
                if repeats is None:
                    return None
                m = IndexMap(np.concatenate([m.table] * int(repeats[axis]), axis))
        return m

    follow(n, move, "the number of repetitions is not constant")


@rule("Slice")
def slicing(n: NodeView) -> None:
    """A part of the channels keeps its coordinates."""
    shape = n.shape(0)
    starts, ends, steps = (n.array(i) if n.has(i) else None for i in (1, 2, 4))
    if shape is None:
        n.pin_inputs("rank of the input is unknown")
        return
    axes = axes_of(n, 3) if n.has(3) else None

    def move(m: IndexMap) -> IndexMap | None:
        if starts is None or ends is None:
            touched = range(len(shape)) if axes is None else [a % len(shape) for a in axes]
            return None if any(m.along(a) for a in touched) else m
        for k, (start, end) in enumerate(zip(starts.reshape(-1), ends.reshape(-1))):
            axis = (k if axes is None else axes[k]) % len(shape)
            if m.along(axis):
                size = m.table.shape[axis]
                step = 1 if steps is None else int(steps.reshape(-1)[k])
                stop: int | None = int(max(min(end, size), -size - 1))
                if step < 0 and stop == -size - 1:
                    stop = None
                m = m.take(axis, np.arange(size)[slice(int(max(min(start, size), -size)), stop, step)])
        return m

    follow(n, move, "bounds of the slice are not constant")


@rule("Split")
def split(n: NodeView) -> None:
    """Parts of a direct sum keep their coordinates."""
    axis = int(n.attr("axis", 0))
    for index_map in claimed(n):
        if not index_map.along(axis):
            for j in range(len(n.node.outputs)):
                n.set((*n.walk.layout(n.node.outputs[j]), index_map), j)
            continue
        size = index_map.table.shape[axis % index_map.rank]
        given = n.array(1) if n.has(1) else None
        if given is None:
            parts = len(n.node.outputs)
            width = -(-size // parts)
            given = np.array([min(width, size - width * p) for p in range(parts)])
        begin = 0
        for j, width in enumerate(given.reshape(-1).tolist()):
            part = index_map.take(axis, np.arange(begin, begin + width))
            n.set((*n.walk.layout(n.node.outputs[j]), part), j)
            begin += width


@rule("Concat")
def concatenation(n: NodeView) -> None:
    """Along channels: the direct sum. Along any other axis: all operands share one element."""
    axis = int(n.attr("axis"))
    count = len(n.node.inputs)
    carrying = [i for i in range(count) if n.maps(i)]
    first = next((i for i in carrying if not n.is_constant(i)), carrying[0])
    out: list[IndexMap] = []
    for m in n.maps(first):
        if m.along(axis) or ((n.shape(first) or (2,))[axis] == 1 and _sums_along(n, m, axis)):
            parts = [_part(n, i, m, axis) for i in range(count)]
            if any(p is None for p in parts):
                for p in parts:
                    if p is not None:
                        n.pin(p.table, "part", "another part of this concatenation belongs to no space")
                continue
            out.append(concat(parts, axis))  # type: ignore[arg-type]
            continue
        for i in range(count):
            if i == first or n.is_zero(i):
                continue
            other = next((x for x in n.maps(i) if x.axes == m.axes), None)
            if other is None and n.is_constant(i):
                other = n.claim(i, m.axes)
            if other is None:
                n.pin(m.table, "part", f"is joined with {n.value(i).name!r}, which belongs to no space")
            else:
                n.c.same(m.table, other.table)
        out.append(m)
    for i in carrying:
        for x in n.maps(i):
            if i != first and not any(x.axes == m.axes or (x.along(axis) and m.along(axis)) for m in n.maps(first)):
                n.pin(x.table, "part", "factors of this concatenation differ")
    n.set(out)


def _sums_along(n: NodeView, m: IndexMap, axis: int) -> bool:
    """Whether a part of length 1 along ``axis`` is a channel: some other part varies there."""
    return any(x.along(axis) for i in range(len(n.node.inputs)) for x in n.maps(i))


def _part(n: NodeView, i: int, like: IndexMap, axis: int) -> IndexMap | None:
    """The factor of input ``i`` along ``axis``, with that axis spelled out; claimed if constant."""
    shape = n.shape(i)
    width = shape[axis] if shape is not None else None
    for m in n.maps(i):
        if m.along(axis) or (width == 1 and m.axes == tuple(a for a in like.axes if a != axis % like.rank)):
            return m
    if n.is_constant(i) and n.is_float(i) and isinstance(width, int):
        wanted = [a for a in like.axes if a != axis % like.rank and shape is not None and shape[a] != 1]
        return n.claim(i, [*wanted, axis % like.rank])
    return None


@rule("DepthToSpace", "SpaceToDepth")
def depth_space(n: NodeView) -> None:
    """Channels are factored into (block, block, channels); the blocks become image positions, one basis for all."""
    block = int(n.attr("blocksize"))
    out = []
    for m in n.maps(0):
        if m.axes != (1,):
            n.pin(m.table, "input", "channels vary along image axes")
            continue
        flat = m.flat
        if n.op == "SpaceToDepth":
            out.append(IndexMap(np.tile(flat, block * block).reshape(1, -1, 1, 1)))
            continue
        crd = n.attr("mode", "DCR") == "CRD"
        table = flat.reshape(-1, block * block) if crd else flat.reshape(block * block, -1).T
        first = np.ascontiguousarray(table[:, 0])
        n.c.same(np.broadcast_to(first[:, None], table.shape), table)
        out.append(IndexMap(first.reshape(1, -1, 1, 1)))
    n.set(out)


@rule("AveragePool", "GlobalAveragePool", "LpPool", "Resize", "Upsample", "GlobalMaxPool", "MaxPool", "Pad", "CumSum")
def spatial(n: NodeView) -> None:
    """Linear over positions, channel by channel: every matrix on the channels. Max-pooling: permutation x R+."""
    from qcompile.passes.spaces.groups import POSITIVE

    shape = n.shape(0)
    for m in n.maps(0):
        moved = [a for a in m.axes if shape is not None and not _same_size(n, a)]
        if n.op == "CumSum":
            axis = n.array(1)
            moved = [a for a in m.axes if axis is None or a == int(axis.reshape(-1)[0]) % m.rank]
        if moved:
            n.pin(m.table, "input", "channels are pooled, resized or padded")
            return
        if n.op in ("MaxPool", "GlobalMaxPool", "LpPool"):
            n.use(m.table, "input", POSITIVE if n.op != "LpPool" else FIXED, single=True)
        if n.op == "Pad" and n.has(2) and (n.array(2) is None or np.any(n.array(2))):
            n.use(m.table, "input", FIXED, single=True, reason="padded with a number other than 0")
    n.set(n.maps(0))


def _same_size(n: NodeView, axis: int) -> bool:
    old, new = n.shape(0), n.out_shape()
    return old is not None and new is not None and len(old) == len(new) and old[axis] == new[axis]


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceProd")
@rule("ReduceLogSumExp", "ReduceLogSum")
def reduction(n: NodeView) -> None:
    """Over positions: linear for sums and means (any matrix), monotone for max (R+), else permutations.

    Over channels: the result is a function of all of them that only permutations preserve.
    """
    from qcompile.passes.spaces.groups import GL, POSITIVE

    shape = n.shape(0)
    axes = axes_of(n, 1)
    if shape is None:
        n.pin_inputs("rank of the input is unknown")
        return
    reduced = [a % len(shape) for a in axes] if axes else list(range(len(shape)))
    out = []
    for m in n.maps(0):
        over = [a for a in m.axes if a in reduced]
        limit = {"ReduceMean": GL, "ReduceSum": GL, "ReduceMax": POSITIVE, "ReduceMin": POSITIVE}.get(n.op, FIXED)
        if over:
            out += _reduce_channels(n, m, over)
            continue
        n.use(m.table, "input", limit, single=limit is not GL)
        out.append(m)
    if not n.attr("keepdims", 1):
        out = [m.drop_axes(reduced) for m in out]
    n.set(out)


def _reduce_channels(n: NodeView, m: IndexMap, over: Sequence[int]) -> list[IndexMap]:
    """A symmetric function of the channels along ``over``; the other indices of the map (heads) still move."""
    rest = [a for a in m.axes if a not in over]
    n.use(m.table, "input", FIXED, single=True, reason="is reduced over its channels")
    return [n.units_of(m, rest)] if rest else []
