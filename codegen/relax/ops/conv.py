"""Convolutions of any rank: Conv, ConvTranspose, DeformConv and the integer ones share one kernel builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._windows import Windows, windows
from qcompile.codegen.relax.ops.pad import pad
from qcompile.codegen.relax.registry import converter


def convolution(
    ctx: Context,
    x: relax.Expr,
    weight: relax.Expr,
    win: Windows,
    groups: int,
    acc: str,
) -> relax.Expr:
    """``out[n, m, o] = sum over c, k of x[n, group(m) + c, o * stride + k * dilation] * weight[m, c, k]`` in ``acc``.

    Args:
        ctx: the conversion.
        x: ``(batch, channels, *spatial)``.
        weight: ``(out channels, channels / groups, *kernel)``.
        win: the windows.
        groups: number of groups.
        acc: dtype of products and sums.
    """
    if win.padded():
        x = pad(ctx, x, [0, 0, *win.before], [0, 0, *win.after])
    batch, out_channels = ctx.shape(x)[0], ctx.shape(weight)[0]
    per_group = ctx.shape(weight)[1]
    ctx.require_equal(ctx.shape(x)[1], per_group * groups)
    group_out = ctx.dims.floordiv(out_channels, groups)

    def build(t: te.Tensor, w: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((as_expr(0), as_expr(per_group)), name="c")
        taps = [te.reduce_axis((as_expr(0), as_expr(k)), name=f"k{i}") for i, k in enumerate(win.kernel)]

        def body(n: Any, m: Any, *o: Any) -> Any:
            channel = c if groups == 1 else tirx.floordiv(m, as_expr(group_out)) * as_expr(per_group) + c
            at = [i * as_expr(s) + k * as_expr(d) for i, s, k, d in zip(o, win.strides, taps, win.dilations)]
            product = t(n, channel, *at).astype(acc) * w(m, c, *taps).astype(acc)
            return te.sum(product, axis=[c, *taps])

        return te.compute([as_expr(d) for d in (batch, out_channels, *win.out)], body, name="conv")

    return ctx.te(build, x, weight, name="conv")


def with_bias(ctx: Context, out: relax.Expr, bias: relax.Expr | None, dtype: str) -> relax.Expr:
    """Adds a per-channel bias and converts to the result type."""
    if bias is None:
        return ctx.cast(out, dtype)
    channel = ctx.reshape(bias, [1, *ctx.shape(bias), *[1] * (ctx.rank(out) - 2)])
    acc = ctx.storage(out)
    return kernels.elementwise(ctx, lambda v, b: v + b.astype(acc), out, channel, name="conv_bias", dtype=dtype)


@converter("", "Conv")
def _conv(ctx: Context, node: ir.Node, x: relax.Expr, w: relax.Expr, bias: relax.Expr | None = None) -> relax.Expr:
    dtype = ctx.storage(x)
    win = windows(ctx, node, x, ctx.shape(w)[2:])
    out = convolution(ctx, x, w, win, attr(node, "group", 1), kernels.compute_dtype(dtype))
    return with_bias(ctx, out, bias, dtype)


@converter("", "ConvTranspose")
def _conv_transpose(
    ctx: Context, node: ir.Node, x: relax.Expr, w: relax.Expr, bias: relax.Expr | None = None
) -> relax.Expr:
    """The gradient of a convolution with respect to its input; ``w`` is ``(channels, out channels / groups, *kernel)``."""
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    kernel, spatial = ctx.shape(w)[2:], ctx.shape(x)[2:]
    rank = len(kernel)
    groups = attr(node, "group", 1)
    strides = attr(node, "strides", None) or [1] * rank
    dilations = attr(node, "dilations", None) or [1] * rank
    extra = attr(node, "output_padding", None) or [0] * rank
    pads = list(attr(node, "pads", None) or [0] * (2 * rank))
    auto_pad = attr(node, "auto_pad", "NOTSET")
    wanted = attr(node, "output_shape", None)
    if wanted is not None:
        wanted = wanted[-rank:]
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [ctx.dims.simplify(d * s) for d, s in zip(spatial, strides)]
    before, out = [], []
    for i in range(rank):
        full = ctx.dims.simplify((spatial[i] - 1) * strides[i] + extra[i] + (kernel[i] - 1) * dilations[i] + 1)
        if wanted is not None:
            total = ctx.dims.maximum(ctx.dims.simplify(full - wanted[i]), 0)
            half = ctx.dims.floordiv(total, 2)
            before.append(half if auto_pad == "SAME_UPPER" else ctx.dims.simplify(total - half))
            out.append(wanted[i])
        else:
            first, last = (pads[i], pads[rank + i]) if auto_pad == "NOTSET" else (0, 0)
            before.append(first)
            out.append(ctx.dims.simplify(full - first - last))
    batch, channels = ctx.shape(x)[:2]
    group_in = ctx.dims.floordiv(channels, groups)
    group_out = ctx.shape(w)[1]
    out_channels = ctx.dims.simplify(group_out * groups)

    def build(t: te.Tensor, weight: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((as_expr(0), as_expr(group_in)), name="c")
        taps = [te.reduce_axis((as_expr(0), as_expr(k)), name=f"k{i}") for i, k in enumerate(kernel)]

        def body(n: Any, m: Any, *o: Any) -> Any:
            group = tirx.floordiv(m, as_expr(group_out))
            channel = group * as_expr(group_in) + c
            inside = None
            at = []
            for i in range(rank):
                reached = o[i] + as_expr(before[i]) - taps[i] * as_expr(dilations[i])
                position = tirx.floordiv(reached, as_expr(strides[i]))
                ok = tirx.And(
                    tirx.EQ(tirx.floormod(reached, as_expr(strides[i])), as_expr(0)),
                    tirx.And(position >= as_expr(0), position < as_expr(spatial[i])),
                )
                inside = ok if inside is None else tirx.And(inside, ok)
                at.append(position)
            product = t(n, channel, *at).astype(acc) * weight(
                channel, tirx.floormod(m, as_expr(group_out)), *taps
            ).astype(acc)
            return te.sum(tirx.if_then_else(inside, product, tirx.const(0, acc)), axis=[c, *taps])

        return te.compute([as_expr(d) for d in (batch, out_channels, *out)], body, name="conv_transpose")

    return with_bias(ctx, ctx.te(build, x, w, name="conv_transpose"), bias, dtype)


@converter("", "DeformConv")
def _deform_conv(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    w: relax.Expr,
    offset: relax.Expr,
    bias: relax.Expr | None = None,
    mask: relax.Expr | None = None,
) -> relax.Expr:
    """A 2-D convolution whose taps are moved by learned offsets and sampled bilinearly (Dai et al. 2017; masks: v2, 2018)."""
    if ctx.rank(x) != 4:
        raise ctx.unsupported(node, f"deformable convolution over {ctx.rank(x) - 2} spatial axes; two are supported")
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    groups, offset_groups = attr(node, "group", 1), attr(node, "offset_group", 1)
    win = windows(ctx, node, x, ctx.shape(w)[2:])
    batch, channels, height, width = ctx.shape(x)
    out_channels, per_group = ctx.shape(w)[:2]
    group_out = ctx.dims.floordiv(out_channels, groups)
    per_offset = ctx.dims.floordiv(channels, offset_groups)
    kh, kw = win.kernel

    def build(t: te.Tensor, weight: te.Tensor, off: te.Tensor, *masks: te.Tensor) -> te.Tensor:
        def sampled(n: Any, c: Any, i: Any, j: Any, oh: Any, ow: Any) -> Any:
            tap = (tirx.floordiv(c, as_expr(per_offset)) * as_expr(kh) + i) * as_expr(kw) + j
            y = (oh * win.strides[0] + i * win.dilations[0] - as_expr(win.before[0])).astype(acc)
            z = (ow * win.strides[1] + j * win.dilations[1] - as_expr(win.before[1])).astype(acc)
            y = y + off(n, tap * 2, oh, ow).astype(acc)
            z = z + off(n, tap * 2 + 1, oh, ow).astype(acc)
            value = bilinear(lambda a, b: t(n, c, a, b).astype(acc), y, z, height, width, acc)
            return value * masks[0](n, tap, oh, ow).astype(acc) if masks else value

        patches = te.compute(
            [as_expr(d) for d in (batch, channels, kh, kw, *win.out)], sampled, name="deformed_patches"
        )
        c = te.reduce_axis((as_expr(0), as_expr(per_group)), name="c")
        i, j = (te.reduce_axis((as_expr(0), as_expr(k)), name=f"k{n}") for n, k in enumerate((kh, kw)))

        def body(n: Any, m: Any, oh: Any, ow: Any) -> Any:
            channel = tirx.floordiv(m, as_expr(group_out)) * as_expr(per_group) + c
            return te.sum(patches(n, channel, i, j, oh, ow) * weight(m, c, i, j).astype(acc), axis=[c, i, j])

        return te.compute([as_expr(d) for d in (batch, out_channels, *win.out)], body, name="deform_conv")

    args = [x, w, offset] + ([mask] if mask is not None else [])
    return with_bias(ctx, ctx.te(build, *args, name="deform_conv"), bias, dtype)


def bilinear(read: Callable[[Any, Any], Any], y: Any, x: Any, height: Any, width: Any, acc: str) -> Any:
    """The bilinear interpolation of a plane at a fractional position; what lies outside counts as zero."""
    y0, x0 = tirx.floor(y), tirx.floor(x)
    total = None
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = y0.astype("int64") + dy, x0.astype("int64") + dx
            fy = y - y0 if dy else tirx.const(1, acc) - (y - y0)
            fx = x - x0 if dx else tirx.const(1, acc) - (x - x0)
            inside = tirx.And(
                tirx.And(row >= as_expr(0), row < as_expr(height)),
                tirx.And(column >= as_expr(0), column < as_expr(width)),
            )
            term = tirx.if_then_else(inside, read(row, column), tirx.const(0, acc)) * fy * fx
            total = term if total is None else total + term
    return total
