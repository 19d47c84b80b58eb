"""Kernels as tensor expressions that several operator families share: element-wise, reductions, matrix products, softmax.

They take and return Relax expressions and know nothing of ONNX nodes, so a converter of any domain can build on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.ir.expr import GenericConst

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr

HALF = ("float16", "bfloat16")


def compute_dtype(dtype: str) -> str:
    """The dtype to compute in: the 16-bit floats are computed in float32 and rounded once."""
    return "float32" if dtype in HALF else dtype


def immediate(expr: relax.Expr) -> Any:
    """The value of a one-element embedded constant as a TIR immediate, or ``None``.

    Zeros and non-finite floats stay tensors: the simplifier would turn ``x * 0`` into 0 for infinite ``x`` as well.
    """
    if not isinstance(expr, GenericConst):
        return None
    array = expr.value.numpy()
    if array.size != 1:
        return None
    value = array.reshape(-1)[0]
    dtype = str(expr.ty.dtype)
    if dtypes.is_float(dtype):
        if not np.isfinite(value) or value == 0:
            return None
        return tirx.const(float(value), dtype)
    return tirx.const(bool(value) if dtype == "bool" else int(value), dtype)


def index_of(shape: Sequence[Dim], out_shape: Sequence[Dim], index: Sequence[Any], ctx: Context) -> tuple[Any, ...]:
    """The index into a tensor of ``shape`` broadcast to ``out_shape``, at the output position ``index``."""
    result = []
    offset = len(out_shape) - len(shape)
    for i, d in enumerate(shape):
        if isinstance(d, int) and d == 1:
            result.append(as_expr(0))
        elif ctx.dims.equal(d, out_shape[offset + i]) or isinstance(d, int):
            result.append(index[offset + i])
        else:
            result.append(tirx.if_then_else(tirx.EQ(d, as_expr(1)), as_expr(0), index[offset + i]))
    return tuple(result)


def elementwise(
    ctx: Context,
    function: Callable[..., Any],
    *args: relax.Expr,
    name: str,
    promote: bool = True,
    dtype: str | None = None,
) -> relax.Expr:
    """``function`` applied to the broadcast elements of the arguments.

    Args:
        ctx: the conversion.
        function: on TIR scalars.
        args: tensors; one-element constants enter the kernel as immediates.
        name: of the kernel.
        promote: compute 16-bit floats in float32.
        dtype: of the result; by default the first argument's if computing was promoted, else what ``function`` gives.
    """
    shape = ctx.broadcast(*(ctx.shape(a) for a in args))
    scalars = [immediate(a) for a in args]
    if all(s is not None for s in scalars):
        scalars = [None] * len(args)
    tensors = [a for a, s in zip(args, scalars) if s is None]
    shapes = [ctx.shape(a) for a in tensors]
    half = next((ctx.storage(a) for a in args if ctx.storage(a) in HALF), None) if promote else None

    def widen(value: Any) -> Any:
        return value.astype("float32") if half and str(value.ty.dtype) in HALF else value

    def build(*xs: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            loaded = iter([x(*index_of(s, shape, index, ctx)) for x, s in zip(xs, shapes)])
            values = [widen(next(loaded) if s is None else s) for s in scalars]
            result = function(*values)
            if dtype is not None:
                return result.astype(dtype)
            return result.astype(half) if half and str(result.ty.dtype) == "float32" else result

        return te.compute([as_expr(d) for d in shape], body, name=name)

    return ctx.te(build, *tensors, name=name)


# -- reductions -----------------------------------------------------------------------------------------------------


def lowest(dtype: str) -> Any:
    """The identity of max: -inf for floats, the smallest value otherwise."""
    return -tirx.infinity(dtype) if dtypes.is_float(dtype) else tirx.min_value(dtype)


def highest(dtype: str) -> Any:
    """The identity of min."""
    return tirx.infinity(dtype) if dtypes.is_float(dtype) else tirx.max_value(dtype)


def maximum(a: Any, b: Any) -> Any:
    """The larger value; NaN if either is NaN."""
    if dtypes.is_float(str(a.ty.dtype)):
        return tirx.Select(tirx.Or(a > b, tirx.isnan(a)), a, b)
    return tirx.max(a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller value; NaN if either is NaN."""
    if dtypes.is_float(str(a.ty.dtype)):
        return tirx.Select(tirx.Or(a < b, tirx.isnan(a)), a, b)
    return tirx.min(a, b)


def _reducer(combine: Callable[[Any, Any], Any], identity: Callable[[str], Any], name: str) -> Any:
    return te.comm_reducer(combine, identity, name=name)


SUM = _reducer(lambda a, b: a + b, lambda t: tirx.const(0, t), "sum")
PRODUCT = _reducer(lambda a, b: a * b, lambda t: tirx.const(1, t), "product")
MAX = _reducer(maximum, lowest, "max")
MIN = _reducer(minimum, highest, "min")
FAST_MAX = _reducer(lambda a, b: tirx.max(a, b), lowest, "max")
ANY = _reducer(lambda a, b: tirx.Or(a, b), lambda t: tirx.const(False, "bool"), "any")
ALL = _reducer(lambda a, b: tirx.And(a, b), lambda t: tirx.const(True, "bool"), "all")


def reduce_te(
    ctx: Context,
    x: te.Tensor,
    axes: Sequence[int],
    reducer: Any,
    *,
    keepdims: bool,
    before: Callable[[Any], Any] = lambda v: v,
    name: str = "reduce",
) -> te.Tensor:
    """``reducer`` over ``axes`` of ``before(x)`` as a tensor expression."""
    axes = sorted(axes)
    shape = list(x.shape)
    if not axes:
        return te.compute(shape, lambda *i: before(x(*i)), name=name)
    loops = {a: te.reduce_axis((as_expr(0), shape[a]), name=f"k{a}") for a in axes}
    out = [as_expr(1) if i in loops else d for i, d in enumerate(shape) if keepdims or i not in loops]

    def body(*index: Any) -> Any:
        position = iter(index)
        full = []
        for i in range(len(shape)):
            if i in loops:
                full.append(loops[i].var)
                if keepdims:
                    next(position)
            else:
                full.append(next(position))
        return reducer(before(x(*full)), axis=list(loops.values()))

    return te.compute(out, body, name=name)


# -- matrix product -------------------------------------------------------------------------------------------------


def matmul(
    ctx: Context,
    a: relax.Expr,
    b: relax.Expr,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    acc_dtype: str | None = None,
    out_dtype: str | None = None,
    name: str = "matmul",
) -> relax.Expr:
    """The batched matrix product as numpy's ``matmul`` defines it, for operands of two or more dimensions.

    Leading dimensions broadcast. 16-bit floats accumulate in float32; ``acc_dtype`` is the type of products and sums.
    """
    sa, sb = ctx.shape(a), ctx.shape(b)
    acc = acc_dtype or compute_dtype(ctx.storage(a))
    out = out_dtype or acc_dtype or ctx.storage(a)
    m, k = (sa[-1], sa[-2]) if transpose_a else (sa[-2], sa[-1])
    kb, n = (sb[-1], sb[-2]) if transpose_b else (sb[-2], sb[-1])
    ctx.require_equal(k, kb)
    batch = ctx.broadcast(sa[:-2], sb[:-2])
    k = k if isinstance(k, int) else kb

    def build(x: te.Tensor, y: te.Tensor) -> te.Tensor:
        r = te.reduce_axis((as_expr(0), as_expr(k)), name="k")

        def body(*index: Any) -> Any:
            *lead, i, j = index
            ia = index_of(sa[:-2], batch, lead, ctx)
            ib = index_of(sb[:-2], batch, lead, ctx)
            left = x[(*ia, r, i)] if transpose_a else x[(*ia, i, r)]
            right = y[(*ib, j, r)] if transpose_b else y[(*ib, r, j)]
            return te.sum(left.astype(acc) * right.astype(acc), axis=r)

        shape = [as_expr(d) for d in (*batch, m, n)]
        result = te.compute(shape, body, name=name)
        if out != acc:
            result = te.compute(shape, lambda *i: result_cast(result[i], out), name=f"{name}_cast")
        return result

    def result_cast(value: Any, dtype: str) -> Any:
        return value.astype(dtype)

    return ctx.te(build, a, b, name=name)


# -- softmax --------------------------------------------------------------------------------------------------------


def softmax(ctx: Context, x: relax.Expr, axis: int, *, log: bool = False) -> relax.Expr:
    """``exp(x - max) / sum(exp(x - max))`` along an axis, or its logarithm ``x - max - log(sum(exp(x - max)))``."""
    dtype = ctx.storage(x)
    acc = compute_dtype(dtype)
    axis %= ctx.rank(x)

    def build(t: te.Tensor) -> te.Tensor:
        shape = list(t.shape)

        def pick(index: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(as_expr(0) if i == axis else v for i, v in enumerate(index))

        peak = reduce_te(ctx, t, [axis], MAX, keepdims=True, before=lambda v: v.astype(acc), name="peak")
        if log:
            total = _sum_exp(shape, lambda *i: tirx.exp(t[i].astype(acc) - peak[pick(i)]), axis)
            return te.compute(
                shape,
                lambda *i: (t[i].astype(acc) - peak[pick(i)] - tirx.log(total[pick(i)])).astype(dtype),
                name="log_softmax",
            )
        powers = te.compute(shape, lambda *i: tirx.exp(t[i].astype(acc) - peak[pick(i)]), name="powers")
        total = _sum_exp(shape, lambda *i: powers[i], axis)
        return te.compute(shape, lambda *i: (powers[i] / total[pick(i)]).astype(dtype), name="softmax")

    return ctx.te(build, x, name="log_softmax" if log else "softmax")


def _sum_exp(shape: list[Any], value: Callable[..., Any], axis: int) -> te.Tensor:
    k = te.reduce_axis((as_expr(0), shape[axis]), name="k")
    out = [as_expr(1) if i == axis else d for i, d in enumerate(shape)]
    return te.compute(
        out, lambda *i: te.sum(value(*(k.var if n == axis else v for n, v in enumerate(i))), axis=k), name="total"
    )
