"""Gathering, scattering and searching."""

from __future__ import annotations

import torch

from qcompile.passes.execute.registry import op
from qcompile.passes.graph import attribute


@op("Gather")
def _gather(node, ft, x, index):
    axis = attribute(node, "axis", 0) % x.dim()
    flat = index.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@op("GatherElements")
def _gather_elements(node, ft, x, index):
    axis = attribute(node, "axis", 0) % x.dim()
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@op("GatherND")
def _gather_nd(node, ft, x, index):
    batch = attribute(node, "batch_dims", 0)
    if batch == 0:
        return x[tuple(index.unbind(-1))]
    lead = x.shape[:batch]
    x2, i2 = x.reshape(-1, *x.shape[batch:]), index.reshape(-1, *index.shape[batch:])
    out = torch.stack([a[tuple(b.unbind(-1))] for a, b in zip(x2, i2)])
    return out.reshape(*lead, *out.shape[1:])


@op("ScatterND")
def _scatter_nd(node, ft, x, index, updates):
    """As `_scatter_elements` along one axis, where elements of ``x`` that an index names are neighbours."""
    named, rest = x.shape[: index.shape[-1]], x.shape[index.shape[-1] :]
    place = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for size, part in zip(named, index.to(x.device).unbind(-1)):
        place = place * size + torch.where(part < 0, part + size, part)
    flat, new = x.reshape(-1, *rest), updates.reshape(-1, *rest)
    return _scattered(node, flat, 0, place.reshape(-1, *[1] * len(rest)).expand(new.shape), new).reshape(x.shape)


@op("ScatterElements")
def _scatter_elements(node, ft, x, index, updates):
    axis = attribute(node, "axis", 0) % x.dim()
    return _scattered(node, x, axis, torch.where(index < 0, index + x.shape[axis], index), updates)


def _scattered(node, x, axis, index, updates):
    reduction = attribute(node, "reduction", "none")
    if reduction == "none":
        return x.scatter(axis, index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, index, updates, names[reduction])


@op("TopK")
def _topk(node, ft, x, k):
    largest = bool(attribute(node, "largest", 1))
    return torch.topk(x, int(k), attribute(node, "axis", -1), largest=largest, sorted=True)


@op("ArgMax")
def _argmax(node, ft, x):
    axis, keep = attribute(node, "axis", 0), bool(attribute(node, "keepdims", 1))
    if not attribute(node, "select_last_index", 0):
        return x.argmax(axis, keepdim=keep)
    return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keepdim=keep)


@op("NonZero")
def _nonzero(node, ft, x):
    return torch.nonzero(x).T


@op("OneHot")
def _one_hot(node, ft, index, depth, values):
    """Indices from ``-depth`` on count; others are nowhere."""
    depth = int(depth)
    places = torch.where(index < 0, index + depth, index).to(torch.int64)
    hot = places.unsqueeze(-1) == torch.arange(depth, device=places.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, attribute(node, "axis", -1))
