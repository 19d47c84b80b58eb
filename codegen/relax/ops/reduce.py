"""Reductions over axes, ArgMax/ArgMin, Softmax and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._axes import Axes
from qcompile.codegen.relax.ops._loops import OPAQUE
from qcompile.codegen.relax.registry import converter


def reduction_axes(ctx: Context, node: ir.Node, x: relax.Expr) -> Axes:
    """The axes of a Reduce* node, from its input or attribute; all of them where none are given."""
    rank = ctx.rank(x)
    axes = Axes.of_node(ctx, node, rank)
    if axes is None or axes.count == 0:
        return Axes.of(ctx, rank, [] if attr(node, "noop_with_empty_axes", 0) else range(rank))
    return axes


def _reduction(
    ctx: Context, node: ir.Node, x: relax.Expr, build: Callable[[te.Tensor, Axes, list[Dim]], te.Tensor]
) -> relax.Expr:
    """Emits a reduction; ``build`` leaves the axes with size 1, they are removed here where the node says so."""
    axes = reduction_axes(ctx, node, x)
    ones = axes.ones(ctx.shape(x))
    attrs = None if axes.static else OPAQUE
    out = ctx.te(lambda t: build(t, axes, ones), x, name=node.op_type.lower(), attrs=attrs)
    return out if attr(node, "keepdims", 1) else ctx.reshape(out, axes.removed(ctx.shape(x)))


def _register(
    op_type: str,
    reducer: Any,
    before: Callable[[Any], Any] = lambda v: v,
    after: Callable[[Any, Any], Any] | None = None,
) -> None:
    """A reduction of ``before(x)``, then ``after(total, number of elements)``."""

    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
        dtype = ctx.storage(x)
        acc = kernels.compute_dtype(dtype)

        def build(t: te.Tensor, axes: Axes, ones: list[Dim]) -> te.Tensor:
            total = axes.reduce(t, ones, reducer, before=lambda v: before(v.astype(acc)), name="total")
            if after is None and acc == dtype:
                return total
            count = as_expr(axes.size(ctx.shape(x)))

            def finish(*i: Any) -> Any:
                return (after(total(*i), count) if after else total(*i)).astype(dtype)

            return te.compute(total.shape, finish, name="finish")

        return _reduction(ctx, node, x, build)


def _mean(total: Any, count: Any) -> Any:
    dtype = str(total.ty.dtype)
    n = count.astype(dtype)
    if dtypes.is_float(dtype):
        return total / n
    return tirx.truncdiv(total, tirx.Select(tirx.EQ(n, tirx.const(0, dtype)), tirx.const(1, dtype), n))


def _magnitude(v: Any) -> Any:
    return v if dtypes.is_unsigned(str(v.ty.dtype)) else tirx.abs(v)


def _through_float(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda v, count: function(v if dtypes.is_float(str(v.ty.dtype)) else v.astype("float64"))


_register("ReduceSum", kernels.SUM)
_register("ReduceMean", kernels.SUM, after=_mean)
_register("ReduceProd", kernels.PRODUCT)
_register("ReduceL1", kernels.SUM, before=_magnitude)
_register("ReduceL2", kernels.SUM, before=lambda v: v * v, after=_through_float(tirx.sqrt))
_register("ReduceSumSquare", kernels.SUM, before=lambda v: v * v)
_register("ReduceLogSum", kernels.SUM, after=_through_float(tirx.log))


@converter("", "ReduceMax", "ReduceMin")
def _reduce_extreme(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    largest = node.op_type == "ReduceMax"
    reducer = kernels.MAX if largest else kernels.MIN
    if dtype == "bool":
        reducer = kernels.ANY if largest else kernels.ALL

    def build(t: te.Tensor, axes: Axes, ones: list[Dim]) -> te.Tensor:
        out = axes.reduce(t, ones, reducer, before=lambda v: v.astype(acc), name="extreme")
        return out if acc == dtype else te.compute(out.shape, lambda *i: out(*i).astype(dtype), name="rounded")

    return _reduction(ctx, node, x, build)


@converter("", "ReduceLogSumExp")
def _reduce_log_sum_exp(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
    """``m + log(sum(exp(x - m)))`` with ``m`` the maximum (0 where that is infinite)."""
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype) if dtypes.is_float(dtype) else "float64"

    def build(t: te.Tensor, axes: Axes, ones: list[Dim]) -> te.Tensor:
        peak = axes.reduce(t, ones, kernels.FAST_MAX, before=lambda v: v.astype(acc), name="peak")
        infinity = tirx.infinity(acc)

        def finite(*i: Any) -> Any:
            unbounded = tirx.Or(tirx.EQ(peak(*i), infinity), tirx.EQ(peak(*i), -infinity))
            return tirx.Select(unbounded, tirx.const(0, acc), peak(*i))

        shift = te.compute(peak.shape, finite, name="shift")
        total = axes.reduce(
            t,
            ones,
            kernels.SUM,
            value=lambda *i: tirx.exp(t(*i).astype(acc) - shift(*axes.zeroed(i))),
            name="total",
        )
        return te.compute(total.shape, lambda *i: (tirx.log(total(*i)) + shift(*i)).astype(dtype), name="logsumexp")

    return _reduction(ctx, node, x, build)


@converter("", "ArgMax", "ArgMin")
def _arg_extreme(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """The first (or last) position of the extreme value; a NaN counts as more extreme than any number."""
    axis = attr(node, "axis", 0) % ctx.rank(x)
    last = attr(node, "select_last_index", 0)
    largest = node.op_type == "ArgMax"
    acc = kernels.compute_dtype(ctx.storage(x))

    def better(a: Any, b: Any) -> Any:
        """Whether value ``a`` is strictly more extreme than ``b``."""
        more = a > b if largest else a < b
        return tirx.Or(more, tirx.And(tirx.isnan(a), tirx.Not(tirx.isnan(b)))) if dtypes.is_float(acc) else more

    def combine(a: Any, b: Any) -> Any:
        earlier = a[0] > b[0] if last else a[0] < b[0]
        equal = tirx.Not(tirx.Or(better(a[1], b[1]), better(b[1], a[1])))
        take_a = tirx.Or(better(a[1], b[1]), tirx.And(equal, earlier))
        # position -1 is the identity's: any real element replaces it
        take_a = tirx.And(a[0] >= as_expr(0), tirx.Or(take_a, b[0] < as_expr(0)))
        return tirx.Select(take_a, a[0], b[0]), tirx.Select(take_a, a[1], b[1])

    def identity(index_dtype: str, value_dtype: str) -> Any:
        return tirx.const(-1, index_dtype), (kernels.lowest if largest else kernels.highest)(value_dtype)

    reducer = te.comm_reducer(combine, identity, name=node.op_type.lower())

    def build(t: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((as_expr(0), t.shape[axis]), name="k")
        out = [as_expr(1) if i == axis else d for i, d in enumerate(t.shape)]

        def body(*index: Any) -> Any:
            full = [k.var if i == axis else v for i, v in enumerate(index)]
            return reducer((k.var, t(*full).astype(acc)), axis=k)

        pairs = te.compute(out, body, name="extreme")
        return te.compute(out, lambda *i: pairs[0](*i), name="position")

    out = ctx.te(build, x, name=node.op_type.lower())
    if attr(node, "keepdims", 1):
        return out
    return ctx.reshape(out, [d for i, d in enumerate(ctx.shape(x)) if i != axis])


@converter("", "Softmax", "LogSoftmax")
def _softmax(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """Along one axis; before opset 13 over all dimensions from ``axis`` on."""
    log = node.op_type == "LogSoftmax"
    if ctx.version(node) >= 13:
        return kernels.softmax(ctx, x, attr(node, "axis", -1), log=log)
    return ctx.reshape(kernels.softmax(ctx, _flat(ctx, x, attr(node, "axis", 1)), 1, log=log), ctx.shape(x))


def _flat(ctx: Context, x: relax.Expr, axis: int) -> relax.Expr:
    axis = axis % ctx.rank(x) if axis != ctx.rank(x) else axis
    shape = ctx.shape(x)
    return ctx.reshape(x, [ctx.dims.product(shape[:axis]), ctx.dims.product(shape[axis:])])


@converter("", "Hardmax")
def _hardmax(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """One at the first maximum along the axis, zero elsewhere."""
    if ctx.version(node) < 13:
        return ctx.reshape(_hardmax_axis(ctx, _flat(ctx, x, attr(node, "axis", 1)), 1), ctx.shape(x))
    return _hardmax_axis(ctx, x, attr(node, "axis", -1) % ctx.rank(x))


def _hardmax_axis(ctx: Context, x: relax.Expr, axis: int) -> relax.Expr:
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    axes = Axes.of(ctx, ctx.rank(x), [axis])
    ones = axes.ones(ctx.shape(x))
    smallest = te.comm_reducer(lambda a, b: tirx.min(a, b), lambda t: tirx.max_value(t), name="first")

    def build(t: te.Tensor) -> te.Tensor:
        peak = axes.reduce(t, ones, kernels.MAX, before=lambda v: v.astype(acc), name="peak")

        def candidate(*i: Any) -> Any:
            return tirx.Select(tirx.EQ(t(*i).astype(acc), peak(*axes.zeroed(i))), i[axis], tirx.max_value("int64"))

        first = axes.reduce(t, ones, smallest, value=candidate, name="first")
        one, zero = tirx.const(1, "float32").astype(dtype), tirx.const(0, "float32").astype(dtype)
        return te.compute(
            t.shape, lambda *i: tirx.Select(tirx.EQ(first(*axes.zeroed(i)), i[axis]), one, zero), name="hardmax"
        )

    return ctx.te(build, x, name="hardmax")
