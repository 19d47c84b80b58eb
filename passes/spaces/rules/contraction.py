"""Operators that sum over channels: linear layers, matrix products, einsum, convolutions.

    y_j = sum_k x_k W_kj        x' = A x,  W' = A^-T W B^T,  y' = B y

so the summed axes of both operands are dual, and any invertible A and B are possible: GL on both sides. A weight is not
special: the product of queries and keys obeys the same law, and there neither side is a constant.

All of them are one rule over *letters*, as einsum names axes: a letter of both operands is summed if the result lacks
it, else it is a batch letter (heads); a letter of one operand passes to the result.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    left, right = n.shape(0), n.shape(1)
    if left is None or right is None:
        n.pin_inputs("rank of an operand is unknown")
        return
    batch = "abcdefgh"[: max(len(left), len(right), 2) - 2]
    a = "k" if len(left) == 1 else batch[len(batch) - len(left) + 2 :] + "ik"
    b = "k" if len(right) == 1 else batch[len(batch) - len(right) + 2 :] + "kj"
    out = batch + ("i" if len(left) > 1 else "") + ("j" if len(right) > 1 else "")
    n.set(contract(n, (0, a), (1, b), out))


@rule("Gemm", always=True)
def gemm(n: NodeView) -> None:
    """y = a b + c with transposition flags: as MatMul; the bias lives in the output's space."""
    a = "ki" if n.attr("transA", 0) else "ik"
    b = "jk" if n.attr("transB", 0) else "kj"
    out = contract(n, (0, a), (1, b), "ij")
    for index_map in out if n.has(2) else ():
        bias = n.shape(2) or ()
        axis = index_map.axes[0] - 2 + len(bias) if index_map.axes else -1
        if axis < 0 or bias[axis] == 1:
            n.use(index_map.table, "output", FIXED, single=True, reason="a number is added to all its channels alike")
            continue
        claimed = n.claim(2, [axis]) if n.is_constant(2) else next(iter(n.maps(2)), None)
        if claimed is None:
            n.pin(index_map.table, "output", f"the bias {n.value(2).name!r} belongs to no space")
        else:
            n.c.same(index_map.table, claimed.pad_rank(2).table)
    n.set(out)


@rule("Einsum", always=True)
def einsum(n: NodeView) -> None:
    """A product of two operands in letters: as MatMul. Other forms (one operand, repeated letters) pin."""
    equation = str(n.attr("equation")).replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) != 2 or "." in equation or "->" not in equation or any(len(set(t)) != len(t) for t in terms):
        n.pin_inputs(f"einsum {equation!r} is not a product of two operands")
        return
    n.set(contract(n, (0, terms[0]), (1, terms[1]), equation.split("->")[1]))


@dataclass(frozen=True)
class _Operand:
    """One side of a product: its letters and its maps."""

    index: int
    letters: str
    maps: tuple[IndexMap, ...]

    def varies(self, m: IndexMap) -> str:
        """Letters along which a map varies."""
        return "".join(self.letters[a] for a in m.axes)

    def table(self, m: IndexMap, letters: str) -> np.ndarray:
        """The map as an array over ``letters`` (length 1 for letters this operand lacks)."""
        order = [self.letters.index(x) for x in letters if x in self.letters]
        rest = [a for a in range(len(self.letters)) if a not in order]
        table = m.table.transpose([*order, *rest])
        table = table.reshape(table.shape[: len(order)])
        present = iter(range(len(order)))
        return table.reshape([table.shape[next(present)] if x in self.letters else 1 for x in letters])


def contract(n: NodeView, a: tuple[int, str], b: tuple[int, str], out: str) -> list[IndexMap]:
    """State the constraints of a product of two operands; returns the maps of the result."""
    summed = [x for x in a[1] if x in b[1] and x not in out]
    batch = [x for x in a[1] if x in b[1] and x in out]
    sides = []
    for i, letters in (a, b):
        shape = n.shape(i)
        if shape is None or len(shape) != len(letters):
            n.pin_inputs("rank of an operand is unknown")
            return []
        if n.is_constant(i):
            lead = [letters.index(x) for x in batch if shape[letters.index(x)] != 1]
            for x in letters:
                if x not in batch:
                    n.claim(i, [*lead, letters.index(x)], reader=x in summed)
        sides.append(_Operand(i, letters, n.maps(i)))
    sums: list[tuple[_Operand, IndexMap]] = []
    passing: list[IndexMap] = []
    for side in sides:
        for m in side.maps:
            letters = side.varies(m)
            if any(x in summed for x in letters):
                sums.append((side, m))
            elif any(x not in out for x in letters):
                n.pin(m.table, f"input {side.index}", "is summed over its channels alone")
            else:
                passing.append(IndexMap(side.table(m, out)))
    heads = _sum(n, sums, "".join(batch), summed, out)
    return _merge_heads(n, passing + heads, {out.index(x) for x in batch})


def _sum(n: NodeView, sums: list[tuple[_Operand, IndexMap]], batch: str, summed: list[str], out: str) -> list[IndexMap]:
    """The summed axes are dual; returns the map of the heads of the result, if both operands have heads."""
    if not sums:
        return []
    if len(sums) == 1 or sums[0][0] is sums[1][0]:
        for side, m in sums:
            n.pin(m.table, f"input {side.index}", "the other operand of the product belongs to no space")
        return []
    letters = [set(side.varies(m)) for side, m in sums]
    over = [x & set(summed) for x in letters]
    if len(sums) > 2 or over[0] != over[1] or any(x - set(summed) - set(batch) for x in letters):
        for side, m in sums:
            n.pin(m.table, f"input {side.index}", "channels vary along several axes of the product")
        return []
    frame = batch + "".join(x for x in summed if x in over[0])
    p, q = (IndexMap(side.table(m, frame)) for side, m in sums)
    for axis in range(len(batch)):
        # An operand that does not vary along a batch axis is shared by all its indices.
        if p.along(axis) and not q.along(axis):
            p = n.tie(p, [axis])
        elif q.along(axis) and not p.along(axis):
            q = n.tie(q, [axis])
    n.c.dual(p.table, q.table)
    common = [axis for axis in range(len(batch)) if p.along(axis) and q.along(axis)]
    if not common:
        return []
    heads = n.units_of(q, common)
    table = heads.table.reshape(heads.table.shape[: len(batch)])
    shape = [1] * len(out)
    order = sorted(range(len(batch)), key=lambda axis: out.index(batch[axis]))
    for axis in order:
        shape[out.index(batch[axis])] = table.shape[axis]
    return [IndexMap(table.transpose(order).reshape(shape))]


def _merge_heads(n: NodeView, maps: list[IndexMap], batch: set[int]) -> list[IndexMap]:
    """Reconcile factors that vary along batch axes only (heads) with those that vary along a matrix axis.

    If a matrix factor varies along the same heads, the head factor only says that its units move together. If it does
    not, all heads share one operand: flattened, heads and channels would be two factors of one axis, so heads stay put.
    """
    channels = [m for m in maps if not set(m.axes) <= batch]
    result = list(channels)
    for m in maps:
        if set(m.axes) <= batch:
            covering = [r for r in channels if set(m.axes) <= set(r.axes)]
            for other in covering:
                n.move_with(other, m)
            if not channels:
                others = [r for r in result if set(r.axes) & set(m.axes)]
                for r in others:
                    _same_heads(n, r, m)
                if not others:
                    result.append(m)
            elif not covering:
                n.pin(m.table, "heads", "all heads share the other operand")
    for k, first in enumerate(channels):
        for second in channels[k + 1 :]:
            shared = set(first.axes) & set(second.axes)
            if shared:
                # Two channel axes of the same heads (an outer product per head): their units move together.
                heads = n.units_of(first, sorted(shared))
                n.move_with(second, heads)
    return result


def _same_heads(n: NodeView, a: IndexMap, b: IndexMap) -> None:
    if a.axes == b.axes:
        n.c.link(a.table, b.table)
    else:
        n.pin(a.table, "heads", "heads of the operands differ")
        n.pin(b.table, "heads", "heads of the operands differ")


@rule("Conv", "ConvTranspose", always=True)
def convolution(n: NodeView) -> None:
    """y_o = sum_{c, taps} x_c W_oc: GL on input and output channels, whatever the kernel size.

    With groups, per group; groups move as units. Depthwise, each channel is its own group: permutation shared between
    input and output, independent R* on both sides.
    """
    w = n.shape(1)
    if w is None or not all(isinstance(d, int) for d in w):
        n.pin_inputs("the kernel's shape is not static")
        return
    groups = int(n.attr("group", 1))
    transposed = n.op == "ConvTranspose"
    # Conv stores (out, in / groups, taps), ConvTranspose (in, out / groups, taps).
    if not n.is_constant(1) or n.maps(1) or n.value(1).producer() is not None or n.value(1) in n.walk.opaque:
        n.pin_inputs("the kernel is not a constant of its own")
        return
    rank = len(w)
    major, minor = int(w[0]), int(w[1])  # type: ignore[arg-type]
    depthwise = groups == major and minor == 1
    name = n.value(1).name or n.name
    small = n.c.fresh(groups * minor, name, (1,), reader=not transposed)
    big = n.c.fresh(major, name, (0,), reader=transposed)
    group_small, group_big = np.arange(groups * minor) // minor, np.arange(major) // (major // groups)
    for coordinates, group in ((small, group_small), (big, group_big)):
        keys = {} if groups == 1 else {"mix": group} if depthwise else {"mix": group, "unit": group}
        n.use(coordinates, "kernel axis", GL, **keys)
    # The minor axis is another space for each group: it varies along both axes of the kernel.
    by_row = small.reshape(groups, minor)[group_big]
    tail = (1,) * (rank - 2)
    first = by_row if groups > 1 else by_row[:1]
    n.walk.constants[n.value(1)] = (
        IndexMap(first.reshape(*first.shape, *tail)),
        IndexMap(big.reshape(major, 1, *tail)),
    )
    if depthwise:
        n.c.link(small, big)
    elif groups > 1:
        n.c.unit_link(by_row, np.broadcast_to(big[:, None], by_row.shape))
    inputs, outputs = (big, small) if transposed else (small, big)
    _read(n, inputs)
    out = IndexMap(outputs.reshape(1, -1, *tail))
    if n.has(2):
        claimed = n.claim(2, [0]) if n.is_constant(2) else None
        if claimed is None:
            n.pin(out.table, "output", f"the bias {n.value(2).name!r} belongs to no space")
        else:
            n.c.same(out.flat, claimed.flat)
    n.set([out])


def _read(n: NodeView, reader: np.ndarray) -> None:
    """Sum the input's channels (axis 1) with the reader coordinates of the kernel."""
    for m in n.maps(0):
        if m.axes == (1,):
            n.c.dual(m.flat, reader)
            return
        n.pin(m.table, "input", "channels vary along image axes")
    n.pin(reader, "kernel", f"reads {n.value(0).name!r}, which belongs to no space")
