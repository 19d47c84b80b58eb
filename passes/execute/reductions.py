"""Sums, extremes and norms along axes, softmax among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.passes.execute.registry import axes_of, op
from qcompile.passes.graph import attribute

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim),
    "ReduceL2": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim).sqrt(),
    "ReduceSumSquare": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim),
    "ReduceLogSum": lambda x, axes, keepdim: x.sum(axes, keepdim=keepdim).log(),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceProd": lambda x, axes, keepdim: _product(x, axes, keepdim),
}


@op(*REDUCTIONS)
def _reduce(node, ft, x, axes=None):
    axes = axes_of(node, axes)
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return x
        axes = range(x.dim())
    keep = bool(attribute(node, "keepdims", 1))
    return REDUCTIONS[node.op_type](x, tuple(int(a) for a in axes), keepdim=keep)


def _product(x, axes, keepdim):
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


@op("CumSum")
def _cumsum(node, ft, x, axis):
    axis, reverse = int(axis), attribute(node, "reverse", 0)
    terms = x.flip(axis) if reverse else x
    sums = torch.cumsum(terms, axis, dtype=x.dtype)
    if attribute(node, "exclusive", 0):
        sums = sums.roll(1, axis).index_fill(axis, torch.zeros(1, dtype=torch.int64, device=x.device), 0)
    return sums.flip(axis) if reverse else sums


@op("Softmax")
def _softmax(node, ft, x):
    return torch.softmax(x, attribute(node, "axis", -1))


@op("LogSoftmax")
def _log_softmax(node, ft, x):
    return torch.log_softmax(x, attribute(node, "axis", -1))
