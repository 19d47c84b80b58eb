"""Matrix products, convolutions, pooling, normalization and attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.execute.registry import op, plain
from qcompile.passes.graph import attribute

plain(
    {
        "MatMul": torch.matmul,
        "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
        "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
    }
)


@op("Gemm")
def _gemm(node, ft, a, b, c=None):
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    y = attribute(node, "alpha", 1.0) * (a @ b)
    return y if c is None else y + attribute(node, "beta", 1.0) * c


@op("Einsum")
def _einsum(node, ft, *a):
    return torch.einsum(attribute(node, "equation"), *a)


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
    strides = list(attribute(node, "strides") or [1] * n)
    dilations = list(attribute(node, "dilations") or [1] * n)
    longer = list(attribute(node, "output_padding") or [0] * n)
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]
    y = function(x, w, b, strides, 0, longer, attribute(node, "group", 1), dilations)
    pads, sizes = attribute(node, "pads") or [0] * 2 * n, attribute(node, "output_shape")
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = sizes or [size * stride for size, stride in zip(x.shape[2:], strides)]
    if sizes:
        surplus = [have - wanted for have, wanted in zip(y.shape[2:], sizes)]
        small, big = [v // 2 for v in surplus], [v - v // 2 for v in surplus]
        pads = small + big if auto == "SAME_UPPER" else big + small
    return _pad_spatial(y, [-v for v in pads])


@op("MaxPool", "AveragePool")
def _pool(node, ft, x):
    kernel = list(attribute(node, "kernel_shape"))
    n = len(kernel)
    strides = list(attribute(node, "strides") or [1] * n)
    dilations = list(attribute(node, "dilations") or [1] * n)
    pads = _spatial_pads(node, x, kernel, strides, dilations)
    ceil = bool(attribute(node, "ceil_mode", 0))
    if node.op_type == "AveragePool" and any(d != 1 for d in dilations):
        raise UnsupportedOperatorError(f"node {node.name!r}: AveragePool with dilations cannot be executed in float64")
    if node.op_type == "MaxPool":
        x = _pad_spatial(x, pads, -math.inf)
        return {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[n](x, kernel, strides, 0, dilations, ceil)
    count = bool(attribute(node, "count_include_pad", 0))
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[n]
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
