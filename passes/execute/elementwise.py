"""Functions of single elements, of one tensor or of several that broadcast."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from qcompile.passes.execute.registry import op, plain
from qcompile.passes.graph import attribute

plain(
    {
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Erf": torch.erf,
        "Neg": torch.neg,
        "Abs": torch.abs,
        "Cos": torch.cos,
        "Sin": torch.sin,
        "Reciprocal": torch.reciprocal,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "HardSwish": F.hardswish,
        "Mish": F.mish,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
        "Round": torch.round,
        "Sign": torch.sign,
        "And": torch.logical_and,
        "Or": torch.logical_or,
        "Xor": torch.logical_xor,
        "Not": torch.logical_not,
        "Equal": torch.eq,
        "Greater": torch.gt,
        "Less": torch.lt,
        "GreaterOrEqual": torch.ge,
        "LessOrEqual": torch.le,
        "IsNaN": torch.isnan,
        "Identity": lambda x: x,
        "PRelu": lambda x, s: torch.where(x < 0, s * x, x),
        "Where": lambda c, a, b: torch.where(c, a, b),
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
    }
)


@op("Div")
def _div(node, ft, a, b):
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@op("Pow")
def _pow(node, ft, a, b):
    return torch.pow(a, b.to(a.dtype))


@op("Mod")
def _mod(node, ft, a, b):
    return torch.fmod(a, b) if attribute(node, "fmod", 0) else torch.remainder(a, b)


@op("Sum")
def _sum(node, ft, *a):
    return functools.reduce(torch.add, a)


@op("Max")
def _max(node, ft, *a):
    return functools.reduce(torch.maximum, a)


@op("Min")
def _min(node, ft, *a):
    return functools.reduce(torch.minimum, a)


@op("LeakyRelu")
def _leaky(node, ft, x):
    return F.leaky_relu(x, attribute(node, "alpha", 0.01))


@op("Elu")
def _elu(node, ft, x):
    return F.elu(x, attribute(node, "alpha", 1.0))


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


@op("HardSigmoid")
def _hard_sigmoid(node, ft, x):
    return torch.clamp(attribute(node, "alpha", 0.2) * x + attribute(node, "beta", 0.5), 0, 1)


@op("Gelu")
def _gelu(node, ft, x):
    return F.gelu(x, approximate=attribute(node, "approximate", "none"))


@op("Swish")
def _swish(node, ft, x):
    return x * torch.sigmoid(attribute(node, "alpha", 1.0) * x)


@op("ThresholdedRelu")
def _thresholded_relu(node, ft, x):
    return torch.where(x > attribute(node, "alpha", 1.0), x, torch.zeros_like(x))


@op("Shrink")
def _shrink(node, ft, x):
    bias, lambd = attribute(node, "bias", 0.0), attribute(node, "lambd", 0.5)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@op("Clip")
def _clip(node, ft, x, low=None, high=None):
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


_TYPES = {
    2: torch.uint8,
    3: torch.int8,
    4: torch.int64,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    12: torch.int64,
    13: torch.int64,
    21: torch.int8,
    22: torch.int8,
}
"""Integers by ONNX's number, in a type that torch computes with; all others are floats."""


@op("Cast")
def _cast(node, ft, x):
    return x.to(_TYPES.get(int(attribute(node, "to")), ft))


@op("CastLike")
def _cast_like(node, ft, x, like):
    return x.to(like.dtype)
