"""Normalizations: LayerNormalization, RMSNormalization, BatchNormalization and the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._kernels import index_of
from qcompile.codegen.relax.registry import converter


def _zero_at(axes: Sequence[int], index: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(as_expr(0) if i in axes else v for i, v in enumerate(index))


@converter("", "LayerNormalization")
def _layer_norm(
    ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr, bias: relax.Expr | None = None
) -> list[relax.Expr]:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias`` over the dimensions from ``axis`` on."""
    rank = ctx.rank(x)
    axes = list(range(attr(node, "axis", -1) % rank, rank))
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    epsilon = attr(node, "epsilon", 1e-5)
    shape = ctx.shape(x)
    count = ctx.dims.product([shape[a] for a in axes])
    extra = [t for t in (scale, bias) if t is not None]
    statistics = len(node.outputs) > 1

    def build(t: te.Tensor, *parameters: te.Tensor) -> Any:
        n = as_expr(count).astype(acc)
        total = kernels.reduce_te(
            ctx, t, axes, kernels.SUM, keepdims=True, before=lambda v: v.astype(acc), name="total"
        )
        mean = te.compute(total.shape, lambda *i: total[i] / n, name="mean")
        squares = _sum_of(t, axes, lambda i: _square(t[i].astype(acc) - mean[_zero_at(axes, i)]), "squares")
        inverse = te.compute(
            squares.shape,
            lambda *i: tirx.const(1, acc) / tirx.sqrt(squares[i] / n + tirx.const(epsilon, acc)),
            name="inv",
        )

        def normal(*i: Any) -> Any:
            at = _zero_at(axes, i)
            value = (t[i].astype(acc) - mean[at]) * inverse[at]
            for p, operand in enumerate(parameters):
                element = operand[index_of(ctx.shape(extra[p]), shape, i, ctx)].astype(acc)
                value = value * element if p == 0 else value + element
            return value.astype(dtype)

        out = te.compute(t.shape, normal, name="layer_norm")
        return [out, mean, inverse] if statistics else out

    result = ctx.te(build, x, *extra, name="layer_norm")
    if not statistics:
        return [result]
    stash = (ctx.target and None) or "float32" if acc != "float64" else acc
    return [result[0], *(ctx.cast(r, stash) for r in result[1:])]


def _square(v: Any) -> Any:
    return v * v


def _sum_of(t: te.Tensor, axes: Sequence[int], value: Any, name: str) -> te.Tensor:
    """The sum of ``value(index)`` over the axes, which stay as dimensions of size 1."""
    loops = {a: te.reduce_axis((as_expr(0), t.shape[a]), name=f"k{a}") for a in axes}
    shape = [as_expr(1) if i in loops else d for i, d in enumerate(t.shape)]
    return te.compute(
        shape,
        lambda *i: te.sum(
            value(tuple(loops[n].var if n in loops else v for n, v in enumerate(i))), axis=list(loops.values())
        ),
        name=name,
    )


@converter("", "RMSNormalization")
def _rms_norm(ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr) -> relax.Expr:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the dimensions from ``axis`` on; the result has the scale's type."""
    rank = ctx.rank(x)
    axes = list(range(attr(node, "axis", -1) % rank, rank))
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    epsilon = attr(node, "epsilon", 1e-5)
    shape = ctx.shape(x)
    count = ctx.dims.product([shape[a] for a in axes])
    out_dtype = ctx.storage(scale)

    def build(t: te.Tensor, s: te.Tensor) -> te.Tensor:
        squares = _sum_of(t, axes, lambda i: _square(t[i].astype(acc)), "squares")
        inverse = te.compute(
            squares.shape,
            lambda *i: (
                tirx.const(1, acc) / tirx.sqrt(squares[i] / as_expr(count).astype(acc) + tirx.const(epsilon, acc))
            ),
            name="inverse",
        )

        def normal(*i: Any) -> Any:
            weight = s[index_of(ctx.shape(scale), shape, i, ctx)].astype(acc)
            return (t[i].astype(acc) * inverse[_zero_at(axes, i)] * weight).astype(out_dtype)

        return te.compute(t.shape, normal, name="rms_norm")

    return ctx.te(build, x, scale, name="rms_norm")


def _channel(ctx: Context, parameter: relax.Expr, rank: int) -> relax.Expr:
    """A per-channel vector shaped to broadcast along dimension 1."""
    return ctx.reshape(parameter, [1, *ctx.shape(parameter), *[1] * (rank - 2)])


@converter("", "BatchNormalization")
def _batch_norm(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    scale: relax.Expr,
    bias: relax.Expr,
    mean: relax.Expr,
    variance: relax.Expr,
) -> list[relax.Expr]:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias`` per channel; in training mode with the batch's own statistics."""
    rank = ctx.rank(x)
    epsilon = attr(node, "epsilon", 1e-5)
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    version = ctx.version(node)
    training = attr(node, "training_mode", 0) if version >= 14 else version < 7 and not attr(node, "is_test", 0)
    extra: list[relax.Expr] = []
    if training:
        momentum = attr(node, "momentum", 0.9)
        batch_mean, batch_variance = _moments(ctx, x, [0, *range(2, rank)])

        def running(old: Any, new: Any) -> Any:
            return old * tirx.const(momentum, str(old.ty.dtype)) + new.astype(str(old.ty.dtype)) * tirx.const(
                1 - momentum, str(old.ty.dtype)
            )

        extra = [
            kernels.elementwise(
                ctx, running, old, ctx.reshape(new, ctx.shape(old)), name="running", dtype=ctx.storage(old)
            )
            for old, new in ((mean, batch_mean), (variance, batch_variance))
        ]
        mean, variance = (ctx.reshape(v, ctx.shape(mean)) for v in (batch_mean, batch_variance))

    def normal(v: Any, s: Any, b: Any, m: Any, var: Any) -> Any:
        s, b, m, var = (p.astype(acc) for p in (s, b, m, var))
        return (v - m) / tirx.sqrt(var + tirx.const(epsilon, acc)) * s + b

    parameters = [_channel(ctx, p, rank) for p in (scale, bias, mean, variance)]
    out = kernels.elementwise(ctx, normal, x, *parameters, name="batch_norm", dtype=dtype)
    return [out, *extra]


def _moments(ctx: Context, x: relax.Expr, axes: Sequence[int]) -> list[relax.Expr]:
    """Mean and (population) variance over axes, which stay as dimensions of size 1."""
    acc = kernels.compute_dtype(ctx.storage(x))
    count = ctx.dims.product([ctx.shape(x)[a] for a in axes])

    def build(t: te.Tensor) -> list[te.Tensor]:
        n = as_expr(count).astype(acc)
        total = kernels.reduce_te(
            ctx, t, axes, kernels.SUM, keepdims=True, before=lambda v: v.astype(acc), name="total"
        )
        mean = te.compute(total.shape, lambda *i: total[i] / n, name="mean")
        squares = _sum_of(t, axes, lambda i: _square(t[i].astype(acc) - mean[_zero_at(axes, i)]), "squares")
        return [mean, te.compute(squares.shape, lambda *i: squares[i] / n, name="variance")]

    return ctx.te(build, x, name="moments")


@converter("", "InstanceNormalization")
def _instance_norm(ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    rank = ctx.rank(x)
    mean, variance = _moments(ctx, x, range(2, rank))
    return _normalized(
        ctx, x, mean, variance, attr(node, "epsilon", 1e-5), _channel(ctx, scale, rank), _channel(ctx, bias, rank)
    )


def _normalized(
    ctx: Context,
    x: relax.Expr,
    mean: relax.Expr,
    variance: relax.Expr,
    epsilon: float,
    scale: relax.Expr,
    bias: relax.Expr,
) -> relax.Expr:
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)

    def normal(v: Any, m: Any, var: Any, s: Any, b: Any) -> Any:
        return (v - m) / tirx.sqrt(var + tirx.const(epsilon, acc)) * s.astype(acc) + b.astype(acc)

    return kernels.elementwise(ctx, normal, x, mean, variance, scale, bias, name="normalize", dtype=dtype)


@converter("", "GroupNormalization")
def _group_norm(ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    """Statistics per group of channels; scale and bias per channel (opset 21) or per group (opset 18)."""
    groups = attr(node, "num_groups")
    shape = ctx.shape(x)
    per_group = ctx.dims.floordiv(shape[1], groups)
    grouped: list[Dim] = [shape[0], groups, per_group, *shape[2:]]
    wide = ctx.reshape(x, grouped)
    mean, variance = _moments(ctx, wide, range(2, len(grouped)))
    tail = [1] * (len(shape) - 2)
    if ctx.version(node) >= 21:
        parameters = [ctx.reshape(p, [1, groups, per_group, *tail]) for p in (scale, bias)]
    else:
        parameters = [ctx.reshape(p, [1, groups, 1, *tail]) for p in (scale, bias)]
    return ctx.reshape(_normalized(ctx, wide, mean, variance, attr(node, "epsilon", 1e-5), *parameters), shape)


@converter("", "LpNormalization")
def _lp_norm(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """``x / ||x||_p`` along an axis (p 1 or 2); 0 where the norm is 0."""
    axis, p = attr(node, "axis", -1) % ctx.rank(x), attr(node, "p", 2)
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)

    def build(t: te.Tensor) -> te.Tensor:
        total = kernels.reduce_te(
            ctx,
            t,
            [axis],
            kernels.SUM,
            keepdims=True,
            before=lambda v: _square(v.astype(acc)) if p == 2 else tirx.abs(v.astype(acc)),
            name="total",
        )

        def normal(*i: Any) -> Any:
            norm = total[_zero_at([axis], i)]
            norm = tirx.sqrt(norm) if p == 2 else norm
            zero = tirx.EQ(norm, tirx.const(0, acc))
            one = tirx.const(1, acc)
            return tirx.Select(zero, tirx.const(0, acc), t[i].astype(acc) / tirx.Select(zero, one, norm)).astype(dtype)

        return te.compute(t.shape, normal, name="lp_norm")

    return ctx.te(build, x, name="lp_norm")


@converter("", "LRN")
def _lrn(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """``x / (bias + alpha / size * sum of x^2 over size neighbouring channels) ^ beta``."""
    size, alpha = attr(node, "size"), attr(node, "alpha", 1e-4)
    beta, bias = attr(node, "beta", 0.75), attr(node, "bias", 1.0)
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    channels = ctx.shape(x)[1]

    def build(t: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((as_expr(0), as_expr(size)), name="k")

        def term(*i: Any) -> Any:
            c = i[1] + k.var - as_expr((size - 1) // 2)
            inside = tirx.And(c >= as_expr(0), c < as_expr(channels))
            return tirx.if_then_else(inside, _square(t[(i[0], c, *i[2:])].astype(acc)), tirx.const(0, acc))

        squares = te.compute(t.shape, lambda *i: te.sum(term(*i), axis=k), name="squares")
        return te.compute(
            t.shape,
            lambda *i: (
                t[i].astype(acc)
                / tirx.power(tirx.const(bias, acc) + tirx.const(alpha / size, acc) * squares[i], tirx.const(beta, acc))
            ).astype(dtype),
            name="lrn",
        )

    return ctx.te(build, x, name="lrn")
