"""Reductions over axes, ArgMax/ArgMin, Softmax and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.registry import converter


def reduction_axes(ctx: Context, node: ir.Node, x: relax.Expr) -> list[int]:
    """The axes of a Reduce* node, from its input or attribute; all of them where none are given."""
    rank = ctx.rank(x)
    axes = attr(node, "axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = ctx.constant(node.inputs[1])
        if constant is None:
            if ctx.dims.product(ctx.shape(ctx.expr(node.inputs[1]))) == 0:
                constant = ()
            else:
                raise ctx.unsupported(node, "the axes must be constant: they determine the shape of the result")
        axes = [int(a) for a in constant]
    if not axes:
        return [] if attr(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted({a % rank for a in axes})


def _reduce(op_type: str, reducer: Any, before: Callable[[Any], Any], after: Callable[[Any, Any], Any]) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
        axes = reduction_axes(ctx, node, x)
        keepdims = bool(attr(node, "keepdims", 1))
        dtype = ctx.storage(x)
        acc = kernels.compute_dtype(dtype)
        count = ctx.dims.product([ctx.shape(x)[a] for a in axes])

        def build(t: te.Tensor) -> te.Tensor:
            total = kernels.reduce_te(
                ctx, t, axes, reducer, keepdims=keepdims, before=lambda v: before(v.astype(acc)), name=op_type.lower()
            )
            finish = lambda v: after(v, count).astype(dtype)  # noqa: E731
            if after is _identity and acc == dtype:
                return total
            return te.compute(total.shape, lambda *i: finish(total(*i)), name="finish")

        return ctx.te(build, x, name=op_type.lower())


def _identity(v: Any, count: Any) -> Any:
    return v


def _same(v: Any) -> Any:
    return v


def _mean(total: Any, count: Any) -> Any:
    dtype = str(total.ty.dtype)
    n = as_expr(count).astype(dtype)
    if dtypes.is_float(dtype):
        return total / n
    return tirx.truncdiv(total, tirx.Select(tirx.EQ(n, tirx.const(0, dtype)), tirx.const(1, dtype), n))


def _magnitude(v: Any) -> Any:
    return v if dtypes.is_unsigned(str(v.ty.dtype)) else tirx.abs(v)


def _through_float(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(v: Any, count: Any) -> Any:
        return function(v) if dtypes.is_float(str(v.ty.dtype)) else function(v.astype("float64"))

    return apply


_reduce("ReduceSum", kernels.SUM, _same, _identity)
_reduce("ReduceMean", kernels.SUM, _same, _mean)
_reduce("ReduceProd", kernels.PRODUCT, _same, _identity)
_reduce("ReduceL1", kernels.SUM, _magnitude, _identity)
_reduce("ReduceL2", kernels.SUM, lambda v: v * v, _through_float(tirx.sqrt))
_reduce("ReduceSumSquare", kernels.SUM, lambda v: v * v, _identity)
_reduce("ReduceLogSum", kernels.SUM, _same, _through_float(tirx.log))


def _reduce_extreme(op_type: str, reducer: Any, logical: Any) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
        axes = reduction_axes(ctx, node, x)
        chosen = logical if ctx.storage(x) == "bool" else reducer
        return ctx.te(
            lambda t: kernels.reduce_te(
                ctx, t, axes, chosen, keepdims=bool(attr(node, "keepdims", 1)), name=op_type.lower()
            ),
            x,
            name=op_type.lower(),
        )


_reduce_extreme("ReduceMax", kernels.MAX, kernels.ANY)
_reduce_extreme("ReduceMin", kernels.MIN, kernels.ALL)


@converter("", "ReduceLogSumExp")
def _reduce_log_sum_exp(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
    """``m + log(sum(exp(x - m)))`` with ``m`` the maximum (0 where that is infinite)."""
    axes, keepdims = reduction_axes(ctx, node, x), bool(attr(node, "keepdims", 1))
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype) if dtypes.is_float(dtype) else "float64"

    def build(t: te.Tensor) -> te.Tensor:
        peak = kernels.reduce_te(
            ctx, t, axes, kernels.FAST_MAX, keepdims=True, before=lambda v: v.astype(acc), name="peak"
        )
        infinity = tirx.infinity(acc)
        zero = tirx.const(0, acc)

        def base(*i: Any) -> Any:
            p = peak[i]
            return tirx.Select(tirx.Or(tirx.EQ(p, infinity), tirx.EQ(p, -infinity)), zero, p)

        shift = te.compute(peak.shape, base, name="shift")

        def pick(index: Any) -> tuple[Any, ...]:
            return tuple(as_expr(0) if i in axes else v for i, v in enumerate(index))

        powers = te.compute(t.shape, lambda *i: tirx.exp(t[i].astype(acc) - shift[pick(i)]), name="powers")
        total = kernels.reduce_te(ctx, powers, axes, kernels.SUM, keepdims=True, name="total")
        out = te.compute(total.shape, lambda *i: (tirx.log(total[i]) + shift[i]).astype(dtype), name="logsumexp")
        return out

    out = ctx.te(build, x, name="reduce_log_sum_exp")
    if keepdims:
        return out
    return ctx.reshape(out, [d for i, d in enumerate(ctx.shape(x)) if i not in axes])


@converter("", "ArgMax", "ArgMin")
def _arg_extreme(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """The first (or last) position of the extreme value; a NaN counts as more extreme than any number."""
    axis = attr(node, "axis", 0) % ctx.rank(x)
    keepdims, last = attr(node, "keepdims", 1), attr(node, "select_last_index", 0)
    largest = node.op_type == "ArgMax"
    dtype = ctx.storage(x)
    is_float = dtypes.is_float(dtype)

    def better(a: Any, b: Any) -> Any:
        """Whether value ``a`` is strictly more extreme than ``b``."""
        more = a > b if largest else a < b
        return tirx.Or(more, tirx.And(tirx.isnan(a), tirx.Not(tirx.isnan(b)))) if is_float else more

    def combine(a: Any, b: Any) -> Any:
        earlier = tirx.Or(a[0] > b[0], b[0] < 0) if last else tirx.Or(a[0] < b[0], b[0] < 0)
        earlier = tirx.And(a[0] >= 0, earlier)
        equal = tirx.Not(tirx.Or(better(a[1], b[1]), better(b[1], a[1])))
        take_a = tirx.Or(better(a[1], b[1]), tirx.And(equal, earlier))
        return tirx.Select(take_a, a[0], b[0]), tirx.Select(take_a, a[1], b[1])

    def identity(index_dtype: str, value_dtype: str) -> Any:
        return tirx.const(-1, index_dtype), (kernels.lowest if largest else kernels.highest)(value_dtype)

    reducer = te.comm_reducer(combine, identity, name=node.op_type.lower())

    def build(t: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((as_expr(0), t.shape[axis]), name="k")
        out = [as_expr(1) if i == axis else d for i, d in enumerate(t.shape)]

        def body(*index: Any) -> Any:
            full = [k.var if i == axis else v for i, v in enumerate(index)]
            return reducer((k.var, t(*full)), axis=k)

        pairs = te.compute(out, body, name="extreme")
        return te.compute(out, lambda *i: pairs[0][i], name="position")

    out = ctx.te(build, x, name=node.op_type.lower())
    return out if keepdims else ctx.reshape(out, [d for i, d in enumerate(ctx.shape(x)) if i != axis])


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

    def build(t: te.Tensor) -> te.Tensor:
        def pick(index: Any) -> tuple[Any, ...]:
            return tuple(as_expr(0) if i == axis else v for i, v in enumerate(index))

        peak = kernels.reduce_te(
            ctx, t, [axis], kernels.MAX, keepdims=True, before=lambda v: v.astype(acc), name="peak"
        )
        k = te.reduce_axis((as_expr(0), t.shape[axis]), name="k")
        first = te.compute(
            peak.shape,
            lambda *i: te.min(
                tirx.Select(
                    tirx.EQ(t[tuple(k.var if n == axis else v for n, v in enumerate(i))].astype(acc), peak[i]),
                    k.var,
                    tirx.max_value("int64"),
                ),
                axis=k,
            ),
            name="first",
        )
        one, zero = tirx.const(1, "float32").astype(dtype), tirx.const(0, "float32").astype(dtype)
        return te.compute(t.shape, lambda *i: tirx.Select(tirx.EQ(first[pick(i)], i[axis]), one, zero), name="hardmax")

    return ctx.te(build, x, name="hardmax")
