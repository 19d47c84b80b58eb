"""Operators with a running state along an axis: CumSum, CumProd; and ReverseSequence, Trilu, EyeLike, Det."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops._kernels import compute_dtype
from qcompile.codegen.relax.ops._loops import grid, load, loop, loops, scalar, scratch, store, when
from qcompile.codegen.relax.registry import converter


@converter("", "CumSum", "CumProd")
def _cumulative(ctx: Context, node: ir.Node, x: relax.Expr, axis_input: relax.Expr) -> relax.Expr:
    """Running sums or products along an axis, which may be known at run time only."""
    shape, dtype = ctx.shape(x), ctx.storage(x)
    rank = len(shape)
    acc = compute_dtype(dtype)
    exclusive, reverse = attr(node, "exclusive", 0), attr(node, "reverse", 0)
    start = tirx.const(0 if node.op_type == "CumSum" else 1, acc)
    combine: Callable[[Any, Any], Any] = (lambda a, b: a + b) if node.op_type == "CumSum" else (lambda a, b: a * b)
    known = ctx.constant(node.inputs[1])
    axes = list(range(rank)) if known is None else [int(known.reshape(-1)[0]) % rank]

    def body(data: Any, *rest: Any) -> None:
        out = rest[-1]
        total = scalar(acc)

        def along(axis: int) -> None:
            with grid(*shape[:axis], *shape[axis + 1 :]) as others:
                store(total, [0], start)
                with loop(0, shape[axis]) as step:
                    position = as_expr(shape[axis]) - 1 - step if reverse else step
                    at = [*others[:axis], position, *others[axis:]]
                    value = load(data, at).astype(acc)
                    if exclusive:
                        store(out, at, load(total, [0]).astype(dtype))
                    store(total, [0], combine(load(total, [0]), value))
                    if not exclusive:
                        store(out, at, load(total, [0]).astype(dtype))

        if known is not None:
            along(axes[0])
            return
        chosen = load(rest[0], [0]).astype("int64")
        for axis in axes:
            with when(tirx.Or(tirx.EQ(chosen, as_expr(axis)), tirx.EQ(chosen, as_expr(axis - rank)))):
                along(axis)

    args = [x] if known is not None else [x, ctx.reshape(axis_input, [1])]
    return loops(ctx, body, args, [(shape, dtype)], name=node.op_type.lower())[0]


@converter("", "ReverseSequence")
def _reverse_sequence(ctx: Context, node: ir.Node, x: relax.Expr, lengths: relax.Expr) -> relax.Expr:
    """Reverses the first ``lengths[b]`` steps of every sample."""
    time, batch = attr(node, "time_axis", 0), attr(node, "batch_axis", 1)

    def build(t: te.Tensor, n: te.Tensor) -> te.Tensor:
        def body(*i: Any) -> Any:
            length = tirx.min(n(i[batch]).astype("int64"), t.shape[time])
            at = list(i)
            at[time] = tirx.Select(i[time] < length, length - 1 - i[time], i[time])
            return t(*at)

        return te.compute(t.shape, body, name="reverse_sequence")

    return ctx.te(build, x, lengths, name="reverse_sequence")


@converter("", "Trilu")
def _trilu(ctx: Context, node: ir.Node, x: relax.Expr, k: relax.Expr | None = None) -> relax.Expr:
    """The upper or lower triangle of the last two dimensions, counted from diagonal ``k``; zeros elsewhere."""
    upper, dtype = attr(node, "upper", 1), ctx.storage(x)
    known = 0 if k is None else ctx.constant(node.inputs[1])
    args = [x] if known is not None else [x, ctx.reshape(k, [1])]

    def build(t: te.Tensor, *diagonal: te.Tensor) -> te.Tensor:
        def body(*i: Any) -> Any:
            offset = diagonal[0](as_expr(0)).astype("int64") if diagonal else as_expr(int(known))
            distance = i[-1] - i[-2]
            keep = distance >= offset if upper else distance <= offset
            zero = tirx.const(False, "bool") if dtype == "bool" else tirx.const(0, "int32").astype(dtype)
            return tirx.Select(keep, t(*i), zero)

        return te.compute(t.shape, body, name="trilu")

    return ctx.te(build, *args, name="trilu")


@converter("", "EyeLike")
def _eye_like(ctx: Context, node: ir.Node, x: relax.Expr) -> Known:
    to = ir.DataType(attr(node, "dtype", 0) or ctx.dtype(node.inputs[0]))
    if to not in dtypes.STORAGE or to in dtypes.BIT_PATTERN:
        raise ctx.unsupported(node, f"a result of type {to.name}")
    dtype, k = dtypes.STORAGE[to], attr(node, "k", 0)

    def build(t: te.Tensor) -> te.Tensor:
        def body(i: Any, j: Any) -> Any:
            hit = tirx.EQ(j, i + as_expr(k))
            if dtype == "bool":
                return hit
            return tirx.Select(hit, tirx.const(1, "int32"), tirx.const(0, "int32")).astype(dtype)

        return te.compute(t.shape, body, name="eye")

    return Known(to, expr=ctx.te(build, x, name="eye_like"))


@converter("", "Det")
def _det(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """The determinant of the last two dimensions, by elimination with row pivoting."""
    *batch, n, _ = ctx.shape(x)
    dtype = ctx.storage(x)
    acc = "float64"

    def body(data: Any, out: Any) -> None:
        m, pivot = scratch([n, n], acc), scalar("int64")
        det, factor = scalar(acc), scalar(acc)
        with grid(*batch) as b:
            with grid(n, n) as (i, j):
                store(m, [i, j], load(data, [*b, i, j]).astype(acc))
            store(det, [0], tirx.const(1, acc))
            with loop(0, n) as c:
                store(pivot, [0], c)
                with loop(c, n) as r, when(tirx.abs(load(m, [r, c])) > tirx.abs(load(m, [load(pivot, [0]), c]))):
                    store(pivot, [0], r)
                with when(tirx.NE(load(pivot, [0]), c)):
                    store(det, [0], -load(det, [0]))
                    with loop(0, n) as j:
                        store(factor, [0], load(m, [c, j]))
                        store(m, [c, j], load(m, [load(pivot, [0]), j]))
                        store(m, [load(pivot, [0]), j], load(factor, [0]))
                store(det, [0], load(det, [0]) * load(m, [c, c]))
                with when(tirx.NE(load(m, [c, c]), tirx.const(0, acc))), loop(c + 1, n) as r:
                    store(factor, [0], load(m, [r, c]) / load(m, [c, c]))
                    with loop(c, n) as j:
                        store(m, [r, j], load(m, [r, j]) - load(factor, [0]) * load(m, [c, j]))
            store(out, b, load(det, [0]).astype(dtype))

    return loops(ctx, body, [x], [(batch, dtype)], name="det")[0]
