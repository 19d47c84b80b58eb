"""Padding, cropping and repetition at the borders: Pad, CenterCropPad."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops.shape import slice_axis
from qcompile.codegen.relax.registry import converter


def pad(
    ctx: Context, x: relax.Expr, before: list[Dim], after: list[Dim], value: Any = None, mode: str = "constant"
) -> relax.Expr:
    """The tensor with elements added (or, for negative counts, removed) at both ends of every axis.

    ``value`` is a scalar tensor expression or ``None`` for zero.
    """
    shape, dtype = ctx.shape(x), ctx.storage(x)
    out = [ctx.dims.simplify(d + b + a) for d, b, a in zip(shape, before, after)]
    out = [d if isinstance(d, int) or ctx.dims.over_inputs(d) else ctx.new_dim(d, "padded") for d in out]
    touched = [not (isinstance(b, int) and b == 0 and isinstance(a, int) and a == 0) for b, a in zip(before, after)]
    if not any(touched):
        return x
    zero = tirx.const(False, "bool") if dtype == "bool" else tirx.const(0, "float32" if dtype == "bfloat16" else dtype)

    def build(t: te.Tensor, *fill: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            at, inside = [], []
            for i, d, b, changed in zip(index, shape, before, touched):
                size = as_expr(d)
                position = i - as_expr(b) if changed else i
                if changed and mode == "constant":
                    inside += [position >= as_expr(0), position < size]
                elif changed and mode == "edge":
                    position = tirx.max(tirx.min(position, size - 1), as_expr(0))
                elif changed and mode == "wrap":
                    position = tirx.floormod(position, size)
                elif changed:
                    period = tirx.max((size - 1) * 2, as_expr(1))
                    position = tirx.floormod(position, period)
                    position = tirx.Select(position < size, position, period - position)
                at.append(position)
            value_here = t(*at)
            if not inside:
                return value_here
            condition = inside[0]
            for other in inside[1:]:
                condition = tirx.And(condition, other)
            outside = fill[0]() if fill else zero.astype(dtype)
            return tirx.if_then_else(condition, value_here, outside)

        return te.compute([as_expr(d) for d in out], body, name="pad")

    return ctx.te(build, x, *([ctx.reshape(value, [])] if value is not None else []), name="pad")


@converter("", "Pad")
def _pad(
    ctx: Context, node: ir.Node, x: relax.Expr, pads_input: Any = None, value: Any = None, axes_input: Any = None
) -> relax.Expr:
    rank = ctx.rank(x)
    mode = attr(node, "mode", "constant")
    if ctx.version(node) < 11:
        pads: list[Dim] = list(attr(node, "pads", None) or attr(node, "paddings"))
        constant = attr(node, "value", 0.0)
        value = ctx.const(np.array(constant), ctx.storage(x)) if constant else None
        axes = None
    else:
        pads = ctx.symbolic_or_dynamic(node.inputs[1])
        given = len(node.inputs) > 3 and node.inputs[3] is not None
        axes = ctx.symbolic_or_dynamic(node.inputs[3]) if given else None
    axes = list(range(rank)) if axes is None else axes
    before: list[Dim] = [0] * rank
    after: list[Dim] = [0] * rank
    for i, axis in enumerate(axes):
        first, last = pads[i], pads[len(axes) + i]
        if isinstance(axis, int):
            before[axis % rank], after[axis % rank] = first, last
            continue
        for d in range(rank):  # known at run time only: any axis may be the one
            here = tirx.Or(tirx.EQ(axis, as_expr(d)), tirx.EQ(axis, as_expr(d - rank)))
            before[d] = tirx.Select(here, as_expr(first), as_expr(before[d]))
            after[d] = tirx.Select(here, as_expr(last), as_expr(after[d]))
    return pad(ctx, x, before, after, value if mode == "constant" else None, mode)


@converter("", "CenterCropPad")
def _center_crop_pad(ctx: Context, node: ir.Node, x: relax.Expr, shape_input: Any) -> relax.Expr:
    """Crops or zero-pads the given axes around their centre to the wanted sizes."""
    rank = ctx.rank(x)
    axes = [a % rank for a in attr(node, "axes", list(range(rank)))]
    wanted = ctx.symbolic_or_dynamic(node.inputs[1])
    for axis, size in zip(axes, wanted):
        old = ctx.shape(x)[axis]
        if isinstance(old, int) and isinstance(size, int):
            if old > size:
                x = slice_axis(ctx, x, axis, (old - size) // 2, size)
            elif old < size:
                before = [0] * rank
                after = [0] * rank
                before[axis] = (size - old) // 2
                after[axis] = size - old - before[axis]
                x = pad(ctx, x, before, after)
            continue
        grown = ctx.dims.maximum(size - old, 0)
        cut = ctx.dims.floordiv(ctx.dims.maximum(old - size, 0), 2)
        begin = ctx.dims.simplify(ctx.dims.floordiv(grown, 2) - cut)
        before, after = [0] * rank, [0] * rank
        before[axis], after[axis] = begin, ctx.dims.simplify(size - old - begin)
        x = pad(ctx, x, before, after)
    return x
