"""Operators that only move elements, and those that join them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import attribute, bare
from qcompile.codegen.fixed.importer.values import Codes, Constant, Joined, Real, matrix_view
from qcompile.codegen.fixed.nodes import Prepend
from qcompile.errors import UnsupportedOperatorError


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
        raise UnsupportedOperatorError(
            f"{label(node)}: the batch axis must stay the first one; nn.MultiheadAttention moves it, "
            "scaled_dot_product_attention on (batch, heads, tokens, size) does not"
        )
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
