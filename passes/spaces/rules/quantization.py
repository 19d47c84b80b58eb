"""Operators of models that are quantized already. Codes are integers, so nothing may scale or mix them.

w = s (q - z)      channels of q trade places, with s and z; a scale per channel takes any positive factor
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import FIXED, POSITIVE
from qcompile.passes.spaces.rules.registry import rule
from qcompile.passes.spaces.stacks import summed_axes
from qcompile.passes.spaces.walk import NodeView


@rule("DequantizeLinear", always=True)
def dequantize(n: NodeView) -> None:
    """s (P q - P z) = P s (q - z): permutations; where s has an entry per channel, w' = D w with s' = D s, D > 0.

    In blocks, channels of one block trade places.
    """
    shape, scale = n.shape(0), n.shape(1)
    if not n.is_constant(0):
        _activation(n)
        return
    if shape is None or scale is None or not all(isinstance(d, int) for d in shape):
        return
    axis, block = int(n.attr("axis", 1)) % max(1, len(shape)), int(n.attr("block_size", 0))
    summed, out = summed_axes(n.node.outputs[0]), []
    for a in range(len(shape)):
        codes = n.claim(0, [a], reader=a - len(shape) in summed) if shape[a] != 1 else None
        if codes is None:
            continue
        inside = np.arange(codes.size) // block if block and a == axis else np.zeros(codes.size, np.int64)
        n.use(codes.table, "codes", FIXED, single=True, color=inside.reshape(codes.table.shape))
        # A vector of scales belongs to `axis`, whatever the size of the others.
        own = a if len(scale) > 1 else 0 if a == axis else len(scale)
        if own >= len(scale) or scale[own] != shape[a]:
            # One scale for all channels along this axis, or one per block of them.
            out.append(codes)
            continue
        y, steps = n.fresh_like(codes), n.claim(1, [own])
        if steps is None:
            n.pin(codes.table, "codes", f"the scale {n.value(1).name!r} belongs to no space")
            continue
        n.use(steps.table, "scale", POSITIVE, single=True)
        n.c.link(codes.flat, steps.flat)
        n.c.product(n.name, y.table, [steps.table.reshape(y.table.shape)], [1.0], [0])
        zero = n.claim(2, [own]) if n.has(2) else None
        if zero is not None:
            n.use(zero.table, "zero point", FIXED, single=True)
            n.c.link(codes.flat, zero.flat)
        elif n.has(2):
            n.pin(codes.table, "codes", f"the zero point {n.value(2).name!r} belongs to no space")
        out.append(y)
    n.set(out)


@rule("QuantizeLinear")
def quantize(n: NodeView) -> None:
    """round(x / s) + z with one s for all channels: permutations only."""
    _activation(n)


def _activation(n: NodeView) -> None:
    shape, scale = n.shape(0), n.shape(1)
    for m in n.maps(0):
        if shape is None or scale is None or any(d != 1 for d in scale):
            n.pin(m.table, "input", "is quantized with a scale per channel")
    n.fixed(n.maps(0), "quantized")
    n.set(n.maps(0))
