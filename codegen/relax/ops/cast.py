"""Cast, CastLike and BitCast between all numeric types."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from tvm import relax, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.ops._kernels import elementwise
from qcompile.codegen.relax.registry import converter


@converter("", "Cast")
def _cast(ctx: Context, node: ir.Node, x: relax.Expr) -> Known:
    return cast_to(ctx, node, x, ctx.dtype(node.inputs[0]), ir.DataType(attr(node, "to")))


@converter("", "CastLike")
def _cast_like(ctx: Context, node: ir.Node, x: relax.Expr, like: relax.Expr) -> Known:
    return cast_to(ctx, node, x, ctx.dtype(node.inputs[0]), ctx.dtype(node.inputs[1]))


def cast_to(ctx: Context, node: ir.Node, x: relax.Expr, source: ir.DataType, to: ir.DataType) -> Known:
    """The tensor converted to another ONNX type."""
    if source not in dtypes.STORAGE or to not in dtypes.STORAGE:
        raise ctx.unsupported(node, f"conversion from {source.name} to {to.name}")
    if source == to:
        return Known(to, expr=x)
    if (
        source in dtypes.BIT_PATTERN
        or to in dtypes.BIT_PATTERN
        or source in dtypes.NARROW_INTEGER
        or to in dtypes.NARROW_INTEGER
    ):
        raise ctx.unsupported(node, f"conversion from {source.name} to {to.name}")
    storage = dtypes.STORAGE[to]
    out = elementwise(ctx, lambda v: convert(v, storage), x, name=f"cast_{storage}", promote=False)
    return Known(to, expr=out)


def convert(value: Any, dtype: str) -> Any:
    """A scalar in another dtype: to integer by truncation (modulo 2^bits when narrow), to bool by ``!= 0``."""
    source = str(value.ty.dtype)
    if source == dtype:
        return value
    if dtype == "bool":
        zero = tirx.const(0, source if source != "bfloat16" else "float32")
        value = value.astype("float32") if source == "bfloat16" else value
        nonzero = tirx.Or(value > zero, value < zero)
        return tirx.Or(nonzero, tirx.isnan(value)) if dtypes.is_float(source) else nonzero
    if source == "bool":
        return tirx.Select(value, tirx.const(1, "int32"), tirx.const(0, "int32")).astype(dtype)
    if dtypes.is_float(source) and dtypes.is_integer(dtype):
        if source in ("float16", "bfloat16"):
            value = value.astype("float32")
        if dtype not in ("int64", "uint64"):
            return value.astype("int64").astype(dtype)
        return value.astype(dtype)
    if {source, dtype} == {"float16", "bfloat16"}:
        return value.astype("float32").astype(dtype)
    return value.astype(dtype)
