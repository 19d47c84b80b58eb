"""Attention, rotary positions and softmax.

scores = (A_q q) . (A_k k)          A_k = A_q^-T        per key-value head
out    = P (A_v v)                  A_out = A_v         per key-value head, rows of P sum to 1
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import FIXED, GL, PLANE
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.walk import NodeView


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(n: NodeView) -> None:
    """Permutations only: along the normalised axis (it is symmetric) and of other channels (heads)."""
    n.fixed(n.maps(0), "input")
    n.set(n.maps(0))


@rule("Attention")
def attention(n: NodeView) -> None:
    """GL(d) per key-value head on values and output; GL(d) dual per head between queries and keys.

    Query heads that share a key-value head share its element. Past keys and values come from outside and pin.
    """
    shapes = [n.shape(i) for i in range(3)]
    if any(s is None for s in shapes) or any(n.has(i) and n.is_float(i) and i > 3 for i in (4, 5)):
        n.pin_inputs("keys and values of earlier steps come from outside")
        return
    for j in (1, 2, 3):
        if j < len(n.node.outputs) and n.node.outputs[j].uses():
            n.pin_inputs("an extra output of the attention operator is used")
            return
    flat = len(shapes[0]) == 3  # type: ignore[arg-type]
    q_heads = int(n.attr("q_num_heads", 0)) if flat else shapes[0][1]  # type: ignore[index]
    kv_heads = int(n.attr("kv_num_heads", 0)) if flat else shapes[1][1]  # type: ignore[index]
    if not isinstance(q_heads, int) or not isinstance(kv_heads, int) or q_heads % kv_heads:
        n.pin_inputs("the number of heads is not static")
        return
    q, k, v = (_per_head(n, i, heads, flat) for i, heads in ((0, q_heads), (1, kv_heads), (2, kv_heads)))
    repeats = q_heads // kv_heads
    # One index per key-value head: what belongs to a head moves with it.
    units = n.c.fresh(kv_heads, f"{n.name} heads", (1,), constant=False)[:, None]
    n.use(units, "heads", FIXED, single=True)
    for table, role in ((q, "query"), (k, "key"), (v, "value")):
        if table is not None:
            mine = units if role != "query" else np.repeat(units, repeats, 0)
            heads = np.arange(len(table))[:, None]
            n.use(table, role, GL, mix=heads, unit=np.repeat(np.arange(kv_heads), len(table) // kv_heads)[:, None])
            n.c.unit_link(table, np.broadcast_to(mine, table.shape))
    if q is not None and k is not None:
        n.c.dual(q, np.repeat(k, repeats, 0))
    for mine, other, label in ((q, k, "keys"), (k, q, "queries")):
        if mine is not None and other is None:
            n.pin(mine, "scores", f"the {label} belong to no space")
    if n.has(3):
        _mask(n, units, q_heads, kv_heads)
    if v is None:
        return
    out = np.repeat(v, repeats, 0)
    n.set([IndexMap(out.reshape(1, 1, -1) if flat else out[None, :, None, :])])


def _mask(n: NodeView, units: np.ndarray, q_heads: int, kv_heads: int) -> None:
    """A bias per head (relative positions) moves with its head; if it cannot, heads keep their places."""
    shape = n.shape(3)
    heads = shape[-3] if shape is not None and len(shape) >= 3 else 1 if shape is not None else None
    if heads == 1:
        n.fixed(n.maps(3), "mask")
        return
    axis = len(shape) - 3 if shape is not None else 0
    found = next((m for m in n.maps(3) if m.axes == (axis,)), None)
    if found is None and n.is_constant(3) and n.is_float(3) and heads == q_heads:
        found = n.claim(3, [axis])
    for m in n.maps(3):
        if m is not found:
            n.pin(m.table, "mask", "is added to attention scores")
    if found is None:
        n.use(units, "heads", FIXED, single=True, color=np.arange(kv_heads)[:, None])
        return
    n.fixed([found], "mask")
    n.c.unit_link(found.flat, np.repeat(units[:, 0], q_heads // kv_heads))


def _per_head(n: NodeView, i: int, heads: int, flat: bool) -> np.ndarray | None:
    """Coordinates ``(heads, head_dim)`` of an input of shape (b, h, s, d) or (b, s, h d)."""
    shape = n.shape(i)
    assert shape is not None
    size = shape[-1]
    found = None
    for m in n.maps(i):
        if m.along(-1) and not (flat and m.axes != (2,)) and not m.along(0) and not m.along(-2):
            table = m.table
            if flat:
                found = table.reshape(heads, -1)
            else:
                # Shared by all heads where the map does not vary along them.
                found = np.broadcast_to(table[0, :, 0, :], (heads, size))  # type: ignore[arg-type]
        else:
            n.pin(m.table, f"input {i}", "is not split into heads and channels")
    return found


@rule("RotaryEmbedding", "MRotaryEmbedding")
def rotary(n: NodeView) -> None:
    """Each pair of channels is rotated by position times its frequency: matrices that commute with all rotations.

    SO(2) x R+ per pair; any matrix on the channels that are not rotated; pairs keep their place, because the tables of
    cosines and sines are shared. Half-split layout pairs (i, i + r/2), interleaved layout (2i, 2i + 1).
    """
    shape = n.shape(0)
    if shape is None:
        n.pin_inputs("rank of the input is unknown")
        return
    for i in (1, 2):
        n.fixed(n.maps(i), "table")
        for m in n.maps(i):
            n.pin(m.table, "table", "the tables of cosines and sines are shared")
    heads = shape[1] if len(shape) == 4 else int(n.attr("num_heads", 0))
    if not isinstance(heads, int) or heads == 0:
        n.pin_inputs("the number of heads is not static")
        return
    x = _per_head(n, 0, heads, len(shape) == 3)
    if x is None:
        return
    width = x.shape[1]
    rotated = int(n.attr("rotary_embedding_dim", 0)) or width
    pair, side = pair_of_channel(width, rotated, bool(n.attr("interleaved", 0)))
    head = np.arange(heads)[:, None]
    rows = np.flatnonzero(pair >= 0)
    mix = head * width + pair[rows]
    n.use(
        x[:, rows], "rotated", PLANE, mix=mix, unit=head, color=np.broadcast_to(mix % width * 2 + side[rows], mix.shape)
    )
    rest = np.flatnonzero(pair < 0)
    if len(rest):
        n.use(x[:, rest], "not rotated", GL, mix=head, unit=head)
    n.set(n.maps(0))


def pair_of_channel(width: int, rotated: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each channel of a head, its frequency (-1 if not rotated) and whether it is the first or second of its pair."""
    channel = np.arange(width)
    if interleaved:
        pair, side = channel // 2, channel % 2
    else:
        half = rotated // 2
        pair, side = channel % half, channel // half
    inside = channel < rotated
    return np.where(inside, pair, -1), np.where(inside, side, 0)
