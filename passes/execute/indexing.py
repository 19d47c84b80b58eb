"""Gathering, scattering and searching."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    accumulate = attribute(node, "reduction", "none") == "add"
    return x.index_put(tuple(index.unbind(-1)), updates, accumulate=accumulate)


@op("ScatterElements")
def _scatter_elements(node, ft, x, index, updates):
    axis = attribute(node, "axis", 0)
    if attribute(node, "reduction", "none") == "add":
        return x.scatter_add(axis, index, updates)
    return x.scatter(axis, index, updates)


@op("TopK")
def _topk(node, ft, x, k):
    largest = bool(attribute(node, "largest", 1))
    return torch.topk(x, int(k), attribute(node, "axis", -1), largest=largest, sorted=True)


@op("ArgMax")
def _argmax(node, ft, x):
    return x.argmax(attribute(node, "axis", 0), keepdim=bool(attribute(node, "keepdims", 1)))


@op("NonZero")
def _nonzero(node, ft, x):
    return torch.nonzero(x).T


@op("OneHot")
def _one_hot(node, ft, index, depth, values):
    hot = F.one_hot(index % int(depth), int(depth))
    return torch.where(hot.bool(), values[1], values[0]).movedim(-1, attribute(node, "axis", -1))
