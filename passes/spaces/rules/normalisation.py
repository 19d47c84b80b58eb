"""Normalisations.

RMSNorm    y = g * x / sqrt(mean x^2 + e)          x' = c Q x,  e' = c^2 e      ->  y' = Q' y
LayerNorm  the same on x - mean(x), plus beta       Q also fixes the ones vector
y' = G' Q G^-1 y: either Q is a signed permutation and g stays where it is, or g is peeled into whatever reads y.
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import SCALED_CENTRED, SCALED_ORTHOGONAL
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.relations import Alias
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.walk import NodeView


@rule("RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization", always=True)
def norm_last_axes(n: NodeView) -> None:
    """R+.O(n) on the input (R+.O(n)|1 for LayerNorm), c on the input turns epsilon into c^2 epsilon.

    gamma and beta are members of the output's space: gamma takes any diagonal, or is peeled into the readers.
    """
    shape = n.shape(0)
    if shape is None:
        n.pin_inputs("rank of the input is unknown")
        return
    rank = len(shape)
    axis = int(n.attr("axis", -1)) % rank
    layer = n.op == "LayerNormalization"
    maps = n.maps(0)
    if any(n.node.outputs[j].uses() for j in range(1, len(n.node.outputs))):
        for m in maps:
            n.pin(m.table, "input", "the statistics of this normalisation are used elsewhere")
    spanning = [m for m in maps if any(a >= axis for a in m.axes)]
    out: list[IndexMap] = [m for m in maps if m not in spanning]
    n.fixed(out, "input")
    if len(spanning) > 1 or any(s != 1 and not m.along(a) for m in spanning for a, s in enumerate(shape) if a >= axis):
        for m in spanning:
            n.pin(m.table, "input", "only a part of the normalised axes belongs to this space")
        spanning = []
    size = [d if a >= axis else 1 for a, d in enumerate(shape)]
    for m in spanning:
        lead = m.table.shape[:axis]
        blocks = np.arange(int(np.prod(lead))).reshape(*lead, *(1,) * (rank - axis))
        keys = {"mix": blocks, "unit": blocks}
        if layer:
            # With repeated coordinates (concatenated copies) the mean runs over all copies, which the block still fixes.
            n.use(m.table, "input", SCALED_CENTRED, **keys)
        else:
            n.use(m.table, "input", SCALED_ORTHOGONAL, **keys)
        n.c.aliases.append(Alias(n.name, m.flat))
        size = list(m.table.shape)
    if not spanning and (not n.has(1) or not all(isinstance(d, int) for d in size)):
        n.set(out)
        return
    # The output has its own diagonal, even if the input belongs to no space.
    y = IndexMap(
        n.c.fresh(int(np.prod(size)), n.node.outputs[0].name or n.name, range(axis, rank), constant=False).reshape(size)
    )  # type: ignore[arg-type]
    # A gamma that all groups of channels share ties them, channel by channel; one that does nothing need not.
    shared = bool(spanning) and int(np.prod(size[axis:])) < spanning[0].size
    unscaled = shared and n.is_uniform(1)
    gamma = None if unscaled else _parameter(n, 1, axis, rank)
    if spanning:
        n.c.scaled(n.name, y.table, spanning[0].table, None if gamma is None else gamma.table, normalised=True)
    else:
        n.use(y.table, "output", color=np.arange(y.size).reshape(y.table.shape), single=True)
        if gamma is not None:
            n.c.product(n.name, y.table, [np.broadcast_to(gamma.table, y.table.shape)], [1.0])
    if n.has(1) and gamma is None and not unscaled:
        n.pin(y.table, "output", f"the scale {n.value(1).name!r} is not a constant of its own")
    if n.has(2) and layer:
        beta = _parameter(n, 2, axis, rank)
        if beta is None:
            n.pin(y.table, "output", f"the bias {n.value(2).name!r} is not a constant of its own")
        else:
            n.c.same(y.table, np.broadcast_to(beta.table, y.table.shape))
    n.set([*out, y])


def _parameter(n: NodeView, i: int, axis: int, rank: int) -> IndexMap | None:
    """A per-channel parameter of the normalised axes."""
    if not n.has(i) or not n.is_constant(i):
        return None
    shape = n.shape(i)
    assert shape is not None
    axes = [a for a in range(len(shape)) if shape[a] != 1]
    if not axes:
        return None
    claimed = n.claim(i, axes)
    return None if claimed is None else claimed.pad_rank(rank)


@rule("BatchNormalization")
def batch_norm(n: NodeView) -> None:
    """Inference: a product and a sum per channel, which `prepare` writes out; what is left depends on the batch."""
    n.pin_inputs("batch statistics are computed at run time")


@rule("InstanceNormalization", "GroupNormalization", always=True)
def group_norm(n: NodeView) -> None:
    """Per group of channels, mean and variance over channels and positions: x' = c_group P x with e' = c^2 e.

    A positive scale per group is absorbed; permutations inside groups; scale and bias are members.
    For instance normalisation every channel is a group. (Positions are averaged too, so no rotation of channels keeps
    the mean of each group unless it fixes the ones vector; those that do are admitted.)
    """
    x = next((m for m in n.maps(0) if m.axes == (1,)), None)
    for m in n.maps(0):
        if m is not x:
            n.pin(m.table, "input", "channels vary along other axes than the second")
    if x is None:
        return
    scale, bias = (n.claim(i, [0]) if n.is_constant(i) else None for i in (1, 2))
    if scale is None or bias is None or scale.size != x.size or bias.size != x.size:
        n.pin(x.table, "input", "scale or bias of this normalisation is not one constant per channel")
        return
    groups = x.size if n.op == "InstanceNormalization" else int(n.attr("num_groups"))
    blocks = (np.arange(x.size) // (x.size // groups)).reshape(x.table.shape)
    n.use(x.table, "input", SCALED_CENTRED, mix=blocks, unit=blocks)
    n.c.aliases.append(Alias(n.name, x.flat))
    y = n.fresh_like(x)
    n.c.scaled(n.name, y.table, x.table, scale.table.reshape(x.table.shape), normalised=True)
    n.c.same(y.flat, bias.flat)
    n.set([y])
