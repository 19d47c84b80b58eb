"""Operators that read at computed positions: Gather, GatherElements, GatherND."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops.shape import slice_axis
from qcompile.codegen.relax.registry import converter


def wrapped(index: Any, size: Dim) -> Any:
    """A position in a dimension, negative ones counted from the end; int64."""
    index = index.astype("int64")
    return tirx.Select(index < as_expr(0), index + as_expr(size), index)


@converter("", "Gather")
def _gather(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    shape, positions = ctx.shape(x), ctx.shape(indices)
    out = [*shape[:axis], *positions, *shape[axis + 1 :]]
    known = ctx.symbolic(node.inputs[1])
    if known is not None and known.size == 1:
        at = known.reshape(-1)[0]
        if isinstance(at, int):
            at = at + shape[axis] if at < 0 else at
            return ctx.reshape(slice_axis(ctx, x, axis, at, 1), out)
    count = len(positions)

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            at = wrapped(i[index[axis : axis + count]], shape[axis])
            return t[(*index[:axis], at, *index[axis + count :])]

        return te.compute([as_expr(d) for d in out], body, name="gather")

    return ctx.te(build, x, indices, name="gather")


@converter("", "GatherElements")
def _gather_elements(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    size = ctx.shape(x)[axis]

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            at = list(index)
            at[axis] = wrapped(i[index], size)
            return t[tuple(at)]

        return te.compute(i.shape, body, name="gather_elements")

    return ctx.te(build, x, indices, name="gather_elements")


@converter("", "GatherND")
def _gather_nd(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    batch = attr(node, "batch_dims", 0)
    shape, positions = ctx.shape(x), ctx.shape(indices)
    depth = positions[-1]
    if not isinstance(depth, int):
        raise ctx.unsupported(
            node, "the last dimension of the indices must be known: it determines the rank of the result"
        )
    out = [*positions[:-1], *shape[batch + depth :]]
    lead = len(positions) - 1

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            found = [wrapped(i[(*index[:lead], as_expr(k))], shape[batch + k]) for k in range(depth)]
            return t[(*index[:batch], *found, *index[lead:])]

        return te.compute([as_expr(d) for d in out], body, name="gather_nd")

    return ctx.te(build, x, indices, name="gather_nd")
