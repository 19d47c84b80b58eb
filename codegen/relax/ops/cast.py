"""Cast, CastLike and BitCast between all numeric types."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from tvm import relax, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.ops import _minifloat as minifloat
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
    if source in dtypes.BIT_PATTERN:
        x = minifloat.decode(ctx, x, source)
    if to in dtypes.BIT_PATTERN:
        if ctx.storage(x) != "float32":
            x = elementwise(ctx, lambda v: convert(v, "float32"), x, name="cast_float32", promote=False)
        saturate, mode = bool(attr(node, "saturate", 1)), attr(node, "round_mode", "up")
        return Known(to, expr=minifloat.encode(ctx, x, to, saturate=saturate, round_mode=mode))
    storage = dtypes.STORAGE[to]
    if to in dtypes.NARROW_INTEGER:
        bits = to.bitwidth
        out = elementwise(
            ctx, lambda v: wrap(convert(v, "int32"), bits, storage), x, name=f"cast_{to.name.lower()}", promote=False
        )
        return Known(to, expr=out)
    if ctx.storage(x) == storage:
        return Known(to, expr=x)
    out = elementwise(ctx, lambda v: convert(v, storage), x, name=f"cast_{storage}", promote=False)
    return Known(to, expr=out)


def wrap(value: Any, bits: int, dtype: str) -> Any:
    """The low ``bits`` of an int32, sign- or zero-extended to ``dtype``."""
    if dtypes.is_signed(dtype):
        shift = tirx.const(32 - bits, "int32")
        return tirx.shift_right(tirx.shift_left(value, shift), shift).astype(dtype)
    return tirx.bitwise_and(value, tirx.const((1 << bits) - 1, "int32")).astype(dtype)


def convert(value: Any, dtype: str) -> Any:
    """A scalar in another dtype: to integer by truncation (modulo 2^bits when narrow), to bool by ``!= 0``."""
    source = str(value.ty.dtype)
    if source == dtype:
        return value
    if source == "bfloat16" and dtype != "float32":
        value, source = value.astype("float32"), "float32"
    if dtype == "bool":
        zero = tirx.const(0, source)
        nonzero = tirx.Or(value > zero, value < zero)
        return tirx.Or(nonzero, tirx.isnan(value)) if dtypes.is_float(source) else nonzero
    if source == "bool":
        value = tirx.Select(value, tirx.const(1, "int32"), tirx.const(0, "int32"))
        return value.astype("float32").astype(dtype) if dtype in ("float16", "bfloat16") else value.astype(dtype)
    if dtypes.is_float(source) and dtypes.is_integer(dtype):
        if source == "float16":
            value = value.astype("float32")
        return value.astype(dtype) if dtype in ("int64", "uint64") else value.astype("int64").astype(dtype)
    if dtype == "bfloat16" and source != "float32":
        return value.astype("float32").astype(dtype)
    return value.astype(dtype)


@converter("", "BitCast")
def _bit_cast(ctx: Context, node: ir.Node, x: relax.Expr) -> Known:
    """The same bytes under another type of the same width."""
    source, to = ctx.dtype(node.inputs[0]), ir.DataType(attr(node, "to"))
    if source not in dtypes.STORAGE or to not in dtypes.STORAGE:
        raise ctx.unsupported(node, f"reading {source.name} as {to.name}")
    if source.bitwidth != to.bitwidth:
        raise ctx.unsupported(node, f"reading {source.name} as {to.name}, which has another width")
    old, new = dtypes.STORAGE[source], dtypes.STORAGE[to]
    if {source, to} <= dtypes.NARROW_INTEGER | {ir.DataType.FLOAT4E2M1}:
        bits = to.bitwidth
        out = elementwise(ctx, lambda v: wrap(v.astype("int32"), bits, new), x, name="bitcast", promote=False)
        return Known(to, expr=out)
    if old == new:
        return Known(to, expr=x)

    def reinterpret(v: Any) -> Any:
        if old == "bool":
            return tirx.Select(v, tirx.const(1, "uint8"), tirx.const(0, "uint8")).astype(new)
        if new == "bool":
            return tirx.NE(v, tirx.const(0, old))
        return tirx.reinterpret(new, v)

    return Known(to, expr=elementwise(ctx, reinterpret, x, name="bitcast", promote=False))
