"""Convolutions and pooling: windows over images, and means."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import attribute, bare
from qcompile.codegen.fixed.importer.operators.linear import integer_matrix, report_vanished, weight
from qcompile.codegen.fixed.importer.values import Linear, Real, matrix_view
from qcompile.codegen.fixed.nodes import Depthwise, Geometry, MatVec, MaxPool, TokenSum, Window
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError


def image(context: Context, node: ir.Node) -> tuple[Real, Stream]:
    """The first input as an image ``(C, H, W)``, a row of pixels where it has one axis only, and the stream of its pixels."""
    value = context.real(node.inputs[0], node)
    index = value.index[:, None] if value.index.ndim == 2 else value.index
    if index.ndim != 3:
        raise UnsupportedOperatorError(
            f"{label(node)}: its input has shape {value.index.shape}; images have channels and one or two axes"
        )
    stream, order = matrix_view(context.builder, value, label(node), index.transpose(1, 2, 0).reshape(-1, len(index)))
    if (order != np.arange(len(order))).any():
        raise UnsupportedOperatorError(f"{label(node)}: the channels of its input are reordered")
    return value.moved(index), stream


def geometry(node: ir.Node, image_shape: tuple[int, ...], kernel: tuple[int, ...]) -> Geometry:
    """The window of a convolution or pooling over ``(C, H, W)``; windows along one axis are one row high."""
    _, height, width = image_shape
    rank = len(kernel)
    stride = tuple(attribute(node, "strides", (1,) * rank))
    dilation = tuple(attribute(node, "dilations", (1,) * rank))
    pads = tuple(attribute(node, "pads", (0,) * 2 * rank))
    if rank == 1:
        kernel, stride, dilation, pads = (1, *kernel), (1, *stride), (1, *dilation), (0, pads[0], 0, pads[1])
    automatic = attribute(node, "auto_pad", "NOTSET")
    if attribute(node, "ceil_mode", 0):
        raise UnsupportedOperatorError(f"{label(node)}: ceil_mode is not supported; pad by hand")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            for size, s, d, k in zip((height, width), stride, dilation, kernel)
        ]
        small = [t // 2 if automatic == "SAME_UPPER" else -(-t // 2) for t in total]
        pads = (small[0], small[1], total[0] - small[0], total[1] - small[1])
    return Geometry(height, width, (kernel[0], kernel[1]), stride, pads, dilation)  # type: ignore[arg-type]


def image_index(window: Geometry, channels: int, kernel: tuple[int, ...]) -> np.ndarray:
    """Positions of the result ``(C, H, W)``, or ``(C, W)`` of windows along one axis, in a frame of pixels."""
    shape = window.out_shape if len(kernel) == 2 else window.out_shape[1:]
    return np.moveaxis(np.arange(window.windows * channels).reshape(*shape, channels), -1, 0)


@operator("Conv")
def _conv(context: Context, node: ir.Node) -> Value:
    value, stream = image(context, node)
    codes = weight(context, node.inputs[1], node)
    out, per_group, *kernel = codes.codes.shape
    window = geometry(node, value.index.shape, tuple(kernel))
    channels, groups = value.index.shape[0], int(attribute(node, "group", 1))
    # (O, C / groups, kh, kw) -> (kh kw C / groups, O)
    matrix = codes.map(lambda a: np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, out))
    found = integer_matrix(matrix)
    report_vanished(context, node, found)
    scale = value.scale * found.scale
    bias = np.zeros(out)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = np.asarray(context.constant(node.inputs[2], node), np.float64)
    index = image_index(window, out, tuple(kernel))
    if groups == channels == out and per_group == 1:
        return Linear(
            bare(node), index, (window.windows, out), scale, bias,
            lambda name, b, step: Depthwise(name, (stream,), window, found.weight, b, step),
        )  # fmt: skip
    taps, dense = window.taps, found.weight
    if groups > 1:  # a block for every group, zeros elsewhere
        dense = np.zeros((taps, channels, out), np.int64)
        blocks = found.weight.reshape(taps, per_group, out)
        for group in range(groups):
            rows, columns = (slice(group * n, (group + 1) * n) for n in (per_group, out // groups))
            dense[:, rows, columns] = blocks[:, :, columns]
        dense = dense.reshape(-1, out)
    if (window.taps, window.stride, window.padded) != (1, (1, 1), False):
        stream = context.builder.add(Window(context.builder.name(f"{bare(node)}_window"), (stream,), window))
    return Linear(
        bare(node), index, (window.windows, out), scale, bias,
        lambda name, b, step: MatVec(name, (stream,), dense, b, step),
    )  # fmt: skip


@operator("MaxPool")
def _maxpool(context: Context, node: ir.Node) -> Value:
    value, stream = image(context, node)
    kernel = tuple(attribute(node, "kernel_shape", ()))
    window = geometry(node, value.index.shape, kernel)
    out = context.builder.add(MaxPool(context.builder.name(bare(node)), (stream,), window))
    return Real(out, image_index(window, out.channels, kernel), value.scale)


@operator("AveragePool")
def _average(context: Context, node: ir.Node) -> Value:
    value, stream = image(context, node)
    kernel = tuple(attribute(node, "kernel_shape", ()))
    window = geometry(node, value.index.shape, kernel)
    if window.padded and not attribute(node, "count_include_pad", 0):
        raise UnsupportedOperatorError(f"{label(node)}: padding must count (count_include_pad=1)")
    channels = value.index.shape[0]
    ones = np.ones((window.taps, channels), np.int64)
    return Linear(
        bare(node), image_index(window, channels, kernel), (window.windows, channels),
        np.full(channels, value.scale / window.taps), np.zeros(channels),
        lambda name, bias, step: Depthwise(name, (stream,), window, ones, bias, step),
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
    elif rank == 3 and axes == [2]:
        order = order.T
    elif not (rank == 3 and axes == [1]):
        raise UnsupportedOperatorError(
            f"{label(node)}: means are taken over all pixels or all tokens, not over axes {axes}"
        )
    stream, position = matrix_view(context.builder, value, label(node), order)
    channels = stream.channels
    keep = node.op_type == "GlobalAveragePool" or bool(attribute(node, "keepdims", 1))
    index = np.empty(channels, np.int64)
    index[np.arange(channels)] = position
    shape = tuple(1 if a in axes else channels for a in range(1, rank)) if keep else (channels,)
    return Linear(
        bare(node), index.reshape(shape), (1, channels), np.array([value.scale / stream.tokens]), np.zeros(1),
        lambda name, bias, step: TokenSum(name, (stream,), step), False,
    )  # fmt: skip
