"""Functions of single elements that models rarely use, and other small operators. See `operators.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qcompile.passes.execute.operators import OPERATORS, _axes, _simple, op
from qcompile.passes.graph import attribute

__all__ = ["OPERATORS"]

for _name, _function in {
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Tan": torch.tan,
    "Erfc": torch.erfc,
    "Silu": F.silu,
    "IsInf": torch.isinf,
    "Dropout": lambda x, *_: x,
    "Mean": lambda *a: sum(a[1:], a[0]) / len(a),
}.items():
    _simple(_name, _function)


@op("Selu")
def _selu(node, ft, x):
    alpha, gamma = (
        attribute(node, "alpha", 1.67326319217681884765625),
        attribute(node, "gamma", 1.05070102214813232421875),
    )
    return gamma * torch.where(x > 0, x, alpha * (x.exp() - 1))


@op("Celu")
def _celu(node, ft, x):
    alpha = attribute(node, "alpha", 1.0)
    return x.clamp_min(0) + (alpha * ((x / alpha).exp() - 1)).clamp_max(0)


@op("ThresholdedRelu")
def _thresholded_relu(node, ft, x):
    return torch.where(x > attribute(node, "alpha", 1.0), x, torch.zeros_like(x))


@op("Shrink")
def _shrink(node, ft, x):
    bias, lambd = attribute(node, "bias", 0.0), attribute(node, "lambd", 0.5)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@op("SpaceToDepth")
def _space_to_depth(node, ft, x):
    b, (n, c, h, w) = int(attribute(node, "blocksize")), x.shape  # type: ignore[call-overload]
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("DepthToSpace")
def _depth_to_space(node, ft, x):
    b, (n, c, h, w) = int(attribute(node, "blocksize")), x.shape  # type: ignore[call-overload]
    if attribute(node, "mode", "DCR") == "CRD":
        return x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("ReduceL1", "ReduceLogSum", "ReduceLogSumExp")
def _more_reductions(node, ft, x, axes=None):
    axes = _axes(node, axes)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return x
    over = tuple(int(a) for a in axes) if axes else tuple(range(x.dim()))
    keep = bool(attribute(node, "keepdims", 1))
    if node.op_type == "ReduceL1":
        return x.abs().sum(over, keepdim=keep)
    if node.op_type == "ReduceLogSum":
        return x.sum(over, keepdim=keep).log()
    return x.logsumexp(over, keepdim=keep)
