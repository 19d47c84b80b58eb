"""Operators that write at computed positions: ScatterElements, ScatterND, Scatter, TensorScatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops._kernels import HALF, maximum, minimum
from qcompile.codegen.relax.ops._loops import grid, load, loops, store
from qcompile.codegen.relax.ops.gather import checked
from qcompile.codegen.relax.registry import converter


def _combine(reduction: str, dtype: str) -> Callable[[Any, Any], Any]:
    """What a scatter stores, from the old value and the update."""

    def through_float(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        if dtype not in HALF:
            return function
        return lambda old, new: function(old.astype("float32"), new.astype("float32")).astype(dtype)

    return {
        "none": lambda old, new: new,
        "add": through_float(lambda old, new: old + new),
        "mul": through_float(lambda old, new: old * new),
        "max": through_float(maximum),
        "min": through_float(minimum),
    }[reduction]


@converter("", "ScatterElements", "Scatter")
def _scatter_elements(
    ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr, updates: relax.Expr
) -> relax.Expr:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    shape, dtype = ctx.shape(x), ctx.storage(x)
    combine = _combine(attr(node, "reduction", "none"), dtype)

    def body(data: Any, index: Any, update: Any, out: Any) -> None:
        with grid(*shape) as i:
            store(out, i, load(data, i))
        with grid(*ctx.shape(indices)) as i:
            at = list(i)
            at[axis] = checked(load(index, i), shape[axis], node.op_type)
            store(out, at, combine(load(out, at), load(update, i)))

    return loops(ctx, body, [x, indices, updates], [(shape, dtype)], name="scatter_elements")[0]


@converter("", "ScatterND")
def _scatter_nd(ctx: Context, node: ir.Node, x: relax.Expr, indices: relax.Expr, updates: relax.Expr) -> relax.Expr:
    shape, dtype, positions = ctx.shape(x), ctx.storage(x), ctx.shape(indices)
    depth = positions[-1]
    if not isinstance(depth, int):
        raise ctx.unsupported(
            node, "the last dimension of the indices must be known: it says how many axes they address"
        )
    combine = _combine(attr(node, "reduction", "none"), dtype)
    lead = len(positions) - 1

    def body(data: Any, index: Any, update: Any, out: Any) -> None:
        with grid(*shape) as i:
            store(out, i, load(data, i))
        with grid(*positions[:-1], *shape[depth:]) as i:
            at = [checked(load(index, [*i[:lead], k]), shape[k], node.op_type) for k in range(depth)] + i[lead:]
            store(out, at, combine(load(out, at), load(update, i)))

    return loops(ctx, body, [x, indices, updates], [(shape, dtype)], name="scatter_nd")[0]


@converter("", "TensorScatter")
def _tensor_scatter(
    ctx: Context, node: ir.Node, cache: relax.Expr, update: relax.Expr, write: relax.Expr | None = None
) -> relax.Expr:
    """Writes new rows into a cache along an axis, from each sample's write index on (modulo the length if circular)."""
    shape, dtype = ctx.shape(cache), ctx.storage(cache)
    axis = attr(node, "axis", -2) % len(shape)
    circular = attr(node, "mode", "linear") == "circular"

    def body(*buffers: Any) -> None:
        data, new, out = buffers[0], buffers[1], buffers[-1]
        with grid(*shape) as i:
            store(out, i, load(data, i))
        with grid(*ctx.shape(update)) as i:
            at = list(i)
            if write is not None:
                at[axis] = at[axis] + load(buffers[2], [i[0]]).astype("int64")
            if circular:
                at[axis] = at[axis] % as_expr(shape[axis])
            else:
                at[axis] = checked(at[axis], shape[axis], node.op_type)
            store(out, at, load(new, i))

    args = [cache, update] + ([write] if write is not None else [])
    return loops(ctx, body, args, [(shape, dtype)], name="tensor_scatter")[0]
