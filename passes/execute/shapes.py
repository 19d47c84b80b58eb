"""Operators that make, move, cut and fill tensors without computing with their elements."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.execute.registry import axes_of, ints, op
from qcompile.passes.graph import attribute


@op("Constant")
def _constant(node, ft):
    for name, value in node.attributes.items():
        if name == "value":
            array = value.value.numpy()
            tensor = torch.from_numpy(np.array(array))
            return tensor.to(ft) if tensor.is_floating_point() else tensor
        dtype = ft if "float" in name else torch.int64
        return torch.tensor(value.value, dtype=dtype)
    raise ValueError("constant without a value")


@op("ConstantOfShape")
def _constant_of_shape(node, ft, shape):
    fill = attribute(node, "value")
    value = torch.zeros(1, dtype=ft) if fill is None else torch.from_numpy(np.array(fill.numpy()))
    value = value.to(ft) if value.is_floating_point() else value
    return value.reshape(()).expand(ints(shape)).clone()


@op("Range")
def _range(node, ft, start, limit, delta):
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@op("Shape")
def _shape(node, ft, x):
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return torch.tensor(list(x.shape)[slice(start, end)], dtype=torch.int64, device="cpu")


@op("Size")
def _size(node, ft, x):
    return torch.tensor(x.numel(), device="cpu")


@op("Reshape")
def _reshape(node, ft, x, shape):
    sizes = ints(shape)
    if not attribute(node, "allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


@op("Flatten")
def _flatten(node, ft, x):
    axis = attribute(node, "axis", 1) % (x.dim() + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@op("Transpose")
def _transpose(node, ft, x):
    return x.permute(tuple(attribute(node, "perm") or range(x.dim())[::-1]))


@op("Squeeze")
def _squeeze(node, ft, x, axes=None):
    axes = axes_of(node, axes)
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(int(a) for a in axes))


@op("Unsqueeze")
def _unsqueeze(node, ft, x, axes=None):
    axes = axes_of(node, axes)
    rank = x.dim() + len(axes)
    for a in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(a)
    return x


@op("Expand")
def _expand(node, ft, x, shape):
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape))))


@op("Tile")
def _tile(node, ft, x, repeats):
    return x.repeat(ints(repeats))


@op("Concat")
def _concat(node, ft, *a):
    return torch.cat(a, attribute(node, "axis"))


@op("Split")
def _split(node, ft, x, split=None):
    axis = attribute(node, "axis", 0)
    if split is None:
        parts = attribute(node, "num_outputs") or len(node.outputs)
        return x.split(-(-x.shape[axis] // parts), axis)
    return x.split(ints(split), axis)


@op("Slice")
def _slice(node, ft, x, starts, ends, axes=None, steps=None):
    starts, ends = ints(starts), ints(ends)
    axes = list(range(len(starts))) if axes is None else ints(axes)
    steps = [1] * len(starts) if steps is None else ints(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps):
        size = x.shape[axis]
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(max(start, -size), end if end < size else None, step),)]
        else:
            index = range(size)[slice(start if start < size else None, end if end >= -size else None, step)]
            x = x.index_select(axis, torch.tensor(list(index), dtype=torch.int64))
    return x


MODES = {"reflect": "reflect", "edge": "replicate"}
"""Of padding, by ONNX's name: torch's."""


@op("Pad")
def _pad(node, ft, x, pads, value=None, axes=None):
    pads = ints(pads)
    axes = list(range(x.dim())) if axes is None else [a % x.dim() for a in ints(axes)]
    n = len(axes)
    flat = [0] * (2 * x.dim())
    for k, a in enumerate(axes):
        flat[2 * (x.dim() - 1 - a)] = pads[k]
        flat[2 * (x.dim() - 1 - a) + 1] = pads[k + n]
    mode = attribute(node, "mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else float(value))
    used = max(k for k, v in enumerate(flat) if v) + 1 if any(flat) else 0
    if mode not in MODES:
        raise UnsupportedOperatorError(f"node {node.name!r}: Pad of mode {mode!r} cannot be executed in float64")
    return F.pad(x, flat[: used + used % 2], mode=MODES[mode])


@op("Trilu")
def _trilu(node, ft, x, k=None):
    k = 0 if k is None else int(k)
    return torch.triu(x, k) if attribute(node, "upper", 1) else torch.tril(x, k)


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
