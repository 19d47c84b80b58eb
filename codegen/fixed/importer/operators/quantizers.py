"""Quantizers: where integers begin, and what scale they have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Port, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import DOMAIN, attribute, bare
from qcompile.codegen.fixed.importer.operators.rows import SoftmaxPending
from qcompile.codegen.fixed.importer.values import Codes, Constant, Linear, Pending, Real, rescale
from qcompile.codegen.fixed.nodes import Depthwise, MatVec
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError
from qcompile.formats.fixed import IntType, Requantize

WINDOWS = ("Conv", "MaxPool", "AveragePool")
"""Operators that read the channels of a pixel together."""


@operator("QuantizeLinear")
def _quantize(context: Context, node: ir.Node) -> Value:
    source = node.inputs[0]
    scale = context.constant(node.inputs[1], node)
    zero = (
        context.constant(node.inputs[2], node) if len(node.inputs) > 2 and node.inputs[2] is not None else np.uint8(0)
    )
    if np.size(scale) != 1 or np.any(zero):
        raise UnsupportedOperatorError(f"{label(node)}: activations need one scale and a zero point of 0")
    kind = IntType(8 * zero.dtype.itemsize, zero.dtype.kind == "i") if zero.dtype.kind in "iu" else None
    if kind is None:  # int4 and uint4
        kind = IntType(4, not str(zero.dtype).startswith("u"))
    return quantized(context, node, source, float(np.reshape(scale, ())), kind)


def quantized(context: Context, node: ir.Node, source: ir.Value | None, scale: float, kind: IntType) -> Real:
    """``source`` as integers of type ``kind`` with step ``scale``."""
    if source is not None and source.is_graph_input() and source not in context.values:
        return _input(context, node, source, scale, kind)
    found = context.get(source, node)
    if isinstance(found, Pending):
        # The most negative code is never used, as in QuantizeLinear with saturation it may be; the range is symmetric.
        return found.quantize(context.builder, scale, kind.low, kind.high)
    if isinstance(found, Real) and not found.log2:
        return Real(
            rescale(context.builder, bare(node), found.stream, found.scale, scale, kind.low, kind.high),
            found.index,
            scale,
        )
    raise UnsupportedOperatorError(f"{label(node)}: {source.name if source else ''!r} cannot be quantized")


def _input(context: Context, node: ir.Node, value: ir.Value, scale: float, kind: IntType) -> Real:
    shape = context.shape(value, node)
    positions = np.arange(math.prod(shape))
    if len(shape) == 3:  # an image travels by pixels
        channels, height, width = shape
        stream_shape, index = (height * width, channels), positions.reshape(height, width, channels).transpose(2, 0, 1)
    elif len(shape) == 2 and _slides(node.outputs[0]):  # a row of pixels
        stream_shape, index = shape[::-1], positions.reshape(shape[::-1]).T
    elif len(shape) in (1, 2):
        stream_shape, index = (1, *shape)[-2:], positions.reshape(shape)
    else:
        raise UnsupportedOperatorError(
            f"the input {value.name!r} of shape {shape} is neither a vector, tokens nor an image"
        )
    name = "".join(c if c.isalnum() else "_" for c in value.name or "input")
    stream = Stream.of(name, *stream_shape, kind, scale)
    context.streams.append(stream)
    context.inputs.append(Port(value.name or "input", shape, name, index, scale))
    return Real(stream, index, scale)


def _slides(value: ir.Value) -> bool:
    """Whether windows slide over a quantized value."""
    readers = [use.node for use in value.uses()]
    return any(n.op_type in WINDOWS or (n.op_type == "DequantizeLinear" and _slides(n.outputs[0])) for n in readers)


@operator("DequantizeLinear")
def _dequantize(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    if isinstance(found, Real):
        return found
    if not isinstance(found, Constant):
        raise UnsupportedOperatorError(f"{label(node)}: its input is not integers")
    codes = found.array.astype(np.int64)
    scale = np.asarray(context.constant(node.inputs[1], node), np.float64)
    zero = np.zeros((), np.int64)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = np.asarray(context.constant(node.inputs[2], node)).astype(np.int64)
    axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))

    def spread(parameter: np.ndarray) -> np.ndarray:
        if parameter.size == 1:
            return np.broadcast_to(parameter.reshape(()), codes.shape)
        if block:
            return np.repeat(parameter, block, axis=axis).take(range(codes.shape[axis]), axis=axis)
        shape = [1] * codes.ndim
        shape[axis] = -1
        return np.broadcast_to(parameter.reshape(shape), codes.shape)

    return Codes(codes - spread(zero), spread(scale))


MOST_LEVEL_BITS = 20
"""Integers that levels of a table may become."""


@operator("DequantizeTable", domain=DOMAIN)
def _dequantize_table(context: Context, node: ir.Node) -> Value:
    """Levels that are whole multiples of a power of two, as those of minifloats and of sums of powers of two, are integers."""
    codes, table, scale = (context.constant(value, node) for value in node.inputs[:3])
    length = int(attribute(node, "block_size", len(codes)))
    used = np.nan_to_num(np.asarray(table, np.float64))  # a code that is no number is not used
    for places in range(MOST_LEVEL_BITS + 1):
        levels = used * 2.0**places
        if (levels == np.rint(levels)).all():
            break
    else:
        raise UnsupportedOperatorError(
            f"{label(node)}: the levels of the format of {node.inputs[0].name!r} are no integers; "  # type: ignore[union-attr]
            "hardware takes integers, minifloats and sums of powers of two"
        )
    if np.abs(levels).max() >= 1 << MOST_LEVEL_BITS:
        raise UnsupportedOperatorError(
            f"{label(node)}: the levels of {node.inputs[0].name!r} need more than {MOST_LEVEL_BITS} bits as integers"  # type: ignore[union-attr]
        )
    integers = levels.astype(np.int64)[codes.astype(np.int64) & (len(levels) - 1)]
    spread = np.repeat(np.asarray(scale, np.float64), length, axis=0)[: len(codes)]
    return Codes(integers, spread * 2.0**-places)


@operator("Log2Quantize", domain=DOMAIN)
def _log2_quantize(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    if not isinstance(found, SoftmaxPending):
        raise UnsupportedOperatorError(f"{label(node)}: only the result of a softmax becomes powers of two")
    return found.codes(context, int(attribute(node, "bits", 4)))


@operator("Log2Dequantize", domain=DOMAIN)
def _log2_dequantize(context: Context, node: ir.Node) -> Value:
    return context.get(node.inputs[0], node)


@operator("Bipolar", domain=DOMAIN)
def _bipolar(context: Context, node: ir.Node) -> Value:
    """``sign(x @ w + b)`` with ``sign(0) = 1``, exactly: ``x @ w >= t`` for integers is ``2 x @ w + 1 - 2 t > 0``, never a tie."""
    found, scale = context.get(node.inputs[0], node), float(np.reshape(context.constant(node.inputs[1], node), ()))
    if not isinstance(found, Linear) or np.isfinite([found.low, found.high]).any():
        raise UnsupportedOperatorError(f"{label(node)}: only the result of a matrix or a convolution becomes its sign")
    step = Requantize(np.ones(1, np.int64), 0, -1, 1)
    zero = np.zeros(len(found.bias), np.int64)
    made = found.make(context.builder.name(found.where), zero, step)
    if not isinstance(made, MatVec | Depthwise) or (found.scale <= 0).any():
        raise UnsupportedOperatorError(
            f"{label(node)}: only a product with constants of positive scales becomes its sign"
        )
    threshold = np.ceil(-found.bias / found.scale - 1e-9).astype(np.int64)
    stream = context.builder.add(dataclasses.replace(made, weight=2 * made.weight, bias=1 - 2 * threshold, scale=scale))
    return Real(stream, found.index, scale)
