"""The operators of ONNX in fixed point. Multiplications by constants and sums of constants wait for the quantizer that follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from scipy.special import erf

from qcompile.codegen.fixed.importer.driver import Context, Port, Value, label, operator
from qcompile.codegen.fixed.importer.values import (
    Codes,
    Constant,
    Function,
    Joined,
    Linear,
    Pending,
    Product,
    Real,
    Scaled,
    Sum,
    image_order,
    matrix_view,
)
from qcompile.codegen.fixed.nodes import (
    Depthwise,
    Geometry,
    MatMul,
    MatVec,
    MaxPool,
    Normalize,
    Prepend,
    Softmax,
    TokenSum,
    Window,
)
from qcompile.codegen.fixed.nodes.attention import exp_table
from qcompile.codegen.fixed.nodes.normalize import Z
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError
from qcompile.formats.fixed import IntType

DOMAIN = "qcompile"


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def bare(node: ir.Node) -> str:
    """A name for what a node makes."""
    return (node.outputs[0].name or node.op_type).split("/")[-1].split("::")[-1]


# Quantizers.


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
        from qcompile.codegen.fixed.importer.values import rescale

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


@operator("Log2Quantize", domain=DOMAIN)
def _log2_quantize(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    if not isinstance(found, _SoftmaxPending):
        raise UnsupportedOperatorError(f"{label(node)}: only the result of a softmax becomes powers of two")
    return found.codes(context, int(attribute(node, "bits", 4)))


@operator("Log2Dequantize", domain=DOMAIN)
def _log2_dequantize(context: Context, node: ir.Node) -> Value:
    return context.get(node.inputs[0], node)


# Movement.


@operator("Identity", "Dropout")
def _identity(context: Context, node: ir.Node) -> Value:
    return context.get(node.inputs[0], node)


def _move(context: Context, node: ir.Node, act: Callable[[np.ndarray], np.ndarray]) -> Value:
    """The first input, moved; ``act`` gets arrays with a batch axis of 1."""
    found = context.get(node.inputs[0], node)
    if isinstance(found, Constant):
        return Constant(act(found.array))
    if isinstance(found, Codes):
        return found.map(act)
    return found.moved(act(found.index[None])[0])


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    if isinstance(found, Constant | Codes):
        return _move(context, node, _constant_reshape(context, node, found.array.shape))
    shape = context.shape(node.outputs[0], node)
    if math.prod(shape) != found.index.size:
        raise UnsupportedOperatorError(f"{label(node)}: the batch axis must stay the first one")
    return found.moved(found.index.reshape(shape))


def _constant_reshape(context: Context, node: ir.Node, old: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    if node.op_type == "Reshape":
        wanted = context.constant(node.inputs[1], node).tolist()
        new = [old[i] if d == 0 else d for i, d in enumerate(wanted)]
        return lambda a: a.reshape(new)
    if node.op_type == "Flatten":
        axis = int(attribute(node, "axis", 1))
        return lambda a: a.reshape(math.prod(old[:axis]), -1)
    axes = tuple(context.constant(node.inputs[1], node).tolist()) if len(node.inputs) > 1 else None
    if node.op_type == "Squeeze":
        return lambda a: np.squeeze(a, axes)
    return lambda a: np.expand_dims(a, axes or ())


@operator("Transpose")
def _transpose(context: Context, node: ir.Node) -> Value:
    found = context.get(node.inputs[0], node)
    perm = attribute(node, "perm", None)
    if isinstance(found, Constant | Codes):
        return _move(context, node, lambda a: a.transpose(perm))
    if perm is None or perm[0] != 0:
        raise UnsupportedOperatorError(f"{label(node)}: the batch axis must stay the first one")
    return _move(context, node, lambda a: a.transpose(perm))


@operator("Split")
def _split(context: Context, node: ir.Node) -> list[Value]:
    found = context.get(node.inputs[0], node)
    axis = int(attribute(node, "axis", 0))
    if isinstance(found, Constant | Codes) or axis == 0:
        raise UnsupportedOperatorError(f"{label(node)}: it must split an activation, not along the batch")
    count = len(node.outputs)
    index = found.index[None]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        bounds = np.cumsum(context.constant(node.inputs[1], node))[:-1]
    else:
        size = -(-index.shape[axis] // count)
        bounds = np.arange(1, count) * size
    return [found.moved(part[0]) for part in np.split(index, bounds, axis)]


@operator("Slice")
def _slice(context: Context, node: ir.Node) -> Value:
    starts, ends = (context.constant(node.inputs[i], node).tolist() for i in (1, 2))
    rest = [context.constant(v, node).tolist() if v is not None else None for v in node.inputs[3:]]
    axes = rest[0] if rest and rest[0] is not None else range(len(starts))
    steps = rest[1] if len(rest) > 1 and rest[1] is not None else [1] * len(starts)

    def act(a: np.ndarray) -> np.ndarray:
        window = [slice(None)] * a.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps):
            window[axis] = slice(start, end if abs(end) < 2**31 else None, step)
        return a[tuple(window)]

    if not isinstance(context.get(node.inputs[0], node), Constant | Codes) and 0 in list(axes):
        raise UnsupportedOperatorError(f"{label(node)}: the batch cannot be sliced")
    return _move(context, node, act)


@operator("Gather")
def _gather(context: Context, node: ir.Node) -> Value:
    which, axis = context.constant(node.inputs[1], node), int(attribute(node, "axis", 0))
    if not isinstance(context.get(node.inputs[0], node), Constant | Codes) and axis == 0:
        raise UnsupportedOperatorError(f"{label(node)}: the batch cannot be gathered from")
    return _move(context, node, lambda a: np.take(a, which, axis))


@operator("Concat")
def _concat(context: Context, node: ir.Node) -> Value:
    axis = int(attribute(node, "axis", 0))
    found = [context.get(v, node) for v in node.inputs]
    if all(isinstance(v, Constant | Codes) for v in found):
        return Constant(np.concatenate([v.array for v in found], axis))  # type: ignore[union-attr]
    reals = [v for v in found if isinstance(v, Real)]
    rank = len(reals[0].index.shape) + 1 if reals else 0
    axis %= max(rank, 1)
    if len(reals) == len(found) and axis in (1, rank - 1):
        # Channels: axis 1 of an image, the last one of tokens.
        orders = [v.index.transpose(1, 2, 0) if rank == 4 and axis == 1 else v.index for v in reals]
        if rank == 4 and axis != 1:
            raise UnsupportedOperatorError(f"{label(node)}: images are joined along their channels")
        if rank == 3 and axis == 1:
            raise UnsupportedOperatorError(f"{label(node)}: tokens are joined with constant tokens only")
        streams = []
        for value, order in zip(reals, orders):
            stream, position = matrix_view(context.builder, value, label(node), order)
            if (position != np.arange(len(position))).any():
                raise UnsupportedOperatorError(f"{label(node)}: its inputs are reordered")
            streams.append((stream, value.scale))
        tokens, channels = streams[0][0].tokens, sum(s.channels for s, _ in streams)
        index = np.arange(tokens * channels).reshape(*orders[0].shape[:-1], channels)
        index = index.transpose(2, 0, 1) if rank == 4 else index
        return Joined(bare(node), index, (tokens, channels), tuple(streams))
    if len(reals) == 1 and len(found) == 2 and isinstance(found[0], Constant | Codes) and rank == 3 and axis == 1:
        value = reals[0]
        stream, position = matrix_view(context.builder, value, label(node))
        rows = np.clip(np.rint(found[0].array.reshape(-1, stream.channels) / value.scale), -127, 127).astype(np.int64)
        if (position != np.arange(len(position))).any():
            raise UnsupportedOperatorError(f"{label(node)}: its inputs are reordered")
        out = context.builder.add(Prepend(context.builder.name(bare(node)), (stream,), rows))
        return Real(out, np.arange(out.tokens * out.channels).reshape(out.shape), value.scale)
    raise UnsupportedOperatorError(
        f"{label(node)}: only quantized values along channels, or constant tokens in front, are joined"
    )


# Linear operators.


def weight(context: Context, value: ir.Value | None, node: ir.Node) -> Codes:
    """A constant operand as integers and scales.

    Raises:
        UnsupportedOperatorError: it is not quantized.
    """
    found = context.get(value, node)
    if not isinstance(found, Codes):
        raise UnsupportedOperatorError(f"{label(node)}: its weight {value.name if value else ''!r} is not quantized")
    return found


def column_scale(codes: Codes, node: ir.Node) -> np.ndarray:
    """Scales ``(N,)`` of a ``(K, N)`` weight."""
    if (codes.scale != codes.scale[:1]).any():
        raise UnsupportedOperatorError(f"{label(node)}: weights in groups along the sum; quantize per output channel")
    return codes.scale[0]


@operator("MatMul")
def _matmul(context: Context, node: ir.Node) -> Value:
    right = context.get(node.inputs[1], node)
    if isinstance(right, Real):
        return _product_of_streams(context, node, context.real(node.inputs[0], node), right)
    return _dense(context, node, weight(context, node.inputs[1], node))


@operator("Gemm")
def _gemm(context: Context, node: ir.Node) -> Value:
    if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        raise UnsupportedOperatorError(f"{label(node)}: only x @ w + b is supported")
    codes = weight(context, node.inputs[1], node)
    if attribute(node, "transB", 0):
        codes = codes.map(np.transpose)
    result = _dense(context, node, codes)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = result.plus(np.broadcast_to(context.constant(node.inputs[2], node), result.scale.shape))
    return result


def _dense(context: Context, node: ir.Node, codes: Codes) -> Linear:
    value = context.real(node.inputs[0], node)
    if codes.codes.ndim != 2:
        raise UnsupportedOperatorError(f"{label(node)}: a weight of {codes.codes.ndim} axes")
    stream, order = matrix_view(context.builder, value, label(node))
    n = codes.codes.shape[1]
    matrix = np.empty_like(codes.codes)
    matrix[order] = codes.codes
    index = np.arange(stream.tokens * n).reshape(*value.index.shape[:-1], n)
    scale = value.scale * column_scale(codes, node)
    return Linear(
        bare(node), index, (stream.tokens, n), scale, np.zeros(n),
        lambda name, bias, step: MatVec(name, (stream,), matrix, bias, step),
    )  # fmt: skip


def _product_of_streams(context: Context, node: ir.Node, left: Real, right: Real) -> Value:
    if right.log2:
        raise UnsupportedOperatorError(f"{label(node)}: powers of two must be the left operand")
    if left.index.ndim == 2:
        left, right = left.moved(left.index[None]), right.moved(right.index[None])
    heads, tokens = left.index.shape[:2]
    n = right.index.shape[2]
    a, a_order = matrix_view(context.builder, left, label(node), left.index.transpose(1, 0, 2).reshape(tokens, -1))
    # Scores read the rows of their right operand, values its columns.
    for transposed, index in ((False, right.index), (True, right.index.transpose(0, 2, 1))):  # noqa: B007  (read below)
        flat = index.transpose(1, 0, 2).reshape(index.shape[1], -1)
        if (np.diff(flat, axis=1) == 1).all():
            b, b_order = matrix_view(context.builder, right, label(node), flat)
            break
    else:
        raise UnsupportedOperatorError(f"{label(node)}: its right operand is not stored by tokens")
    if (np.diff(a_order) != 1).any() or (np.diff(b_order) != 1).any():
        raise UnsupportedOperatorError(f"{label(node)}: its operands are reordered within tokens")
    exponent = int(a.high.max()) if left.log2 else None
    scale = right.scale * (2.0**-exponent if exponent is not None else left.scale)
    index = np.arange(tokens * heads * n).reshape(tokens, heads, n).transpose(1, 0, 2)
    if len(node.outputs[0].shape or ()) == 3:
        index = index[0]
    return Linear(
        bare(node), index, (tokens, heads * n), np.array([scale]), np.zeros(1),
        lambda name, bias, step: MatMul(name, (a, b), heads, transposed, step, exponent), False,
    )  # fmt: skip


def geometry(context: Context, node: ir.Node, index: np.ndarray, kernel: tuple[int, ...]) -> Geometry:
    """The window of a convolution or pooling over ``(C, H, W)``."""
    if index.ndim != 3 or not image_order(index):
        raise UnsupportedOperatorError(f"{label(node)}: its input is not an image as convolutions make it")
    if len(kernel) != 2:
        raise UnsupportedOperatorError(f"{label(node)}: windows have two axes")
    _, height, width = index.shape
    stride = tuple(attribute(node, "strides", (1, 1)))
    dilation = tuple(attribute(node, "dilations", (1, 1)))
    pads = tuple(attribute(node, "pads", (0, 0, 0, 0)))
    automatic = attribute(node, "auto_pad", "NOTSET")
    if attribute(node, "ceil_mode", 0):
        raise UnsupportedOperatorError(f"{label(node)}: ceil_mode is not supported")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            for size, s, d, k in zip((height, width), stride, dilation, kernel)
        ]
        small = [t // 2 if automatic == "SAME_UPPER" else -(-t // 2) for t in total]
        pads = (small[0], small[1], total[0] - small[0], total[1] - small[1])
    return Geometry(height, width, (kernel[0], kernel[1]), stride, pads, dilation)  # type: ignore[arg-type]


def image_index(shape: tuple[int, int], channels: int) -> np.ndarray:
    """Positions of ``(C, H, W)`` in a frame of pixels."""
    return np.arange(shape[0] * shape[1] * channels).reshape(*shape, channels).transpose(2, 0, 1)


@operator("Conv")
def _conv(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    codes = weight(context, node.inputs[1], node)
    out, per_group, *kernel = codes.codes.shape
    window = geometry(context, node, value.index, tuple(kernel))
    channels, groups = value.index.shape[0], int(attribute(node, "group", 1))
    # (O, C / groups, kh, kw) -> (kh kw C / groups, O)
    matrix = codes.map(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, out))
    scale = value.scale * column_scale(matrix, node)
    bias = np.zeros(out)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = np.asarray(context.constant(node.inputs[2], node), np.float64)
    index = image_index(window.out_shape, out)
    if groups == channels == out and per_group == 1:
        return Linear(
            bare(node), index, (window.windows, out), scale, bias,
            lambda name, b, step: Depthwise(name, (value.stream,), window, matrix.codes, b, step),
        )  # fmt: skip
    taps, dense = window.taps, matrix.codes
    if groups > 1:  # a block for every group, zeros elsewhere
        dense = np.zeros((taps, channels, out), np.int64)
        blocks = matrix.codes.reshape(taps, per_group, out)
        for group in range(groups):
            rows, columns = (slice(group * n, (group + 1) * n) for n in (per_group, out // groups))
            dense[:, rows, columns] = blocks[:, :, columns]
        dense = dense.reshape(-1, out)
    stream = value.stream
    if (window.taps, window.stride, window.padded) != (1, (1, 1), False):
        stream = context.builder.add(Window(context.builder.name(f"{bare(node)}_window"), (stream,), window))
    return Linear(
        bare(node), index, (window.windows, out), scale, bias,
        lambda name, b, step: MatVec(name, (stream,), dense, b, step),
    )  # fmt: skip


@operator("MaxPool")
def _maxpool(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    window = geometry(context, node, value.index, tuple(attribute(node, "kernel_shape", ())))
    out = context.builder.add(MaxPool(context.builder.name(bare(node)), (value.stream,), window))
    return Real(out, image_index(window.out_shape, out.channels), value.scale)


@operator("AveragePool")
def _average(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    window = geometry(context, node, value.index, tuple(attribute(node, "kernel_shape", ())))
    if window.padded and not attribute(node, "count_include_pad", 0):
        raise UnsupportedOperatorError(f"{label(node)}: padding must count (count_include_pad=1)")
    channels = value.index.shape[0]
    ones = np.ones((window.taps, channels), np.int64)
    return Linear(
        bare(node), image_index(window.out_shape, channels), (window.windows, channels),
        np.full(channels, value.scale / window.taps), np.zeros(channels),
        lambda name, bias, step: Depthwise(name, (value.stream,), window, ones, bias, step),
    )  # fmt: skip


@operator("GlobalAveragePool", "ReduceMean")
def _mean(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    rank = value.index.ndim + 1
    axes = list(range(2, rank))
    if node.op_type == "ReduceMean":
        given = context.constant(node.inputs[1], node).tolist() if len(node.inputs) > 1 else attribute(node, "axes", [])
        axes = sorted(a % rank for a in given)
    order = value.index
    if rank == 4 and axes == [2, 3]:
        order = order.transpose(1, 2, 0)
    elif not (rank == 3 and axes == [1]):
        raise UnsupportedOperatorError(
            f"{label(node)}: means are taken over all pixels or all tokens, not over axes {axes}"
        )
    stream, position = matrix_view(context.builder, value, label(node), order)
    channels = stream.channels
    keep = rank == 4 if node.op_type == "GlobalAveragePool" else bool(attribute(node, "keepdims", 1))
    index = np.empty(channels, np.int64)
    index[np.arange(channels)] = position
    shape = {(4, True): (channels, 1, 1), (3, True): (1, channels)}.get((rank, keep), (channels,))
    return Linear(
        bare(node), index.reshape(shape), (1, channels), np.array([value.scale / stream.tokens]), np.zeros(1),
        lambda name, bias, step: TokenSum(name, (stream,), step), False,
    )  # fmt: skip


# Activations.


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
    if isinstance(left, Constant | Codes):
        if sign < 0:
            raise UnsupportedOperatorError(f"{label(node)}: a constant minus an activation")
        left, right = right, left
    if isinstance(right, Constant | Codes):
        pending = _scaled(context, node, left) if isinstance(left, Real) else left
        if not isinstance(pending, Linear | Scaled):
            raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before a constant is added")
        if np.isfinite(pending.low) or np.isfinite(pending.high):
            raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer after its activation")
        offset = sign * _per_channel(pending, right.array, node)
        if isinstance(pending, Linear):
            if len(offset) > 1:
                raise UnsupportedOperatorError(f"{label(node)}: its input needs a quantizer before a table is added")
            return pending.plus(offset[0])
        return pending.plus(offset)
    a, b = (context.real(v, node) for v in node.inputs)
    streams = _aligned(context, node, a, b)
    return Sum(bare(node), _same_index(a), streams[0].shape, streams, (a.scale, sign * b.scale))


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
        raise UnsupportedOperatorError(f"{label(node)}: operands of shapes {a.index.shape} and {b.index.shape}")
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


# Rows.


class _SoftmaxPending(Pending):
    """A softmax before its quantizer decides the form of the probabilities."""

    def __init__(self, where: str, index: np.ndarray, stream: Stream, heads: int, scale: float) -> None:
        super().__init__(where, index, stream.shape)
        self.stream, self.heads, self.scale = stream, heads, scale

    def codes(self, context: Context, bits: int) -> Real:
        """As codes of powers of two."""
        table = exp_table(self.scale, self.stream.type)
        out = context.builder.add(Softmax(context.builder.name(self.where), (self.stream,), table, self.heads, bits))
        return Real(out, self.index, 1.0, log2=True)

    def build(self, builder: Any, scale: float, low: int, high: int) -> Stream:
        raise UnsupportedOperatorError(f"{self.where}: probabilities must be powers of two (Log2Quantize)")

    def reach(self) -> float:
        return 1.0


@operator("Softmax")
def _softmax(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    index = value.index if value.index.ndim == 3 else value.index[None]
    axis = int(attribute(node, "axis", -1))
    if axis not in (-1, value.index.ndim) or value.index.ndim not in (2, 3):
        raise UnsupportedOperatorError(f"{label(node)}: the softmax must run over the last axis")
    heads, tokens, _ = index.shape
    stream, order = matrix_view(context.builder, value, label(node), index.transpose(1, 0, 2).reshape(tokens, -1))
    if (np.diff(order) != 1).any():
        raise UnsupportedOperatorError(f"{label(node)}: its rows are reordered")
    out = np.arange(index.size).reshape(tokens, heads, -1).transpose(1, 0, 2)
    return _SoftmaxPending(bare(node), out if value.index.ndim == 3 else out[0], stream, heads, value.scale)


@operator("LayerNormalization", "RMSNormalization")
def _normalization(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    axis = int(attribute(node, "axis", -1))
    if axis not in (-1, value.index.ndim):
        raise UnsupportedOperatorError(f"{label(node)}: it must normalise the last axis")
    stream, order = matrix_view(context.builder, value, label(node))
    c = stream.channels
    epsilon = max(1, round(float(attribute(node, "epsilon", 1e-5)) * c * c / value.scale**2))
    centred = node.op_type == "LayerNormalization"
    name = context.builder.name(f"{bare(node)}_normal")
    normal = context.builder.add(Normalize(name, (stream,), epsilon, centred))
    factor = np.full(c, 2.0**-Z)
    offset = np.zeros((1, c))
    columns = np.empty(c, np.int64)  # logical column of every position
    columns[order] = np.arange(c)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        factor = factor * context.constant(node.inputs[1], node).reshape(-1)[columns]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        offset = offset + context.constant(node.inputs[2], node).reshape(-1)[columns]
    index = np.arange(normal.tokens)[:, None] * c + order
    return Scaled(bare(node), index.reshape(value.index.shape), normal.shape, normal, factor, offset)
