"""Converters of the kernel operators `Quantize` and `Conv`: quantized convolutions, channels last.

A convolution without groups is the matrix product of its unfolded input ``(batch x positions, taps x channels)`` with a
``(K, N)`` weight, by any kernel for linear operators; one with a single tap and no stride needs no unfolding at all. Padding
is the code of zero. Depthwise convolutions of codes have a kernel; others with groups are summed by generated loops:

    y[n, o, m] = (sum over t, c of (x[n, o s + t d - p, c] - 128) (w[t, c, m] - z[m])) x_scale[n] w_scale[m] + b[m]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.kernels import CPUS
from qcompile.codegen.kernels.cpu.convolution import Depthwise, Geometry, Unfold
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.kernels import DOMAIN, call, calls, product, quantized_operand
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._windows import Windows, windows
from qcompile.codegen.relax.registry import converter
from qcompile.formats import FixedPoint, Format, IntFormat, Ternary, parse_activation, parse_format

ZERO = 128
"""The stored code of zero, on CPUs; GPUs store signed codes."""


@converter(DOMAIN, "Quantize")
def quantize(ctx: Context, node: ir.Node, x: Any, static: Any = None) -> list[Any]:
    """Codes ``round(x / scale) + 128`` with one scale per sample, or with a given one; signed on GPUs."""
    signed = ctx.target is not None and ctx.target.kind == "cuda"
    top = (1 << (attr(node, "bits", 8) - 1)) - 1
    shape = ctx.shape(x)
    inner = shape[1:]
    if static is None:
        largest = ctx.te(lambda t: _largest(ctx, t, inner), x, name="largest")
        scale = kernels.elementwise(
            ctx,
            lambda a: tirx.Select(a == 0, tirx.const(1.0, "float32"), a / tirx.const(float(top), "float32")),
            largest,
            name="sample_scale",
            dtype="float32",
        )
        low = -top
    else:
        scale = ctx.emit(relax.op.broadcast_to(ctx.reshape(static, [1]), relax.ShapeExpr([as_expr(shape[0])])))
        low = -top - 1

    def codes(t: te.Tensor, steps: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            rounded = te.nearbyint(t(*at) / steps(at[0]))
            clipped = tirx.max(tirx.min(rounded, tirx.const(float(top), "float32")), tirx.const(float(low), "float32"))
            integer = clipped.astype("int32")
            return integer.astype("int8") if signed else (integer + ZERO).astype("uint8")

        return te.compute([as_expr(d) for d in shape], element, name="codes")

    calls(ctx).uses["quantize per sample" if static is None else "quantize per tensor"] += 1
    return [ctx.te(codes, x, scale, name="quantize"), scale]


def _largest(ctx: Context, t: te.Tensor, inner: list[Any]) -> te.Tensor:
    axes = [te.reduce_axis((as_expr(0), as_expr(d)), name=f"r{i}") for i, d in enumerate(inner)]
    return te.compute([t.shape[0]], lambda n: te.max(te.abs(t(n, *axes)), axis=axes), name="largest")


@converter(DOMAIN, "Conv")
def convolution(ctx: Context, node: ir.Node, x: Any, scale: Any, *operands: Any) -> list[Any]:
    """A convolution by a quantized weight, of codes or of floats; with ``limits`` it gives codes and their scale."""
    return convolve(
        ctx, node, x, scale, *operands,
        multiply=lambda rows, scales, bias, limits: product(ctx, node, rows, scales, bias, limits=limits),
    )  # fmt: skip


def convolve(
    ctx: Context,
    node: ir.Node,
    x: Any,
    scale: Any,
    codes: Any,
    steps: Any,
    zero: Any = None,
    bias: Any = None,
    limits: Any = None,
    *aux: Any,
    multiply: Callable[[relax.Expr, relax.Expr | None, Any, Any], relax.Expr],
) -> list[Any]:
    """A convolution whose matrix product is ``multiply(rows, scale of each row, bias, limits)``.

    ``aux`` are further parameters of the weight, see `quantized_operand`.
    """
    win = windows(ctx, node, x, attr(node, "kernel_shape"), ctx.shape(x)[1:-1])
    if attr(node, "group", 1) != 1:
        if (out := _depthwise(ctx, node, x, scale, win, bias, limits)) is None:
            out = _grouped(ctx, node, x, scale, win, bias, limits)
        return _results(ctx, x, out, limits)
    lead = [ctx.shape(x)[0], *win.out]
    m = ctx.dims.product(lead)
    if math.prod(win.kernel) == 1 and not win.padded() and all(s == 1 for s in win.strides):
        unfolded = ctx.reshape(x, [m, attr(node, "k")])
    else:
        taken = unfold_kernel(ctx, x, win)
        unfolded = ctx.reshape(unfold(ctx, x, win) if taken is None else taken, [m, attr(node, "k")])
    out = multiply(unfolded, None if scale is None else _per_row(ctx, scale, lead, m), bias, limits)
    calls(ctx).uses["convolution as a matrix product"] += 1
    return _results(ctx, x, ctx.reshape(out, [*lead, attr(node, "n")]), limits)


def _results(ctx: Context, x: relax.Expr, out: relax.Expr, limits: Any) -> list[Any]:
    """What a `Conv` returns: floats, or codes with a scale for every sample of ``x``."""
    if limits is None:
        return [out]
    step = ctx.emit(relax.op.strided_slice(limits, [0], [0], [1]))
    return [out, ctx.emit(relax.op.broadcast_to(step, relax.ShapeExpr([as_expr(ctx.shape(x)[0])])))]


def _per_row(ctx: Context, scale: relax.Expr, lead: list[Any], m: Any) -> relax.Expr:
    """A scale per sample, repeated for all of its positions."""
    column = ctx.reshape(scale, [lead[0], 1])
    positions = ctx.dims.product(lead[1:])
    wide = ctx.emit(relax.op.broadcast_to(column, relax.ShapeExpr([as_expr(lead[0]), as_expr(positions)])))
    return ctx.reshape(wide, [m])


def _padded(x: te.Tensor, win: Windows, spatial: list[Any], n: Any, at: list[Any], c: Any) -> Any:
    """An element of the padded input at a position that counts from the start of the padding."""
    moved = [a - as_expr(b) for a, b in zip(at, win.before)]
    if not win.padded():
        return x(n, *moved, c)
    outside = tirx.const(ZERO if str(x.dtype) == "uint8" else 0, str(x.dtype))
    inside = [tirx.And(a >= as_expr(0), a < as_expr(d)) for a, d in zip(moved, spatial)]
    return tirx.if_then_else(tirx.all(*inside), x(n, *moved, c), outside)


def unfold(ctx: Context, x: relax.Expr, win: Windows) -> relax.Expr:
    """The windows of ``x (batch, *spatial, channels)``: ``(batch, *positions, *taps, channels)``."""
    batch, *spatial, channels = ctx.shape(x)
    rank = win.rank

    def build(t: te.Tensor) -> te.Tensor:
        def element(n: Any, *at: Any) -> Any:
            out, taps, c = at[:rank], at[rank : 2 * rank], at[2 * rank]
            places = [o * as_expr(s) + k * as_expr(d) for o, s, k, d in zip(out, win.strides, taps, win.dilations)]
            return _padded(t, win, spatial, n, places, c)

        extents = [as_expr(d) for d in (batch, *win.out, *win.kernel, channels)]
        return te.compute(extents, element, name="unfold")

    return ctx.te(build, x, name="unfold")


def _geometry(ctx: Context, win: Windows) -> Geometry | None:
    """The windows as the kernels of all processors take them, if they do: two axes at most, padding known."""
    known = [*win.kernel, *win.before]
    if ctx.target is None or ctx.target.kind not in CPUS or win.rank > 2 or not all(isinstance(d, int) for d in known):
        return None
    one, none = (1,) * (2 - win.rank), (0,) * (2 - win.rank)
    return Geometry(
        (*one, *map(int, win.kernel)), (*one, *win.strides), (*one, *win.dilations), (*none, *map(int, win.before))
    )


def _image(ctx: Context, x: relax.Expr) -> relax.Expr:
    """``x (batch, *spatial, channels)`` with two spatial axes."""
    batch, *spatial, channels = ctx.shape(x)
    return x if len(spatial) == 2 else ctx.reshape(x, [batch, 1, *spatial, channels])


def unfold_kernel(ctx: Context, x: relax.Expr, win: Windows) -> relax.Expr | None:
    """The same as `unfold`, by a kernel; None if it does not take these windows."""
    geometry, dtype = _geometry(ctx, win), ctx.storage(x)
    if geometry is None or dtype not in ("uint8", "float32"):
        return None
    channels = int(ctx.shape(x)[-1])
    kernel = Unfold(channels, geometry, dtype)
    shape = [ctx.shape(x)[0], *[1] * (2 - win.rank), *win.out, math.prod(geometry.kernel) * channels]
    (out,) = call(ctx, kernel, lambda: kernel.build(ctx.target), "unfold", [_image(ctx, x)], [(shape, dtype)])
    return out


def _depthwise(
    ctx: Context, node: ir.Node, x: Any, scale: Any, win: Windows, bias: Any, limits: Any
) -> relax.Expr | None:
    """A depthwise convolution of codes by its kernel; None if it does not take it."""
    geometry, n = _geometry(ctx, win), attr(node, "n")
    weight_format = parse_format(attr(node, "weight_format"))
    depthwise = attr(node, "group", 1) == n == int(ctx.shape(x)[-1])
    if (
        geometry is None
        or not depthwise
        or scale is None
        or not _channel_integers(weight_format)
        or attr(node, "k") * 255 * 256 >= 1 << 31
    ):
        return None
    matrix, factor = _weight(ctx, node, weight_format, True)
    weight = matrix.reshape(-1, n).astype(np.int16)
    kernel = Depthwise(n, geometry, bias is not None, attr(node, "epilogue"), limits is not None)
    name = node.inputs[2].name
    operands = [_image(ctx, x), ctx.reshape(scale, [ctx.shape(x)[0]])]
    operands += [ctx.const(weight, name=f"{name}.depthwise"), ctx.const(Depthwise.starts(weight)), ctx.const(factor)]
    if bias is not None:
        operands.append(ctx.reshape(bias, [n]))
    if limits is not None:
        operands.append(limits)
    shape = [ctx.shape(x)[0], *[1] * (2 - win.rank), *win.out, n]
    results = [(shape, "float32" if limits is None else "uint8")]
    (out,) = call(ctx, kernel, lambda: kernel.build(ctx.target), f"depthwise_{n}", operands, results)
    calls(ctx).uses["depthwise convolution"] += 1
    return ctx.reshape(out, [ctx.shape(x)[0], *win.out, n])


def _grouped(ctx: Context, node: ir.Node, x: Any, scale: Any, win: Windows, bias: Any, limits: Any) -> relax.Expr:
    """One sum per output, over the channels of its group."""
    groups, n_out = attr(node, "group"), attr(node, "n")
    batch, *spatial, channels = ctx.shape(x)
    per_group, group_out = int(channels) // groups, n_out // groups
    weight_format = parse_format(attr(node, "weight_format"))
    integer = parse_activation(attr(node, "activation_format")).bits and _channel_integers(weight_format)
    matrix, factor = _weight(ctx, node, weight_format, bool(integer))
    acc = "int32" if integer else "float32"
    weight = ctx.const(matrix.reshape(*win.kernel, per_group, n_out), name=f"{node.inputs[2].name}.grouped")
    rank = win.rank

    def build(t: te.Tensor, w: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((as_expr(0), as_expr(per_group)), name="c")
        taps = [te.reduce_axis((as_expr(0), as_expr(k)), name=f"k{i}") for i, k in enumerate(win.kernel)]

        def element(n: Any, *at: Any) -> Any:
            out, m = at[:rank], at[rank]
            channel = tirx.floordiv(m, as_expr(group_out)) * as_expr(per_group) + c
            places = [o * as_expr(s) + k * as_expr(d) for o, s, k, d in zip(out, win.strides, taps, win.dilations)]
            value = _padded(t, win, spatial, n, places, channel).astype(acc)
            if str(t.dtype) == "uint8":
                value = value - tirx.const(ZERO, acc)
            return te.sum(value * w(*taps, c, m).astype(acc), axis=[*taps, c])

        return te.compute([as_expr(d) for d in (batch, *win.out, n_out)], element, name="grouped_conv")

    out = ctx.te(build, x, weight, name="grouped_conv")
    calls(ctx).uses["grouped convolution"] += 1
    calls(ctx).refusals.append(
        (
            "x86 kernel" if ctx.target is None else f"{ctx.target.kind} kernel",
            attr(node, "sites")[0],
            "grouped convolutions run as generated loops",
        )
    )
    return _finish(ctx, node, out, scale, factor, bias, limits)


def _channel_integers(fmt: Format) -> bool:
    """Whether weights are integers with one scale per column."""
    return isinstance(fmt, IntFormat | Ternary | FixedPoint) and not fmt.group


def _weight(ctx: Context, node: ir.Node, weight_format: Any, integer: bool) -> tuple[np.ndarray, np.ndarray]:
    """The matrix ``(K, N)`` to multiply with, and what to multiply sums with ``(N,)``."""
    weight = quantized_operand(ctx, node, weight_format)
    if integer:
        zero = 0 if weight.zero_point is None else weight.zero_point.astype(np.int16)
        centred = weight.codes.astype(np.int16) - zero
        fits = np.abs(centred).max(initial=0) < 128
        return centred.astype(np.int8 if fits else np.int16), weight.scale.reshape(-1)
    return weight_format.decode(weight).astype(np.float32), np.ones(attr(node, "n"), np.float32)


def _finish(
    ctx: Context, node: ir.Node, out: Any, scale: Any, factor: np.ndarray, bias: Any, limits: Any
) -> relax.Expr:
    """Scales, bias, activation and quantizer, element by element."""
    shape = ctx.shape(out)
    activation = _ACTIVATIONS[attr(node, "epilogue")]
    operands = [out, ctx.const(factor)]
    if scale is not None:
        operands.append(scale)
    if bias is not None:
        operands.append(ctx.reshape(bias, [attr(node, "n")]))
    if limits is not None:
        operands.append(limits)

    def build(t: te.Tensor, by_channel: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        def element(n: Any, *at: Any) -> Any:
            m = at[-1]
            step = by_channel(m) * rest[0](n) if scale is not None else by_channel(m)
            y = t(n, *at).astype("float32") * step
            y = activation(y + rest[int(scale is not None)](m) if bias is not None else y)
            if limits is None:
                return y
            step, lowest, highest = (rest[-1](i) for i in range(3))
            code = tirx.max(tirx.min(te.nearbyint(y / step), highest), lowest)
            return (code.astype("int32") + ZERO).astype("uint8")

        return te.compute([as_expr(d) for d in shape], element, name="conv_epilogue")

    return ctx.te(build, *operands, name="conv_epilogue")


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1.0 + te.erf(x * tirx.const(2**-0.5, "float32")))


def _gelu_tanh(x: Any) -> Any:
    inner = tirx.const((2 / math.pi) ** 0.5, "float32") * (x + tirx.const(0.044715, "float32") * x * x * x)
    return x * 0.5 * (1.0 + te.tanh(inner))


_ACTIVATIONS = {
    "": lambda x: x,
    "relu": lambda x: tirx.max(x, tirx.const(0.0, "float32")),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * te.sigmoid(x),
}
