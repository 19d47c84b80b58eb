"""Operators that read at computed positions: Gather, GatherElements, GatherND.

Positions known when the program runs are checked by a small kernel before they are used: an index outside of its dimension stops
the program instead of reading whatever lies there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._loops import check, grid, load, loops, store
from qcompile.codegen.relax.ops.shape import slice_axis
from qcompile.codegen.relax.registry import converter


def wrapped(index: Any, size: Dim) -> Any:
    """A position in a dimension, negative ones counted from the end; int64."""
    index = index.astype("int64")
    return tirx.Select(index < as_expr(0), index + as_expr(size), index)


def checked(index: Any, size: Dim, what: str) -> Any:
    """:func:`wrapped` inside a loop kernel, which stops the program where the position is out of range."""
    at = wrapped(index, size)
    check(tirx.And(at >= as_expr(0), at < as_expr(size)), f"{what}: an index is out of range")
    return at


def positions(ctx: Context, node: ir.Node, indices: relax.Expr, sizes: Sequence[Dim]) -> relax.Expr:
    """The indices of a node's second input, int64, none negative, every one inside its dimension.

    Args:
        ctx: the conversion.
        node: names the operator in the error.
        indices: the input's expression.
        sizes: one size for all indices, or one for each index along the last dimension.
    """
    constant = ctx.constant(node.inputs[1])
    if constant is not None and all(isinstance(s, int) for s in sizes):
        limit = np.array(sizes if len(sizes) > 1 else sizes[0], np.int64)
        at = np.where(constant < 0, constant + limit, constant).astype(np.int64)
        if ((at < 0) | (at >= limit)).any():
            raise ValueError("an index is out of range")
        return ctx.const(at)
    shape = ctx.shape(indices)

    def body(given: Any, out: Any) -> None:
        if len(sizes) == 1:
            with grid(*shape) as i:
                store(out, i, checked(load(given, i), sizes[0], node.op_type))
            return
        with grid(*shape[:-1]) as i:
            for k, size in enumerate(sizes):
                store(out, [*i, k], checked(load(given, [*i, k]), size, node.op_type))

    return loops(ctx, body, [indices], [(shape, "int64")], name="check_indices")[0]


@converter("", "Gather")
def _gather(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    shape, places = ctx.shape(x), ctx.shape(indices)
    out = [*shape[:axis], *places, *shape[axis + 1 :]]
    known = ctx.symbolic(node.inputs[1])
    if known is not None and known.size == 1:
        at = known.reshape(-1)[0]
        if isinstance(at, int):
            at = at + shape[axis] if at < 0 else at
            ctx.require(tirx.And(as_expr(at) >= as_expr(0), as_expr(at) < as_expr(shape[axis])))
            return ctx.reshape(slice_axis(ctx, x, axis, at, 1), out)
    count = len(places)

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            return t(*index[:axis], i(*index[axis : axis + count]), *index[axis + count :])

        return te.compute([as_expr(d) for d in out], body, name="gather")

    return ctx.te(build, x, positions(ctx, node, indices, [shape[axis]]), name="gather")


@converter("", "GatherElements")
def _gather_elements(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    shape = ctx.shape(x)
    for i, (d, n) in enumerate(zip(shape, ctx.shape(indices))):
        if i != axis and not ctx.dims.equal(d, n):
            ctx.require(as_expr(n) <= as_expr(d))

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            return t(*index[:axis], i(*index), *index[axis + 1 :])

        return te.compute(i.shape, body, name="gather_elements")

    return ctx.te(build, x, positions(ctx, node, indices, [shape[axis]]), name="gather_elements")


@converter("", "GatherND")
def _gather_nd(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    batch = attr(node, "batch_dims", 0)
    shape, places = ctx.shape(x), ctx.shape(indices)
    depth = places[-1]
    if not isinstance(depth, int):
        raise ctx.unsupported(
            node, "the last dimension of the indices must be known: it determines the rank of the result"
        )
    for d, n in zip(shape[:batch], places[:batch]):
        ctx.require_equal(d, n)
    out = [*places[:-1], *shape[batch + depth :]]
    lead = len(places) - 1

    def build(t: te.Tensor, i: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            found = [i(*index[:lead], as_expr(k)) for k in range(depth)]
            return t(*index[:batch], *found, *index[lead:])

        return te.compute([as_expr(d) for d in out], body, name="gather_nd")

    sizes = shape[batch : batch + depth]
    return ctx.te(build, x, positions(ctx, node, indices, sizes), name="gather_nd")
