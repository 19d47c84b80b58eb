"""Quantization as ONNX defines it: QuantizeLinear, DequantizeLinear, the integer matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops import _minifloat as minifloat
from qcompile.codegen.relax.ops._windows import windows
from qcompile.codegen.relax.ops.cast import convert
from qcompile.codegen.relax.ops.conv import convolution
from qcompile.codegen.relax.ops.matmul import numpy_matmul
from qcompile.codegen.relax.registry import converter

_D = ir.DataType


def _parameter_reader(ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr) -> Callable[..., Any]:
    """Reads the scale or zero point of a position in ``x``: one for all, one per index of an axis, or one per block."""
    rank, shape, sizes = ctx.rank(x), ctx.shape(x), ctx.shape(scale)
    block = attr(node, "block_size", 0)
    if not sizes or (sizes == [1] and not block):
        return lambda parameter, index: parameter(*[as_expr(0)] * len(parameter.shape))
    axis = attr(node, "axis", 1) % rank
    if block:
        for i in range(rank):
            ctx.require_equal(ctx.dims.ceildiv(shape[i], block) if i == axis else shape[i], sizes[i])
        return lambda parameter, index: parameter(
            *(tirx.floordiv(v, as_expr(block)) if i == axis else v for i, v in enumerate(index))
        )
    if len(sizes) != 1:
        raise ctx.unsupported(node, f"a scale with {len(sizes)} dimensions without a block size")
    ctx.require_equal(sizes[0], shape[axis])
    return lambda parameter, index: parameter(index[axis])


@converter("", "QuantizeLinear")
def _quantize_linear(
    ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr, zero_point: relax.Expr | None = None
) -> Known:
    """``saturate(round_half_even(x / scale) + zero_point)``, or the nearest 8- or 4-bit float of ``x / scale``."""
    if zero_point is not None:
        to = ctx.dtype(node.inputs[2])
    else:
        to = _D(attr(node, "output_dtype", 0) or _D.UINT8)
    if to not in dtypes.STORAGE:
        raise ctx.unsupported(node, f"quantization to {to.name}")
    read = _parameter_reader(ctx, node, x, scale)
    acc = "float64" if "float64" in (ctx.storage(x), ctx.storage(scale)) else "float32"
    if to in dtypes.BIT_PATTERN:
        ratio = ctx.te(
            lambda t, s: te.compute(
                t.shape, lambda *i: t(*i).astype("float32") / read(s, i).astype("float32"), name="ratio"
            ),
            x,
            scale,
            name="quantize_ratio",
        )
        return Known(to, expr=minifloat.encode(ctx, ratio, to, saturate=bool(attr(node, "saturate", 1))))
    low, high = _limits(to)
    storage = dtypes.STORAGE[to]

    def build(t: te.Tensor, s: te.Tensor, *z: te.Tensor) -> te.Tensor:
        def body(*i: Any) -> Any:
            value = tirx.nearbyint(t(*i).astype(acc) / read(s, i).astype(acc))
            if z:
                value = value + read(z[0], i).astype(acc)
            value = tirx.max(tirx.min(value, tirx.const(float(high), acc)), tirx.const(float(low), acc))
            return convert(value, storage)

        return te.compute(t.shape, body, name="quantize")

    extra = [zero_point] if zero_point is not None else []
    return Known(to, expr=ctx.te(build, x, scale, *extra, name="quantize_linear"))


def _limits(dtype: ir.DataType) -> tuple[int, int]:
    bits = dtype.bitwidth
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


@converter("", "DequantizeLinear")
def _dequantize_linear(
    ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr, zero_point: relax.Expr | None = None
) -> relax.Expr:
    """``(x - zero_point) * scale`` in the type of the scale (or ``output_dtype``)."""
    source = ctx.dtype(node.inputs[0])
    wanted = attr(node, "output_dtype", 0)
    out = dtypes.STORAGE[_D(wanted)] if wanted else ctx.storage(scale)
    read = _parameter_reader(ctx, node, x, scale)
    acc = "float64" if out == "float64" else "float32"
    if source in dtypes.BIT_PATTERN:
        x = minifloat.decode(ctx, x, source)
        zero_point = None  # 0 by specification

    def build(t: te.Tensor, s: te.Tensor, *z: te.Tensor) -> te.Tensor:
        def body(*i: Any) -> Any:
            value = t(*i)
            if z:
                value = value.astype("int32") - read(z[0], i).astype("int32")
            return (value.astype(acc) * read(s, i).astype(acc)).astype(out)

        return te.compute(t.shape, body, name="dequantize")

    extra = [zero_point] if zero_point is not None else []
    return ctx.te(build, x, scale, *extra, name="dequantize_linear")


@converter("", "DynamicQuantizeLinear")
def _dynamic_quantize_linear(ctx: Context, node: ir.Node, x: relax.Expr) -> list[relax.Expr]:
    """uint8 codes, scale and zero point from the range of the tensor, which is made to contain 0."""
    axes = list(range(ctx.rank(x)))
    zero = tirx.const(0, "float32")

    def build(t: te.Tensor) -> list[te.Tensor]:
        high = kernels.reduce_te(ctx, t, axes, kernels.MAX, keepdims=False, name="high")
        low = kernels.reduce_te(ctx, t, axes, kernels.MIN, keepdims=False, name="low")

        def scale(*i: Any) -> Any:
            span = tirx.max(high(*i), zero) - tirx.min(low(*i), zero)
            return span / tirx.const(255.0, "float32")

        scales = te.compute((), scale, name="scale")

        def point(*i: Any) -> Any:
            s = tirx.Select(tirx.EQ(scales(*i), zero), tirx.const(1.0, "float32"), scales(*i))
            return _saturated_byte(tirx.nearbyint(zero - tirx.min(low(*i), zero) / s))

        points = te.compute((), point, name="zero_point")

        def code(*i: Any) -> Any:
            s = tirx.Select(tirx.EQ(scales(), zero), tirx.const(1.0, "float32"), scales())
            return _saturated_byte(tirx.nearbyint(t(*i) / s) + points().astype("float32"))

        return [te.compute(t.shape, code, name="codes"), scales, points]

    return ctx.te(build, x, name="dynamic_quantize")


def _saturated_byte(v: Any) -> Any:
    bounded = tirx.max(tirx.min(v, tirx.const(255.0, "float32")), tirx.const(0.0, "float32"))
    return bounded.astype("int32").astype("uint8")


def _centered(ctx: Context, x: relax.Expr, zero_point: relax.Expr | None, axis: int | None) -> relax.Expr:
    """``x - zero_point`` in int32; a vector of zero points lies along ``axis``."""
    if zero_point is None:
        return ctx.cast(x, "int32")
    if ctx.rank(zero_point) == 1 and ctx.shape(zero_point) != [1] and axis is not None:
        shape = [1] * ctx.rank(x)
        shape[axis] = ctx.shape(zero_point)[0]
        zero_point = ctx.reshape(zero_point, shape)
    elif ctx.rank(zero_point) == 1:
        zero_point = ctx.reshape(zero_point, [])
    return kernels.elementwise(
        ctx, lambda v, z: v.astype("int32") - z.astype("int32"), x, zero_point, name="center", promote=False
    )


@converter("", "MatMulInteger")
def _matmul_integer(
    ctx: Context,
    node: ir.Node,
    a: relax.Expr,
    b: relax.Expr,
    a_zero: relax.Expr | None = None,
    b_zero: relax.Expr | None = None,
) -> relax.Expr:
    """``(a - a_zero) @ (b - b_zero)`` in int32."""
    left = _centered(ctx, a, a_zero, ctx.rank(a) - 2 if ctx.rank(a) > 1 else None)
    right = _centered(ctx, b, b_zero, ctx.rank(b) - 1)
    return numpy_matmul(ctx, left, right)


@converter("", "QLinearMatMul")
def _qlinear_matmul(
    ctx: Context,
    node: ir.Node,
    a: relax.Expr,
    a_scale: relax.Expr,
    a_zero: relax.Expr,
    b: relax.Expr,
    b_scale: relax.Expr,
    b_zero: relax.Expr,
    y_scale: relax.Expr,
    y_zero: relax.Expr,
) -> relax.Expr:
    """The product of two quantized matrices, accumulated in int32 and quantized again."""
    for position in (0, 3, 7):
        if ctx.dtype(node.inputs[position]) in dtypes.BIT_PATTERN:
            raise ctx.unsupported(node, f"matrices of {ctx.dtype(node.inputs[position]).name}")
    left = _centered(ctx, a, a_zero, ctx.rank(a) - 2 if ctx.rank(a) > 1 else None)
    right = _centered(ctx, b, b_zero, ctx.rank(b) - 1)
    product = numpy_matmul(ctx, left, right)
    rank = ctx.rank(product)
    rows, columns = (rank - 2 if rank > 1 else None), rank - 1
    return _requantize(ctx, node, product, a_scale, b_scale, y_scale, y_zero, ctx.dtype(node.inputs[7]), rows, columns)


def _requantize(
    ctx: Context,
    node: ir.Node,
    total: relax.Expr,
    a_scale: relax.Expr,
    b_scale: relax.Expr,
    y_scale: relax.Expr,
    y_zero: relax.Expr,
    to: ir.DataType,
    a_axis: int | None,
    b_axis: int | None,
) -> relax.Expr:
    """``saturate(round(total * a_scale * b_scale / y_scale) + y_zero)``."""
    low, high = _limits(to)
    storage = dtypes.STORAGE[to]

    def along(parameter: relax.Expr, axis: int | None) -> relax.Expr:
        if ctx.rank(parameter) == 0 or ctx.shape(parameter) == [1]:
            return ctx.reshape(parameter, [])
        if ctx.rank(parameter) > 1:
            return parameter
        if axis is None:
            raise ctx.unsupported(node, "a scale per row of a vector")
        shape = [1] * ctx.rank(total)
        shape[axis] = ctx.shape(parameter)[0]
        return ctx.reshape(parameter, shape)

    def requantize(v: Any, a: Any, b: Any, s: Any, z: Any) -> Any:
        factor = a.astype("float64") * b.astype("float64") / s.astype("float64")
        value = tirx.nearbyint(v.astype("float64") * factor) + z.astype("float64")
        value = tirx.max(tirx.min(value, tirx.const(float(high), "float64")), tirx.const(float(low), "float64"))
        return convert(value, storage)

    parameters = [along(a_scale, a_axis), along(b_scale, b_axis), along(y_scale, a_axis), along(y_zero, a_axis)]
    return kernels.elementwise(ctx, requantize, total, *parameters, name="requantize", promote=False)


@converter("", "ConvInteger")
def _conv_integer(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    w: relax.Expr,
    x_zero: relax.Expr | None = None,
    w_zero: relax.Expr | None = None,
) -> relax.Expr:
    """The convolution of ``x - x_zero`` with ``w - w_zero`` in int32."""
    win = windows(ctx, node, x, ctx.shape(w)[2:])
    return convolution(
        ctx, _centered(ctx, x, x_zero, None), _centered(ctx, w, w_zero, 0), win, attr(node, "group", 1), "int32"
    )


@converter("", "QLinearConv")
def _qlinear_conv(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    x_scale: relax.Expr,
    x_zero: relax.Expr,
    w: relax.Expr,
    w_scale: relax.Expr,
    w_zero: relax.Expr,
    y_scale: relax.Expr,
    y_zero: relax.Expr,
    bias: relax.Expr | None = None,
) -> relax.Expr:
    """A quantized convolution, accumulated in int32 (with an int32 bias) and quantized again."""
    win = windows(ctx, node, x, ctx.shape(w)[2:])
    total = convolution(
        ctx, _centered(ctx, x, x_zero, None), _centered(ctx, w, w_zero, 0), win, attr(node, "group", 1), "int32"
    )
    if bias is not None:
        channel = ctx.reshape(bias, [1, *ctx.shape(bias), *[1] * (ctx.rank(total) - 2)])
        total = kernels.elementwise(ctx, lambda v, b: v + b, total, channel, name="bias")
    return _requantize(ctx, node, total, x_scale, w_scale, y_scale, y_zero, ctx.dtype(node.inputs[7]), None, 1)
