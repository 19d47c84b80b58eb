"""ONNX operators as torch functions. Each takes the node (for attributes), the float type and its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.graph import attribute

OPERATORS: dict[str, Callable[..., Any]] = {}


def op(*names: str) -> Callable[[Callable], Callable]:
    """Register an implementation."""

    def register(function: Callable) -> Callable:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def _simple(name: str, function: Callable) -> None:
    OPERATORS[name] = lambda node, ft, *a: function(*a)


_SIMPLE: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "MatMul": torch.matmul,
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
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
}
for _name, _function in _SIMPLE.items():
    _simple(_name, _function)


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
    total = a[0]
    for x in a[1:]:
        total = total + x
    return total


@op("Max")
def _max(node, ft, *a):
    result = a[0]
    for x in a[1:]:
        result = torch.maximum(result, x)
    return result


@op("Min")
def _min(node, ft, *a):
    result = a[0]
    for x in a[1:]:
        result = torch.minimum(result, x)
    return result


@op("LeakyRelu")
def _leaky(node, ft, x):
    return F.leaky_relu(x, attribute(node, "alpha", 0.01))


@op("Elu")
def _elu(node, ft, x):
    return F.elu(x, attribute(node, "alpha", 1.0))


@op("HardSigmoid")
def _hard_sigmoid(node, ft, x):
    return torch.clamp(attribute(node, "alpha", 0.2) * x + attribute(node, "beta", 0.5), 0, 1)


@op("Gelu")
def _gelu(node, ft, x):
    return F.gelu(x, approximate=attribute(node, "approximate", "none"))


@op("Swish")
def _swish(node, ft, x):
    return x * torch.sigmoid(attribute(node, "alpha", 1.0) * x)


@op("Clip")
def _clip(node, ft, x, low=None, high=None):
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@op("Softmax")
def _softmax(node, ft, x):
    return torch.softmax(x, attribute(node, "axis", -1))


@op("LogSoftmax")
def _log_softmax(node, ft, x):
    return torch.log_softmax(x, attribute(node, "axis", -1))


_TYPES = {
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
}


@op("Cast")
def _cast(node, ft, x):
    return x.to(_TYPES.get(int(attribute(node, "to")), ft))


@op("CastLike")
def _cast_like(node, ft, x, like):
    return x.to(like.dtype)


# -- shapes ----------------------------------------------------------------------------------------------------------


def _ints(x: torch.Tensor) -> list[int]:
    return [int(v) for v in x.reshape(-1).tolist()]


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
    return value.reshape(()).expand(_ints(shape)).clone()


@op("Shape")
def _shape(node, ft, x):
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return torch.tensor(list(x.shape)[slice(start, end)], dtype=torch.int64, device="cpu")


@op("Size")
def _size(node, ft, x):
    return torch.tensor(x.numel(), device="cpu")


@op("Reshape")
def _reshape(node, ft, x, shape):
    sizes = _ints(shape)
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


def _axes(node, given):
    return _ints(given) if given is not None else attribute(node, "axes")


@op("Squeeze")
def _squeeze(node, ft, x, axes=None):
    axes = _axes(node, axes)
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(int(a) for a in axes))


@op("Unsqueeze")
def _unsqueeze(node, ft, x, axes=None):
    axes = _axes(node, axes)
    rank = x.dim() + len(axes)
    for a in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(a)
    return x


@op("Expand")
def _expand(node, ft, x, shape):
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape))))


@op("Tile")
def _tile(node, ft, x, repeats):
    return x.repeat(_ints(repeats))


@op("Concat")
def _concat(node, ft, *a):
    return torch.cat(a, attribute(node, "axis"))


@op("Split")
def _split(node, ft, x, split=None):
    axis = attribute(node, "axis", 0)
    if split is None:
        parts = attribute(node, "num_outputs") or len(node.outputs)
        return x.split(-(-x.shape[axis] // parts), axis)
    return x.split(_ints(split), axis)


@op("Slice")
def _slice(node, ft, x, starts, ends, axes=None, steps=None):
    starts, ends = _ints(starts), _ints(ends)
    axes = list(range(len(starts))) if axes is None else _ints(axes)
    steps = [1] * len(starts) if steps is None else _ints(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps):
        size = x.shape[axis]
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(max(start, -size), end if end < size else None, step),)]
        else:
            index = range(size)[slice(start if start < size else None, end if end >= -size else None, step)]
            x = x.index_select(axis, torch.tensor(list(index), dtype=torch.int64))
    return x


@op("Pad")
def _pad(node, ft, x, pads, value=None, axes=None):
    pads = _ints(pads)
    axes = list(range(x.dim())) if axes is None else [a % x.dim() for a in _ints(axes)]
    n = len(axes)
    flat = [0] * (2 * x.dim())
    for k, a in enumerate(axes):
        flat[2 * (x.dim() - 1 - a)] = pads[k]
        flat[2 * (x.dim() - 1 - a) + 1] = pads[k + n]
    mode = attribute(node, "mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else float(value))
    used = max(k for k, v in enumerate(flat) if v) + 1 if any(flat) else 0
    return F.pad(x, flat[: used + used % 2], mode={"reflect": "reflect", "edge": "replicate"}[mode])


# -- indexing --------------------------------------------------------------------------------------------------------


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


@op("Range")
def _range(node, ft, start, limit, delta):
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@op("Trilu")
def _trilu(node, ft, x, k=None):
    k = 0 if k is None else int(k)
    return torch.triu(x, k) if attribute(node, "upper", 1) else torch.tril(x, k)


@op("CumSum")
def _cumsum(node, ft, x, axis):
    return torch.cumsum(x, int(axis))


@op("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceProd")
def _reduce(node, ft, x, axes=None):
    axes = _axes(node, axes)
    keep = bool(attribute(node, "keepdims", 1))
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return x
        axes = range(x.dim())
    axes = tuple(int(a) for a in axes)
    functions: dict[str, Callable[..., Any]] = {
        "ReduceMean": torch.mean,
        "ReduceSum": torch.sum,
        "ReduceMax": torch.amax,
        "ReduceMin": torch.amin,
        "ReduceL2": lambda t, a, keepdim: t.square().sum(a, keepdim=keepdim).sqrt(),
        "ReduceSumSquare": lambda t, a, keepdim: t.square().sum(a, keepdim=keepdim),
    }
    if node.op_type == "ReduceProd":
        for a in sorted((a % x.dim() for a in axes), reverse=True):
            x = x.prod(a, keepdim=keep)
        return x
    return functions[node.op_type](x, axes, keepdim=keep)


# -- quantization ----------------------------------------------------------------------------------------------------


@op("QuantizeLinear")
def _quantize(node, ft, x, scale, zero=None):
    scale, zero = _spread(node, x, scale), 0 if zero is None else _spread(node, x, zero).to(x.dtype)
    out = node.outputs[0].dtype
    if out is None or not out.is_integer():
        raise UnsupportedOperatorError(f"node {node.name!r}: {out} codes cannot be computed in float64")
    bits = int(out.bitwidth)
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if out.is_signed() else (0, (1 << bits) - 1)
    return torch.clamp(torch.round(x / scale) + zero, least, most)


@op("DequantizeLinear")
def _dequantize(node, ft, codes, scale, zero=None):
    scale, codes = _spread(node, codes, scale), codes.to(ft)
    return (codes if zero is None else codes - _spread(node, codes, zero).to(ft)) * scale


def _spread(node, x, parameter):
    """Scales or zero points, given per tensor, per channel or per block, as they meet ``x``."""
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [-1 if k == axis % max(1, x.dim()) else 1 for k in range(x.dim())]
    return parameter.reshape(shape) if parameter.dim() else parameter


# -- layers ----------------------------------------------------------------------------------------------------------


@op("Gemm")
def _gemm(node, ft, a, b, c=None):
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    y = attribute(node, "alpha", 1.0) * (a @ b)
    return y if c is None else y + attribute(node, "beta", 1.0) * c


def _spatial_pads(node, x, kernel, strides, dilations):
    auto = attribute(node, "auto_pad", "NOTSET")
    n = len(kernel)
    pads = list(attribute(node, "pads") or [0] * 2 * n)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * n
        for i in range(n):
            size = x.shape[2 + i]
            need = max(0, (-(-size // strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size)
            small, big = need // 2, need - need // 2
            pads[i], pads[i + n] = (small, big) if auto == "SAME_UPPER" else (big, small)
    return pads


def _pad_spatial(x, pads, value=0.0):
    n = len(pads) // 2
    flat = [v for i in reversed(range(n)) for v in (pads[i], pads[i + n])]
    return F.pad(x, flat, value=value) if any(flat) else x


@op("Conv")
def _conv(node, ft, x, w, b=None):
    n = x.dim() - 2
    strides = list(attribute(node, "strides") or [1] * n)
    dilations = list(attribute(node, "dilations") or [1] * n)
    x = _pad_spatial(x, _spatial_pads(node, x, list(w.shape[2:]), strides, dilations))
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
    return function(x, w, b, strides, 0, dilations, attribute(node, "group", 1))


@op("ConvTranspose")
def _conv_transpose(node, ft, x, w, b=None):
    n = x.dim() - 2
    pads = list(attribute(node, "pads") or [0] * 2 * n)
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]
    return function(
        x,
        w,
        b,
        list(attribute(node, "strides") or [1] * n),
        pads[:n],
        list(attribute(node, "output_padding") or [0] * n),
        attribute(node, "group", 1),
        list(attribute(node, "dilations") or [1] * n),
    )


@op("MaxPool", "AveragePool")
def _pool(node, ft, x):
    kernel = list(attribute(node, "kernel_shape"))
    n = len(kernel)
    strides = list(attribute(node, "strides") or [1] * n)
    dilations = list(attribute(node, "dilations") or [1] * n)
    pads = _spatial_pads(node, x, kernel, strides, dilations)
    ceil = bool(attribute(node, "ceil_mode", 0))
    if node.op_type == "MaxPool":
        x = _pad_spatial(x, pads, -math.inf)
        return {1: F.max_pool1d, 2: F.max_pool2d}[n](x, kernel, strides, 0, dilations, ceil)
    count = bool(attribute(node, "count_include_pad", 0))
    function = {1: F.avg_pool1d, 2: F.avg_pool2d}[n]
    if count or not any(pads):
        return function(_pad_spatial(x, pads), kernel, strides, 0, ceil)
    ones = function(_pad_spatial(torch.ones_like(x), pads), kernel, strides, 0, ceil)
    return function(_pad_spatial(x, pads), kernel, strides, 0, ceil) / ones


@op("LayerNormalization")
def _layer_norm(node, ft, x, scale=None, bias=None):
    axis = attribute(node, "axis", -1) % x.dim()
    axes = tuple(range(axis, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + attribute(node, "epsilon", 1e-5))
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


@op("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(node, ft, x, scale=None):
    axes = tuple(range(attribute(node, "axis", -1) % x.dim(), x.dim()))
    y = x / torch.sqrt(x.square().mean(axes, keepdim=True) + attribute(node, "epsilon", 1e-5))
    return y if scale is None else y * scale


@op("GroupNormalization")
def _group_norm(node, ft, x, scale, bias):
    return F.group_norm(x, attribute(node, "num_groups"), scale, bias, attribute(node, "epsilon", 1e-5))


@op("InstanceNormalization")
def _instance_norm(node, ft, x, scale, bias):
    return F.instance_norm(x, weight=scale, bias=bias, eps=attribute(node, "epsilon", 1e-5))


@op("BatchNormalization")
def _batch_norm(node, ft, x, scale, bias, mean, var):
    return F.batch_norm(x, mean, var, scale, bias, eps=attribute(node, "epsilon", 1e-5))


@op("RotaryEmbedding")
def _rotary(node, ft, x, cos, sin, position_ids=None):
    flat = x.dim() == 3
    if flat:
        heads = attribute(node, "num_heads", 0)
        x = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos[:, None], sin[:, None]
    rotated = attribute(node, "rotary_embedding_dim", 0) or x.shape[-1]
    head, rest = x[..., :rotated], x[..., rotated:]
    if attribute(node, "interleaved", 0):
        a, b = head[..., 0::2], head[..., 1::2]
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    y = torch.cat((y, rest), -1)
    return y.transpose(1, 2).reshape(*y.shape[:1], y.shape[2], -1) if flat else y


@op("Attention")
def _attention(node, ft, q, k, v, mask=None, past_k=None, past_v=None, *rest):
    flat = q.dim() == 3
    if flat:
        split = lambda x, h: x.reshape(*x.shape[:2], h, -1).transpose(1, 2)  # noqa: E731
        q_heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        q, k, v = split(q, q_heads), split(k, kv_heads), split(v, kv_heads)
    if past_k is not None:
        k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    present = (k, v)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = attribute(node, "scale", None) or 1 / math.sqrt(q.shape[-1])
    if attribute(node, "is_causal", 0):
        s, t = q.shape[2], k.shape[2]
        visible = torch.ones(s, t, dtype=torch.bool).tril(t - s if past_k is not None else 0)
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)
    if cap := attribute(node, "softcap", 0.0):
        scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        y = torch.softmax(scores, -1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    y = y.transpose(1, 2).reshape(*y.shape[:1], y.shape[2], -1) if flat else y
    return y, *present


@op("Einsum")
def _einsum(node, ft, *a):
    return torch.einsum(attribute(node, "equation"), *a)
