"""Pooling of any rank: MaxPool, AveragePool, LpPool, the global ones, MaxUnpool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._loops import check, grid, load, loops, store
from qcompile.codegen.relax.ops._windows import Windows, windows
from qcompile.codegen.relax.registry import converter


def _taps(win: Windows) -> list[Any]:
    return [te.reduce_axis((as_expr(0), as_expr(k)), name=f"k{i}") for i, k in enumerate(win.kernel)]


def _positions(win: Windows, o: Any, taps: Any) -> list[Any]:
    """Where each tap reads, relative to the unpadded tensor."""
    return [
        i * as_expr(s) + k * as_expr(d) - as_expr(b)
        for i, s, k, d, b in zip(o, win.strides, taps, win.dilations, win.before)
    ]


def _within(ctx: Context, positions: list[Any], low: list[Any], high: list[Any]) -> Any:
    condition = None
    for p, a, b in zip(positions, low, high):
        ok = tirx.And(p >= as_expr(a), p < as_expr(b))
        condition = ok if condition is None else tirx.And(condition, ok)
    return condition


def _pool(
    ctx: Context, x: relax.Expr, win: Windows, reducer: Any, identity: Any, before: Callable[[Any], Any], acc: str
) -> Callable[[te.Tensor], te.Tensor]:
    """The tensor expression reducing ``before(x)`` over each window, taps outside the tensor counting as ``identity``."""
    spatial = ctx.shape(x)[2:]

    def build(t: te.Tensor) -> te.Tensor:
        taps = _taps(win)

        def body(n: Any, c: Any, *o: Any) -> Any:
            at = _positions(win, o, taps)
            inside = _within(ctx, at, [0] * win.rank, spatial)
            value = tirx.if_then_else(inside, before(t(n, c, *at).astype(acc)), identity)
            return reducer(value, axis=taps)

        return te.compute([as_expr(d) for d in (*ctx.shape(x)[:2], *win.out)], body, name="pool")

    return build


@converter("", "MaxPool")
def _max_pool(ctx: Context, node: ir.Node, x: relax.Expr) -> list[relax.Expr]:
    """The maximum of each window and, as second output, its position in the flattened input."""
    win = windows(ctx, node, x, attr(node, "kernel_shape"))
    dtype = ctx.storage(x)
    out = ctx.te(_pool(ctx, x, win, kernels.MAX, kernels.lowest(dtype), lambda v: v, dtype), x, name="max_pool")
    if len(node.outputs) < 2 or not node.outputs[1].name:
        return [out]
    return [out, _max_positions(ctx, x, win, column_major=bool(attr(node, "storage_order", 0)))]


def _max_positions(ctx: Context, x: relax.Expr, win: Windows, *, column_major: bool) -> relax.Expr:
    dtype = ctx.storage(x)
    batch, channels, *spatial = ctx.shape(x)

    def combine(a: Any, b: Any) -> Any:
        first = tirx.Or(a[1] > b[1], tirx.And(tirx.EQ(a[1], b[1]), tirx.And(a[0] >= 0, a[0] < b[0])))
        first = tirx.And(a[0] >= 0, tirx.Or(first, b[0] < 0))
        return tirx.Select(first, a[0], b[0]), tirx.Select(first, a[1], b[1])

    reducer = te.comm_reducer(combine, lambda i, v: (tirx.const(-1, i), kernels.lowest(v)), name="argmax")

    def build(t: te.Tensor) -> te.Tensor:
        taps = _taps(win)

        def body(n: Any, c: Any, *o: Any) -> Any:
            at = _positions(win, o, taps)
            inside = _within(ctx, at, [0] * win.rank, spatial)
            flat = as_expr(0)
            axes = range(win.rank)
            for i in reversed(axes) if column_major else axes:
                flat = flat * as_expr(spatial[i]) + at[i]
            flat = (n * as_expr(channels) + c) * as_expr(ctx.dims.product(spatial)) + flat
            value = tirx.if_then_else(inside, t(n, c, *at), kernels.lowest(dtype))
            return reducer((tirx.Select(inside, flat, as_expr(-1)), value), axis=taps)

        shape = [as_expr(d) for d in (batch, channels, *win.out)]
        pairs = te.compute(shape, body, name="max_position")
        return te.compute(shape, lambda *i: pairs[0][i], name="position")

    return ctx.te(build, x, name="max_pool_indices")


@converter("", "AveragePool")
def _average_pool(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """The mean of each window: over the taps inside the tensor, or inside tensor and padding (``count_include_pad``)."""
    win = windows(ctx, node, x, attr(node, "kernel_shape"))
    include = attr(node, "count_include_pad", 0)
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    spatial = ctx.shape(x)[2:]
    low = [-b for b in win.before] if include else [0] * win.rank
    high = [d + a for d, a in zip(spatial, win.after)] if include else spatial
    total = _pool(ctx, x, win, kernels.SUM, tirx.const(0, acc), lambda v: v, acc)

    def build(t: te.Tensor) -> te.Tensor:
        sums = total(t)
        taps = _taps(win)

        def count(*o: Any) -> Any:
            inside = _within(ctx, _positions(win, o, taps), low, high)
            return te.sum(tirx.Select(inside, tirx.const(1, acc), tirx.const(0, acc)), axis=taps)

        counts = te.compute([as_expr(d) for d in win.out], count, name="count")
        return te.compute(sums.shape, lambda n, c, *o: (sums(n, c, *o) / counts(*o)).astype(dtype), name="average")

    return ctx.te(build, x, name="average_pool")


@converter("", "LpPool")
def _lp_pool(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """``(sum |x|^p)^(1/p)`` of each window."""
    win = windows(ctx, node, x, attr(node, "kernel_shape"))
    return _lp(ctx, node, x, win)


def _lp(ctx: Context, node: ir.Node, x: relax.Expr, win: Windows) -> relax.Expr:
    p = float(attr(node, "p", 2))
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)

    def power(v: Any) -> Any:
        return v * v if p == 2 else tirx.abs(v) if p == 1 else tirx.power(tirx.abs(v), tirx.const(p, acc))

    def root(v: Any) -> Any:
        return tirx.sqrt(v) if p == 2 else v if p == 1 else tirx.power(v, tirx.const(1 / p, acc))

    total = _pool(ctx, x, win, kernels.SUM, tirx.const(0, acc), power, acc)

    def build(t: te.Tensor) -> te.Tensor:
        sums = total(t)
        return te.compute(sums.shape, lambda *i: root(sums(*i)).astype(dtype), name="lp")

    return ctx.te(build, x, name="lp_pool")


def _whole(ctx: Context, x: relax.Expr) -> Windows:
    """One window covering all spatial axes."""
    spatial = tuple(ctx.shape(x)[2:])
    ones, zeros = (1,) * len(spatial), (0,) * len(spatial)
    return Windows(spatial, ones, ones, zeros, zeros, ones)


@converter("", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
def _global_pool(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    win = _whole(ctx, x)
    dtype = ctx.storage(x)
    if node.op_type == "GlobalMaxPool":
        return ctx.te(_pool(ctx, x, win, kernels.MAX, kernels.lowest(dtype), lambda v: v, dtype), x, name="global_max")
    if node.op_type == "GlobalLpPool":
        return _lp(ctx, node, x, win)
    acc = kernels.compute_dtype(dtype)
    axes = list(range(2, ctx.rank(x)))
    count = as_expr(ctx.dims.product(ctx.shape(x)[2:])).astype(acc)

    def build(t: te.Tensor) -> te.Tensor:
        total = kernels.reduce_te(
            ctx, t, axes, kernels.SUM, keepdims=True, before=lambda v: v.astype(acc), name="total"
        )
        return te.compute(total.shape, lambda *i: (total(*i) / count).astype(dtype), name="global_average")

    return ctx.te(build, x, name="global_average")


@converter("", "MaxUnpool")
def _max_unpool(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr, shape_input: Any = None) -> relax.Expr:
    """Puts the maxima back where MaxPool found them, zeros elsewhere."""
    shape, dtype = ctx.shape(x), ctx.storage(x)
    kernel = attr(node, "kernel_shape")
    rank = len(kernel)
    strides = attr(node, "strides", None) or [1] * rank
    pads = attr(node, "pads", None) or [0] * (2 * rank)
    pooled = shape[:2] + [
        ctx.dims.simplify((d - 1) * s + k - a - b)
        for d, s, k, a, b in zip(shape[2:], strides, kernel, pads[:rank], pads[rank:])
    ]
    out = pooled if shape_input is None else ctx.symbolic_or_dynamic(node.inputs[2])

    def body(values: Any, positions: Any, result: Any) -> None:
        with grid(*out) as i:
            store(result, i, tirx.const(0, dtype))
        with grid(*shape) as i:
            flat = load(positions, i)
            inside = tirx.And(flat >= as_expr(0), flat < as_expr(ctx.dims.product(pooled)))
            check(inside, "MaxUnpool: an index is out of range")
            at = []
            for size in reversed(pooled):  # the positions count in the tensor that was pooled
                at.append(tirx.floormod(flat, as_expr(size)))
                flat = tirx.floordiv(flat, as_expr(size))
            store(result, list(reversed(at)), load(values, i))

    return loops(ctx, body, [x, indices], [(out, dtype)], name="max_unpool")[0]
