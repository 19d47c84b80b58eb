"""Activations, sums and products, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from scipy.special import erf

from qcompile.codegen.fixed.importer.driver import Context, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import attribute, bare
from qcompile.codegen.fixed.importer.values import (
    Codes,
    Constant,
    Function,
    Linear,
    Pending,
    Product,
    Real,
    Scaled,
    Sum,
    matrix_view,
)
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError


@operator("Relu")
def _relu(context: Context, node: ir.Node) -> Value:
    return _clamp(context, node, 0.0, np.inf)


@operator("Clip")
def _clip(context: Context, node: ir.Node) -> Value:
    bounds = [-np.inf, np.inf]
    for i in (0, 1):
        if len(node.inputs) > i + 1 and node.inputs[i + 1] is not None:
            bounds[i] = float(np.reshape(context.constant(node.inputs[i + 1], node), ()))
    return _clamp(context, node, *bounds)


def _clamp(context: Context, node: ir.Node, low: float, high: float) -> Value:
    found = context.get(node.inputs[0], node)
    pending = found if isinstance(found, Pending) else _scaled(context, node, context.real(node.inputs[0], node))
    return pending.clamped(low, high)


FUNCTIONS: dict[str, Callable[[ir.Node], Callable[[np.ndarray], np.ndarray]]] = {
    "Sigmoid": lambda node: lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": lambda node: np.tanh,
    "Erf": lambda node: erf,
    "Exp": lambda node: np.exp,
    "Softplus": lambda node: lambda x: np.logaddexp(0, x),
    "Swish": lambda node: lambda x: x / (1 + np.exp(-float(attribute(node, "alpha", 1.0)) * x)),
    "HardSwish": lambda node: lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "HardSigmoid": lambda node: (
        lambda x: np.clip(float(attribute(node, "alpha", 0.2)) * x + float(attribute(node, "beta", 0.5)), 0, 1)
    ),
    "Elu": lambda node: lambda x: np.where(x > 0, x, float(attribute(node, "alpha", 1.0)) * np.expm1(np.minimum(x, 0))),
    "Abs": lambda node: np.abs,
    "Sin": lambda node: np.sin,
    "Cos": lambda node: np.cos,
    "Softsign": lambda node: lambda x: x / (1 + np.abs(x)),
    "Mish": lambda node: lambda x: x * np.tanh(np.logaddexp(0, x)),
    "Celu": lambda node: (
        lambda x: np.maximum(x, 0) + (a := float(attribute(node, "alpha", 1.0))) * np.expm1(np.minimum(x / a, 0))
    ),
    "Selu": lambda node: (
        lambda x: (
            float(attribute(node, "gamma", 1.0507009873554805))
            * np.where(x > 0, x, float(attribute(node, "alpha", 1.6732632423543772)) * np.expm1(np.minimum(x, 0)))
        )
    ),
    "ThresholdedRelu": lambda node: lambda x: np.where(x > float(attribute(node, "alpha", 1.0)), x, 0.0),
    "LeakyRelu": lambda node: lambda x: np.where(x > 0, x, float(attribute(node, "alpha", 0.01)) * x),
    "Gelu": lambda node: (
        (lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
        if attribute(node, "approximate", "none") == "tanh"
        else (lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))))
    ),
}
"""Functions of one variable, which become tables."""


@operator(*FUNCTIONS)
def _function(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    shape = value.stream.shape
    return Function(bare(node), value.index, shape, value.stream, value.scale, FUNCTIONS[node.op_type](node))


@operator("PRelu")
def _prelu(context: Context, node: ir.Node) -> Value:
    value, slopes = context.real(node.inputs[0], node), np.unique(context.constant(node.inputs[1], node))
    if len(slopes) != 1:
        raise UnsupportedOperatorError(f"{label(node)}: its slope must be the same for all channels")
    slope = float(slopes[0])
    return Function(
        bare(node), value.index, value.stream.shape, value.stream, value.scale, lambda x: np.where(x > 0, x, slope * x)
    )


# Sums and products.


def _scaled(context: Context, node: ir.Node, value: Real) -> Scaled:
    """A value that constants may still be added to, in the shape of its last axis or its channels."""
    stream = value.stream
    return Scaled(
        bare(node),
        value.index,
        stream.shape,
        stream,
        np.full(stream.channels, value.scale),
        np.zeros((1, stream.channels)),
    )


def _per_channel(pending: Linear | Scaled, array: np.ndarray, node: ir.Node) -> np.ndarray:
    """A constant operand, broadcast to the value, in the frame of the node: ``(tokens or 1, channels)``."""
    whole = np.broadcast_to(array, (1, *pending.index.shape))[0]
    frame = np.empty(pending.index.size, np.float64)
    if pending.index.size != math.prod(pending.shape):
        raise UnsupportedOperatorError(f"{label(node)}: a constant meets a part of {pending.where}")
    frame[pending.index.reshape(-1)] = whole.reshape(-1)
    frame = frame.reshape(pending.shape)
    return frame[:1] if (frame == frame[:1]).all() else frame


@operator("Add", "Sub")
def _add(context: Context, node: ir.Node) -> Value:
    left, right = (context.get(v, node) for v in node.inputs)
    sign = -1.0 if node.op_type == "Sub" else 1.0
    if isinstance(left, Constant | Codes) and isinstance(right, Constant | Codes):
        return Constant(left.array + sign * right.array)
    turned = 1.0
    if isinstance(left, Constant | Codes):  # c - x = -x + c
        left, right, turned, sign = right, left, sign, 1.0
    if isinstance(right, Constant | Codes):
        pending = _scaled(context, node, left) if isinstance(left, Real) else left
        if not isinstance(pending, Linear | Scaled):
            raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before a constant is added")
        if np.isfinite(pending.low) or np.isfinite(pending.high):
            raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer after its activation")
        pending = pending.times(turned) if turned < 0 else pending
        offset = sign * _per_channel(pending, right.array, node)
        if isinstance(pending, Linear):
            if len(offset) > 1:
                raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before a table is added")
            return pending.plus(offset[0])
        return pending.plus(offset)
    a, b = (context.real(v, node) for v in node.inputs)
    streams = _aligned(context, node, a, b)
    return Sum(bare(node), _same_index(a), streams[0].shape, streams, (a.scale, sign * b.scale))


@operator("Neg")
def _negative(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    if isinstance(found, Constant | Codes):
        return Constant(-found.array)
    pending = _scaled(context, node, found) if isinstance(found, Real) else found
    if not isinstance(pending, Linear | Scaled) or np.isfinite(pending.low) or np.isfinite(pending.high):
        raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before it is negated")
    return pending.times(-1.0)


@operator("Mul", "Div")
def _multiply(context: Context, node: ir.Node) -> Value:
    left, right = (context.get(v, node) for v in node.inputs)
    divide = node.op_type == "Div"
    if isinstance(left, Constant | Codes) and isinstance(right, Constant | Codes):
        return Constant(left.array / right.array if divide else left.array * right.array)
    if isinstance(left, Constant | Codes) and not divide:
        left, right = right, left
    if isinstance(right, Constant | Codes):
        factor = 1 / right.array if divide else right.array
        pending = _scaled(context, node, left) if isinstance(left, Real) else left
        if not isinstance(pending, Linear | Scaled) or np.isfinite(pending.low) or np.isfinite(pending.high):
            raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before it is multiplied")
        if np.size(factor) == 1:
            return pending.times(float(np.reshape(factor, ())))
        table = _per_channel(pending, factor, node)
        if len(table) > 1:
            raise UnsupportedOperatorError(f"{label(node)}: a factor that differs between tokens")
        return pending.times(table[0])
    if divide:
        raise UnsupportedOperatorError(f"{label(node)}: a division by an activation")
    a, b = (context.real(v, node) for v in node.inputs)
    streams = _aligned(context, node, a, b)
    return Product(bare(node), _same_index(a), streams[0].shape, streams, a.scale * b.scale)


def _aligned(context: Context, node: ir.Node, a: Real, b: Real) -> tuple[Stream, Stream]:
    """Both streams, element for element."""
    if a.index.shape != b.index.shape or a.log2 or b.log2:
        raise UnsupportedOperatorError(
            f"{label(node)}: operands of shapes {a.index.shape} and {b.index.shape}; two activations must have the same"
        )
    if a.stream.shape == b.stream.shape and a.index.size == math.prod(a.stream.shape) and (a.index == b.index).all():
        return a.stream, b.stream
    views = []
    for value in (a, b):
        stream, order = matrix_view(context.builder, value, label(node))
        if (order != np.arange(len(order))).any():
            raise UnsupportedOperatorError(f"{label(node)}: its operands come in different orders")
        views.append(stream)
    return views[0], views[1]


def _same_index(a: Real) -> np.ndarray:
    return a.index if a.index.size == math.prod(a.stream.shape) else np.arange(a.index.size).reshape(a.index.shape)
