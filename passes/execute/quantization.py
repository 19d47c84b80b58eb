"""Quantizers and dequantizers: per tensor, per channel, per block."""

from __future__ import annotations

import torch

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.execute.registry import op
from qcompile.passes.graph import attribute


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
