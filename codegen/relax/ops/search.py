"""Operators that look for something: TopK, NonZero, Compress, Unique, NonMaxSuppression, and OneHot.

Where the size of the result depends on the data, one kernel counts (or writes into a tensor large enough), the count becomes a
dimension of the running program, and a second kernel writes the result.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._loops import grid, load, loop, loops, scalar, scratch, store, when
from qcompile.codegen.relax.ops.cast import convert
from qcompile.codegen.relax.ops.gather import wrapped
from qcompile.codegen.relax.registry import converter

_I64 = "int64"


def _i64(value: int) -> Any:
    return tirx.const(value, _I64)


@converter("", "TopK")
def _top_k(ctx: Context, node: ir.Node, x: relax.Expr, k_input: Any = None) -> list[relax.Expr]:
    """The k largest (or smallest) elements along an axis, in order; equal ones by their position; NaN counts as largest."""
    axis = attr(node, "axis", -1) % ctx.rank(x)
    largest = attr(node, "largest", 1)
    k = attr(node, "k") if k_input is None else ctx.symbolic_or_dynamic(node.inputs[1])[0]
    shape, dtype = ctx.shape(x), ctx.storage(x)
    size = shape[axis]
    out = [*shape[:axis], k, *shape[axis + 1 :]]
    is_float = dtypes.is_float(dtype)

    def better(a: Any, b: Any) -> Any:
        if not is_float:
            return a > b if largest else a < b
        nan_a, nan_b = tirx.isnan(a), tirx.isnan(b)
        if largest:
            return tirx.Or(a > b, tirx.And(nan_a, tirx.Not(nan_b)))
        return tirx.Or(a < b, tirx.And(nan_b, tirx.Not(nan_a)))

    def body(data: Any, values: Any, indices: Any) -> None:
        place = scalar(_I64)
        with grid(*shape[:axis], *shape[axis + 1 :]) as rest:

            def at(i: Any) -> list[Any]:
                return [*rest[:axis], i, *rest[axis:]]

            # insertion into the sorted list of the best found so far
            with loop(0, size) as i:
                store(place, [0], tirx.min(i, as_expr(k)))
                with loop(0, tirx.min(i, as_expr(k))) as step:
                    before = tirx.min(i, as_expr(k)) - step - 1
                    moves = tirx.And(
                        tirx.EQ(load(place, [0]), before + 1), better(load(data, at(i)), load(values, at(before)))
                    )
                    with when(moves):
                        with when(before + 1 < as_expr(k)):
                            store(values, at(before + 1), load(values, at(before)))
                            store(indices, at(before + 1), load(indices, at(before)))
                        store(place, [0], before)
                with when(load(place, [0]) < as_expr(k)):
                    store(values, at(load(place, [0])), load(data, at(i)))
                    store(indices, at(load(place, [0])), i)

    return loops(ctx, body, [x], [(out, dtype), (out, _I64)], name="topk")


@converter("", "NonZero")
def _non_zero(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    shape = ctx.shape(x)
    rank = len(shape)

    def count(data: Any, total: Any) -> None:
        store(total, [0], _i64(0))
        with grid(*shape) as i, when(convert(load(data, i), "bool")):
            store(total, [0], load(total, [0]) + 1)

    total = loops(ctx, count, [x], [([1], _I64)], name="count_nonzero")[0]
    size = ctx.dims_from_tensor(total, "nonzero")[0]

    def body(data: Any, out: Any) -> None:
        place = scalar(_I64)
        store(place, [0], _i64(0))
        with grid(*shape) as i, when(convert(load(data, i), "bool")):
            for axis in range(rank):
                store(out, [axis, load(place, [0])], i[axis])
            store(place, [0], load(place, [0]) + 1)

    return loops(ctx, body, [x], [([rank, size], _I64)], name="nonzero")[0]


@converter("", "Compress")
def _compress(ctx: Context, node: ir.Node, x: relax.Expr, condition: relax.Expr) -> relax.Expr:
    """The slices along an axis (the elements, without one) where the condition holds."""
    if "axis" not in node.attributes:
        x, axis = ctx.reshape(x, [ctx.dims.product(ctx.shape(x))]), 0
    else:
        axis = attr(node, "axis") % ctx.rank(x)
    shape = ctx.shape(x)
    length = ctx.dims.minimum(ctx.shape(condition)[0], shape[axis])

    def select(chosen: Any, positions: Any, total: Any) -> None:
        store(total, [0], _i64(0))
        with loop(0, length) as i, when(load(chosen, [i])):
            store(positions, [load(total, [0])], i)
            store(total, [0], load(total, [0]) + 1)

    positions, total = loops(ctx, select, [condition], [([length], _I64), ([1], _I64)], name="compress_positions")
    size = ctx.dims_from_tensor(total, "compressed")[0]
    out = [*shape[:axis], size, *shape[axis + 1 :]]

    def build(t: te.Tensor, p: te.Tensor) -> te.Tensor:
        return te.compute(
            [as_expr(d) for d in out], lambda *i: t(*i[:axis], p(i[axis]), *i[axis + 1 :]), name="compress"
        )

    return ctx.te(build, x, positions, name="compress")


@converter("", "OneHot")
def _one_hot(ctx: Context, node: ir.Node, indices: relax.Expr, depth_input: Any, values: relax.Expr) -> relax.Expr:
    """``values[1]`` where the new axis' position equals the index (negative ones from the end), ``values[0]`` elsewhere."""
    known = ctx.constant(node.inputs[1])
    if known is not None:
        depth: Dim = int(known.reshape(-1)[0])
    elif ctx.symbolic(node.inputs[1]) is not None:
        depth = ctx.symbolic(node.inputs[1]).reshape(-1)[0]
    else:
        depth = ctx.dims_from_tensor(ctx.cast(depth_input, _I64), "depth")[0]
    rank = ctx.rank(indices) + 1
    axis = attr(node, "axis", -1) % rank
    shape = ctx.shape(indices)
    out = [*shape[:axis], depth, *shape[axis:]]

    def build(i: te.Tensor, v: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            chosen = wrapped(i(*index[:axis], *index[axis + 1 :]), depth)
            return tirx.Select(tirx.EQ(chosen, index[axis]), v(as_expr(1)), v(as_expr(0)))

        return te.compute([as_expr(d) for d in out], body, name="one_hot")

    return ctx.te(build, indices, values, name="one_hot")


@converter("", "Unique")
def _unique(ctx: Context, node: ir.Node, x: relax.Expr) -> list[relax.Expr]:
    """Distinct elements (or slices along an axis), with first positions, inverse and counts; sorted or by first occurrence."""
    shape = ctx.shape(x)
    if "axis" in node.attributes:
        axis = attr(node, "axis") % len(shape)
        outer, length, inner = ctx.dims.product(shape[:axis]), shape[axis], ctx.dims.product(shape[axis + 1 :])
    else:
        axis, outer, length, inner = None, 1, ctx.dims.product(shape), 1
    flat = ctx.reshape(x, [outer, length, inner])
    ordered = attr(node, "sorted", 1)

    def body(data: Any, first: Any, inverse: Any, counts: Any, total: Any) -> None:
        found, state = scalar(_I64), scalar("int32")
        raw_first, raw_count, rank = (scratch([length], _I64) for _ in range(3))

        def compare(i: Any, j: Any) -> None:
            """Leaves -1, 0 or 1 in ``state``: how slice i compares with slice j."""
            store(state, [0], tirx.const(0, "int32"))
            with grid(outer, inner) as (a, b), when(tirx.EQ(load(state, [0]), tirx.const(0, "int32"))):
                left, right = load(data, [a, i, b]), load(data, [a, j, b])
                with when(tirx.LT(left, right)):
                    store(state, [0], tirx.const(-1, "int32"))
                with when(tirx.GT(left, right)):
                    store(state, [0], tirx.const(1, "int32"))

        store(total, [0], _i64(0))
        with loop(0, length) as i:
            store(found, [0], _i64(-1))
            with loop(0, load(total, [0])) as u, when(load(found, [0]) < 0):
                compare(i, load(raw_first, [u]))
                with when(tirx.EQ(load(state, [0]), tirx.const(0, "int32"))):
                    store(found, [0], u)
            with when(load(found, [0]) < 0):
                store(raw_first, [load(total, [0])], i)
                store(raw_count, [load(total, [0])], _i64(0))
                store(found, [0], load(total, [0]))
                store(total, [0], load(total, [0]) + 1)
            store(inverse, [i], load(found, [0]))
            store(raw_count, [load(found, [0])], load(raw_count, [load(found, [0])]) + 1)
        with loop(0, load(total, [0])) as u:
            if ordered:
                store(rank, [u], _i64(0))
                with loop(0, load(total, [0])) as v:
                    compare(load(raw_first, [v]), load(raw_first, [u]))
                    with when(load(state, [0]) < 0):
                        store(rank, [u], load(rank, [u]) + 1)
            else:
                store(rank, [u], u)
        with loop(0, load(total, [0])) as u:
            store(first, [load(rank, [u])], load(raw_first, [u]))
            store(counts, [load(rank, [u])], load(raw_count, [u]))
        with loop(0, length) as i:
            store(inverse, [i], load(rank, [load(inverse, [i])]))

    vector = ([length], _I64)
    first, inverse, counts, total = loops(ctx, body, [flat], [vector, vector, vector, ([1], _I64)], name="unique")
    size = ctx.dims_from_tensor(total, "unique")[0]

    def head(v: relax.Expr) -> relax.Expr:
        return ctx.te(lambda t: te.compute((as_expr(size),), lambda i: t(i), name="head"), v, name="head")

    values = ctx.te(
        lambda t, p: te.compute(
            [as_expr(d) for d in (outer, size, inner)], lambda a, i, b: t(a, p(i), b), name="unique_values"
        ),
        flat,
        first,
        name="unique_values",
    )
    wanted = [size] if axis is None else [*shape[:axis], size, *shape[axis + 1 :]]
    return [ctx.reshape(values, wanted), head(first), inverse, head(counts)]


@converter("", "NonMaxSuppression")
def _non_max_suppression(
    ctx: Context,
    node: ir.Node,
    boxes: relax.Expr,
    scores: relax.Expr,
    max_boxes: relax.Expr | None = None,
    iou_threshold: relax.Expr | None = None,
    score_threshold: relax.Expr | None = None,
) -> relax.Expr:
    """Greedy selection per batch and class: the best remaining box, dropping those that overlap it too much."""
    batch, classes, count = ctx.shape(scores)
    centered = attr(node, "center_point_box", 0)
    capacity = ctx.dims.product([batch, classes, count])
    optional = [t for t in (max_boxes, iou_threshold, score_threshold) if t is not None]
    optional = [ctx.reshape(t, [1]) for t in optional]

    def body(box: Any, score: Any, *buffers: Any) -> None:
        rest = list(buffers)
        limit = load(rest.pop(0), [0]).astype(_I64) if max_boxes is not None else _i64(0)
        iou = load(rest.pop(0), [0]) if iou_threshold is not None else tirx.const(0.0, "float32")
        least = load(rest.pop(0), [0]) if score_threshold is not None else None
        selected, total = rest
        taken = scratch([count], "bool")
        best, chosen, overlap = scalar(_I64), scalar(_I64), scalar("float32")

        def corners(b: Any, i: Any) -> list[Any]:
            p = [load(box, [b, i, k]) for k in range(4)]
            if centered:
                half = tirx.const(0.5, "float32")
                return [p[1] - p[3] * half, p[0] - p[2] * half, p[1] + p[3] * half, p[0] + p[2] * half]
            return [tirx.min(p[0], p[2]), tirx.min(p[1], p[3]), tirx.max(p[0], p[2]), tirx.max(p[1], p[3])]

        def measure(b: Any, i: Any, j: Any) -> None:
            """Leaves the intersection over union of two boxes in ``overlap``."""
            p, q = corners(b, i), corners(b, j)
            zero = tirx.const(0.0, "float32")
            height = tirx.max(tirx.min(p[2], q[2]) - tirx.max(p[0], q[0]), zero)
            width = tirx.max(tirx.min(p[3], q[3]) - tirx.max(p[1], q[1]), zero)
            common = height * width
            union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - common
            store(overlap, [0], tirx.Select(union > zero, common / tirx.Select(union > zero, union, zero + 1), zero))

        store(total, [0], _i64(0))
        with grid(batch, classes) as (b, c):
            store(chosen, [0], _i64(0))
            with loop(0, count) as i:
                value = load(score, [b, c, i])
                store(taken, [i], value <= least if least is not None else tirx.const(False, "bool"))
            with loop(0, count) as _:
                store(best, [0], _i64(-1))
                with loop(0, count) as i, when(tirx.And(tirx.Not(load(taken, [i])), load(chosen, [0]) < limit)):
                    with when(load(best, [0]) < 0):
                        store(best, [0], i)
                    with when_better(score, b, c, i, best):
                        store(best, [0], i)
                with when(load(best, [0]) >= 0):
                    store(selected, [load(total, [0]), 0], b)
                    store(selected, [load(total, [0]), 1], c)
                    store(selected, [load(total, [0]), 2], load(best, [0]))
                    store(total, [0], load(total, [0]) + 1)
                    store(chosen, [0], load(chosen, [0]) + 1)
                    store(taken, [load(best, [0])], tirx.const(True, "bool"))
                    with loop(0, count) as i, when(tirx.Not(load(taken, [i]))):
                        measure(b, load(best, [0]), i)
                        with when(load(overlap, [0]) > iou):
                            store(taken, [i], tirx.const(True, "bool"))

    def when_better(score: Any, b: Any, c: Any, i: Any, best: Any) -> Any:
        return when(load(score, [b, c, i]) > load(score, [b, c, load(best, [0])]))

    outputs = [([capacity, 3], _I64), ([1], _I64)]
    selected, total = loops(ctx, body, [boxes, scores, *optional], outputs, name="nms")
    size = ctx.dims_from_tensor(total, "selected")[0]
    return ctx.te(
        lambda t: te.compute((as_expr(size), as_expr(3)), lambda i, j: t(i, j), name="selected"), selected, name="head"
    )
