"""Fourier transforms and what goes with them: DFT, STFT, MelWeightMatrix.

The transforms are computed by their definition, a sum per output element, with the angle ``2 pi ((k n) mod N) / N`` reduced before
it is multiplied so that long signals lose no precision.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._axes import Axes
from qcompile.codegen.relax.ops._loops import OPAQUE, grid, load, loop, loops, scratch, store, when
from qcompile.codegen.relax.registry import converter

_F64 = "float64"


def _f(value: float) -> Any:
    return tirx.const(float(value), _F64)


def _angle(k: Any, n: Any, length: Dim) -> Any:
    size = tirx.max(as_expr(length), as_expr(1))
    return _f(2 * math.pi) * tirx.floormod(k * n, size).astype(_F64) / size.astype(_F64)


def _select(flag: Any, a: Any, b: Any) -> Any:
    if isinstance(flag, bool):
        return a if flag else b
    return tirx.Select(flag, as_expr(a), as_expr(b))


@converter("", "DFT")
def _dft(ctx: Context, node: ir.Node, x: relax.Expr, length_input: Any = None, axis_input: Any = None) -> relax.Expr:
    """The (inverse) transform along an axis of a real ``[..., 1]`` or complex ``[..., 2]`` tensor."""
    shape, dtype = ctx.shape(x), ctx.storage(x)
    rank = len(shape)
    inverse, onesided = attr(node, "inverse", 0), attr(node, "onesided", 0)
    if axis_input is not None:
        axes = Axes.of(ctx, rank, ctx.symbolic_or_dynamic(node.inputs[2])[:1])
    else:
        axes = Axes.of(ctx, rank, [attr(node, "axis", 1 if ctx.version(node) < 20 else -2)])
    size = axes.size(shape)  # elements given along the axis
    if length_input is not None:
        length: Dim = ctx.symbolic_or_dynamic(node.inputs[1])[0]
    elif inverse and onesided:
        length = ctx.dims.simplify((size - 1) * 2)
    else:
        length = size
    count = ctx.dims.floordiv(length, 2) + 1 if onesided and not inverse else length
    components = 1 if inverse and onesided else 2
    real = isinstance(shape[-1], int) and shape[-1] == 1
    out = [_select(f, count, d) for f, d in zip(axes.flags[:-1], shape[:-1])]
    out = [d if isinstance(d, int) or axes.static else ctx.new_dim(d, "dft") for d in out]

    def build(t: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((as_expr(0), as_expr(length)), name="k")

        def element(at: list[Any], part: int, valid: Any) -> Any:
            if part and real:
                return _f(0)
            return tirx.if_then_else(valid, t(*at, as_expr(part)).astype(_F64), _f(0))

        def body(*index: Any) -> Any:
            *where, component = index
            position = as_expr(0)
            for f, i in zip(axes.flags, where):
                position = i if f is True else position if f is False else position + tirx.Select(f, i, as_expr(0))
            source, sign = k.var, _f(1)
            if inverse and onesided:  # the other half is the conjugate
                mirrored = k.var > tirx.floordiv(as_expr(length), as_expr(2))
                source = tirx.Select(mirrored, as_expr(length) - k.var, k.var)
                sign = tirx.Select(mirrored, _f(-1), _f(1))
            at = [_select(f, source, i) for f, i in zip(axes.flags, where)]
            valid = source < as_expr(size)
            re, im = element(at, 0, valid), element(at, 1, valid) * sign
            angle = _angle(k.var, position, length)
            cosine, sine = tirx.cos(angle), tirx.sin(angle) if inverse else -tirx.sin(angle)
            first, second = re * cosine - im * sine, re * sine + im * cosine
            return te.sum(tirx.Select(tirx.EQ(component, as_expr(0)), first, second), axis=k)

        total = te.compute([as_expr(d) for d in (*out, components)], body, name="dft")
        norm = as_expr(length).astype(_F64) if inverse else _f(1)
        return te.compute(total.shape, lambda *i: (total(*i) / norm).astype(dtype), name="scaled")

    return ctx.te(build, x, name="dft", attrs=None if axes.static else OPAQUE)


@converter("", "STFT")
def _stft(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    step_input: Any,
    window: relax.Expr | None = None,
    length_input: Any = None,
) -> relax.Expr:
    """The transform of windows of the signal: ``(batch, frames, bins, 2)``."""
    batch, signal, parts = ctx.shape(x)
    dtype = ctx.storage(x)
    step = ctx.symbolic_or_dynamic(node.inputs[1])[0]
    if length_input is not None:
        length: Dim = ctx.symbolic_or_dynamic(node.inputs[3])[0]
    else:
        length = ctx.shape(window)[0] if window is not None else signal
    if window is not None:
        ctx.require_equal(ctx.shape(window)[0], length)
    frames = ctx.new_dim(ctx.dims.floordiv(signal - length, step) + 1, "frames")
    real = isinstance(parts, int) and parts == 1
    onesided = attr(node, "onesided", 1) and real
    bins = ctx.dims.simplify(ctx.dims.floordiv(length, 2) + 1) if onesided else length

    def build(t: te.Tensor, *weights: te.Tensor) -> te.Tensor:
        n = te.reduce_axis((as_expr(0), as_expr(length)), name="n")

        def body(b: Any, f: Any, k: Any, component: Any) -> Any:
            at = f * as_expr(step) + n.var
            weight = weights[0](n.var).astype(_F64) if weights else _f(1)
            re = t(b, at, as_expr(0)).astype(_F64) * weight
            im = _f(0) if real else t(b, at, as_expr(1)).astype(_F64) * weight
            angle = _angle(k, n.var, length)
            first = re * tirx.cos(angle) + im * tirx.sin(angle)
            second = im * tirx.cos(angle) - re * tirx.sin(angle)
            return te.sum(tirx.Select(tirx.EQ(component, as_expr(0)), first, second), axis=n)

        total = te.compute([as_expr(d) for d in (batch, frames, bins, 2)], body, name="stft")
        return te.compute(total.shape, lambda *i: total(*i).astype(dtype), name="rounded")

    return ctx.te(build, x, *([window] if window is not None else []), name="stft")


@converter("", "MelWeightMatrix")
def _mel_weight_matrix(
    ctx: Context,
    node: ir.Node,
    bins: Any,
    dft_length: relax.Expr,
    sample_rate: relax.Expr,
    lower: relax.Expr,
    upper: relax.Expr,
) -> Known:
    """Triangular filters, equally wide on the mel scale ``2595 log10(1 + f / 700)``."""
    to = ir.DataType(attr(node, "output_datatype", 1))
    if to not in dtypes.STORAGE or to in dtypes.BIT_PATTERN:
        raise ctx.unsupported(node, f"a result of type {to.name}")
    dtype = dtypes.STORAGE[to]
    count = ctx.symbolic_or_dynamic(node.inputs[0])[0]
    length = ctx.symbolic_or_dynamic(node.inputs[1])[0]
    spectrum = ctx.new_dim(ctx.dims.simplify(ctx.dims.floordiv(length, 2) + 1), "spectrum")

    def body(rate: Any, low: Any, high: Any, out: Any) -> None:
        edge = scratch([count + 2], "int64")

        def mel(value: Any) -> Any:
            return _f(2595 / math.log(10)) * tirx.log(_f(1) + value.astype(_F64) / _f(700))

        first, last = mel(load(low, [0])), mel(load(high, [0]))
        width = (last - first) / (as_expr(count) + 2).astype(_F64)
        with loop(0, count + 2) as i:
            at = i.astype(_F64) * width + first
            hertz = _f(700) * (tirx.exp(at * _f(math.log(10) / 2595)) - _f(1))
            bin_ = (as_expr(length) + 1).astype(_F64) * hertz / load(rate, [0]).astype(_F64)
            store(edge, [i], tirx.floor(bin_).astype("int64"))
        with grid(spectrum, count) as (j, i):
            begin, centre, end = (load(edge, [i + k]) for k in range(3))
            store(out, [j, i], tirx.const(0, "float32").astype(dtype))
            rising = tirx.And(j >= begin, j <= centre)
            with when(tirx.And(tirx.EQ(centre, begin), tirx.EQ(j, centre))):
                store(out, [j, i], tirx.const(1, "float32").astype(dtype))
            with when(tirx.And(centre > begin, rising)):
                store(out, [j, i], ((j - begin).astype(_F64) / (centre - begin).astype(_F64)).astype(dtype))
            with when(tirx.And(end > centre, tirx.And(j >= centre, j < end))):
                store(out, [j, i], ((end - j).astype(_F64) / (end - centre).astype(_F64)).astype(dtype))

    args = [ctx.reshape(v, [1]) for v in (sample_rate, lower, upper)]
    return Known(to, expr=loops(ctx, body, args, [([spectrum, count], dtype)], name="mel_weight_matrix")[0])
