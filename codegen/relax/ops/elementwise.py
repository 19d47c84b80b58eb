"""Operators that act on each element: arithmetic, comparison, logic, activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops._kernels import elementwise, index_of, maximum, minimum
from qcompile.codegen.relax.ops._loops import grid, load, loop, loops, scalar, store, when
from qcompile.codegen.relax.registry import converter


def _dtype(value: Any) -> str:
    return str(value.ty.dtype)


def _c(value: float, like: Any) -> Any:
    """A constant of another value's dtype."""
    return tirx.const(value, _dtype(like))


def _is_float(value: Any) -> bool:
    return dtypes.is_float(_dtype(value))


# -- unary ----------------------------------------------------------------------------------------------------------


def _abs(x: Any) -> Any:
    return x if dtypes.is_unsigned(_dtype(x)) else tirx.abs(x)


def _sign(x: Any) -> Any:
    if dtypes.is_unsigned(_dtype(x)):
        return tirx.Select(x > _c(0, x), _c(1, x), _c(0, x))
    sign = tirx.Select(x > _c(0, x), _c(1, x), tirx.Select(x < _c(0, x), _c(-1, x), _c(0, x)))
    return tirx.Select(tirx.isnan(x), x, sign) if _is_float(x) else sign


def _tanh(x: Any) -> Any:
    """The library's rational approximation flushes tiny values; there ``tanh(x) = x`` to more than working precision."""
    return tirx.Select(tirx.abs(x) < _c(3e-4 if _dtype(x) == "float32" else 1e-9, x), x, tirx.tanh(x))


def _atanh(x: Any) -> Any:
    return tirx.Select(tirx.abs(x) < _c(3e-4 if _dtype(x) == "float32" else 1e-6, x), x, tirx.atanh(x))


def _softplus(x: Any) -> Any:
    """``log(1 + exp(x))`` without overflow: ``max(x, 0) + log1p(exp(-|x|))``."""
    return tirx.Select(x > _c(0, x), x, _c(0, x)) + _log1p(tirx.exp(-tirx.abs(x)))


def _log1p(x: Any) -> Any:
    return tirx.log1p(x)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return _c(1, x) / (_c(1, x) + tirx.exp(-x))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": _abs,
    "Neg": lambda x: -x,
    "Sign": _sign,
    "Floor": tirx.floor,
    "Ceil": tirx.ceil,
    "Round": tirx.nearbyint,
    "Sqrt": tirx.sqrt,
    "Reciprocal": lambda x: _c(1, x) / x,
    "Exp": tirx.exp,
    "Log": tirx.log,
    "Sin": tirx.sin,
    "Cos": tirx.cos,
    "Tan": tirx.tan,
    "Asin": tirx.asin,
    "Acos": tirx.acos,
    "Atan": tirx.atan,
    "Sinh": tirx.sinh,
    "Cosh": tirx.cosh,
    "Tanh": _tanh,
    "Asinh": tirx.asinh,
    "Acosh": tirx.acosh,
    "Atanh": _atanh,
    "Erf": tirx.erf,
    "Sigmoid": sigmoid,
    "Softplus": _softplus,
    "Softsign": lambda x: x / (_c(1, x) + tirx.abs(x)),
    "Relu": lambda x: tirx.Select(x < _c(0, x), _c(0, x), x),
    "HardSwish": lambda x: x * tirx.max(_c(0, x), tirx.min(_c(1, x), x * _c(1 / 6, x) + _c(0.5, x))),
    "Mish": lambda x: x * _tanh(_softplus(x)),
    "Not": tirx.Not,
    "BitwiseNot": lambda x: tirx.bitwise_not(x),
}


def _register_unary(op_type: str, function: Callable[[Any], Any]) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
        return elementwise(ctx, function, x, name=op_type.lower())


for _name, _function in _UNARY.items():
    _register_unary(_name, _function)


def _parametric(op_type: str, make: Callable[[ir.Node], Callable[[Any], Any]]) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
        return elementwise(ctx, make(node), x, name=op_type.lower())


def _elu(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 1.0)
    return lambda x: tirx.Select(x < _c(0, x), _c(alpha, x) * (tirx.exp(x) - _c(1, x)), x)


def _celu(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 1.0)
    return lambda x: tirx.Select(x < _c(0, x), _c(alpha, x) * (tirx.exp(x / _c(alpha, x)) - _c(1, x)), x)


def _selu(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 1.6732632423543772)
    gamma = attr(node, "gamma", 1.0507009873554805)
    return lambda x: _c(gamma, x) * tirx.Select(x > _c(0, x), x, _c(alpha, x) * (tirx.exp(x) - _c(1, x)))


def _leaky_relu(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 0.01)
    return lambda x: tirx.Select(x < _c(0, x), x * _c(alpha, x), x)


def _thresholded_relu(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 1.0)
    return lambda x: tirx.Select(x > _c(alpha, x), x, _c(0, x))


def _hard_sigmoid(node: ir.Node) -> Callable[[Any], Any]:
    alpha, beta = attr(node, "alpha", 0.2), attr(node, "beta", 0.5)
    return lambda x: tirx.max(_c(0, x), tirx.min(_c(1, x), x * _c(alpha, x) + _c(beta, x)))


def _shrink(node: ir.Node) -> Callable[[Any], Any]:
    bias, lambd = attr(node, "bias", 0.0), attr(node, "lambd", 0.5)

    def shrink(x: Any) -> Any:
        if not _is_float(x):
            y = x.astype("float32")
            return shrink(y).astype(_dtype(x))
        low, high = x + _c(bias, x), x - _c(bias, x)
        return tirx.Select(x < _c(-lambd, x), low, tirx.Select(x > _c(lambd, x), high, _c(0, x)))

    return shrink


def _gelu(node: ir.Node) -> Callable[[Any], Any]:
    if attr(node, "approximate", "none") == "tanh":
        scale = math.sqrt(2 / math.pi)
        return lambda x: _c(0.5, x) * x * (_c(1, x) + _tanh(_c(scale, x) * (x + _c(0.044715, x) * x * x * x)))
    return lambda x: _c(0.5, x) * x * (_c(1, x) + tirx.erf(x * _c(math.sqrt(0.5), x)))


def _swish(node: ir.Node) -> Callable[[Any], Any]:
    alpha = attr(node, "alpha", 1.0)
    return lambda x: x / (_c(1, x) + tirx.exp(-(x * _c(alpha, x))))


for _name, _make in {
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "LeakyRelu": _leaky_relu,
    "ThresholdedRelu": _thresholded_relu,
    "HardSigmoid": _hard_sigmoid,
    "Shrink": _shrink,
    "Gelu": _gelu,
    "Swish": _swish,
}.items():
    _parametric(_name, _make)


@converter("", "IsNaN")
def _is_nan(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    return elementwise(ctx, tirx.isnan, x, name="isnan")


@converter("", "IsInf")
def _is_inf(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    positive, negative = attr(node, "detect_positive", 1), attr(node, "detect_negative", 1)

    def is_inf(v: Any) -> Any:
        infinity = tirx.infinity(_dtype(v))
        found = [tirx.EQ(v, limit) for limit, wanted in ((infinity, positive), (-infinity, negative)) if wanted]
        return tirx.Or(*found) if len(found) == 2 else found[0] if found else tirx.const(False, "bool")

    return elementwise(ctx, is_inf, x, name="isinf")


# -- binary ---------------------------------------------------------------------------------------------------------


def _divide(a: Any, b: Any) -> Any:
    """Integers divide towards zero; a zero divisor gives 0 (as numpy does) instead of a processor trap."""
    if _is_float(a):
        return a / b
    zero = tirx.EQ(b, _c(0, b))
    return tirx.Select(zero, _c(0, a), tirx.truncdiv(a, tirx.Select(zero, _c(1, b), b)))


def _xor(a: Any, b: Any) -> Any:
    return tirx.Or(tirx.And(a, tirx.Not(b)), tirx.And(tirx.Not(a), b))


def _power(a: Any, b: Any) -> Any:
    """``a ** b`` in the type of ``a``."""
    if _is_float(a):
        return tirx.power(a, b.astype(_dtype(a)))
    return tirx.power(a.astype("float64"), b.astype("float64")).astype(_dtype(a))


def _integer_power(ctx: Context, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """Integer powers of integers by repeated squaring, exact modulo 2^bits; a negative power of anything but +-1 is 0."""
    dtype, shape = ctx.storage(a), ctx.broadcast(ctx.shape(a), ctx.shape(b))
    signed = dtypes.is_signed(ctx.storage(b))
    one, zero = tirx.const(1, dtype), tirx.const(0, dtype)

    def body(base: Any, exponent: Any, out: Any) -> None:
        square, left = scalar(dtype), scalar("int64")
        with grid(*shape) as i:
            value = load(base, index_of(ctx.shape(a), shape, i, ctx))
            power = load(exponent, index_of(ctx.shape(b), shape, i, ctx)).astype("int64")
            store(square, [0], value)
            store(left, [0], power)
            store(out, i, one)
            with loop(0, 63), when(load(left, [0]) > as_expr(0)):
                with when(tirx.EQ(load(left, [0]) % 2, as_expr(1))):
                    store(out, i, load(out, i) * load(square, [0]))
                store(square, [0], load(square, [0]) * load(square, [0]))
                store(left, [0], load(left, [0]) // 2)
            if signed:
                with when(power < as_expr(0)):
                    inverse = tirx.Select(tirx.EQ(value, one), one, zero)
                    if dtypes.is_signed(dtype):
                        even = tirx.EQ(tirx.floormod(power, as_expr(2)), as_expr(0))
                        minus = tirx.const(-1, dtype)
                        inverse = tirx.Select(tirx.EQ(value, minus), tirx.Select(even, one, minus), inverse)
                    store(out, i, inverse)

    return loops(ctx, body, [a, b], [(shape, dtype)], name="integer_power")[0]


def _register_binary(op_type: str, function: Callable[[Any, Any], Any], promote: bool = True) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return elementwise(ctx, function, a, _legacy_broadcast(ctx, node, a, b), name=op_type.lower(), promote=promote)


def _legacy_broadcast(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """Before opset 7 the second operand was aligned with the dimension ``axis`` of the first."""
    if ctx.version(node) >= 7 or not attr(node, "broadcast", 0) or "axis" not in node.attributes:
        return b
    axis = attr(node, "axis") % ctx.rank(a)
    return ctx.reshape(b, [*ctx.shape(b), *[1] * (ctx.rank(a) - axis - ctx.rank(b))])


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "And": lambda a, b: tirx.And(a, b),
    "Or": lambda a, b: tirx.Or(a, b),
    "Xor": lambda a, b: _xor(a, b),
    "Equal": lambda a, b: tirx.EQ(a, b),
    "Less": lambda a, b: tirx.LT(a, b),
    "LessOrEqual": lambda a, b: tirx.LE(a, b),
    "Greater": lambda a, b: tirx.GT(a, b),
    "GreaterOrEqual": lambda a, b: tirx.GE(a, b),
    "BitwiseAnd": lambda a, b: tirx.bitwise_and(a, b),
    "BitwiseOr": lambda a, b: tirx.bitwise_or(a, b),
    "BitwiseXor": lambda a, b: tirx.bitwise_xor(a, b),
}
for _name, _binary in _BINARY.items():
    _register_binary(_name, _binary)


@converter("", "Pow")
def _pow(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    b = _legacy_broadcast(ctx, node, a, b)
    exponent = ctx.constant(node.inputs[1])
    if exponent is not None and exponent.size == 1 and dtypes.is_float(ctx.storage(a)):
        power = float(exponent.reshape(-1)[0])
        special = {
            2.0: lambda x: x * x,
            3.0: lambda x: x * x * x,
            0.5: tirx.sqrt,
            1.0: lambda x: x,
            -1.0: lambda x: _c(1, x) / x,
        }
        if power in special and exponent.ndim <= ctx.rank(a):
            return elementwise(ctx, special[power], a, name="pow")
    if dtypes.is_integer(ctx.storage(a)) and dtypes.is_integer(ctx.storage(b)):
        return _integer_power(ctx, a, b)
    return elementwise(ctx, _power, a, b, name="pow", dtype=ctx.storage(a))


@converter("", "Mod")
def _mod(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """The sign follows the divisor (``fmod=0``, as Python) or the dividend (``fmod=1``, as C)."""
    c_style = attr(node, "fmod", 0)

    def modulo(x: Any, y: Any) -> Any:
        if _is_float(x):
            dtype = _dtype(x)
            remainder = tirx.call_pure_extern(dtype, "fmod" if dtype == "float64" else "fmodf", x, y)
            if c_style:
                return remainder
            zero = _c(0, x)
            opposite = tirx.Or(tirx.And(remainder < zero, y > zero), tirx.And(remainder > zero, y < zero))
            return tirx.Select(opposite, remainder + y, remainder)
        zero = tirx.EQ(y, _c(0, y))
        divisor = tirx.Select(zero, _c(1, y), y)
        return tirx.truncmod(x, divisor) if c_style else tirx.floormod(x, divisor)

    return elementwise(ctx, modulo, a, b, name="mod")


@converter("", "BitShift")
def _bit_shift(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """Shifting by the whole width or more, or by a negative count, moves every bit out: 0, or -1 for a negative right-shifted."""
    left = attr(node, "direction") == "LEFT"
    shift = tirx.shift_left if left else tirx.shift_right

    def shifted(x: Any, y: Any) -> Any:
        dtype = _dtype(x)
        width = dtypes.bits(dtype)
        wide = y.astype("int64")
        valid = tirx.And(wide >= as_expr(0), wide < as_expr(width))
        rest = _c(0, x)
        if not left and dtypes.is_signed(dtype):
            rest = tirx.Select(x < _c(0, x), _c(-1, x), rest)
        count = tirx.Select(valid, wide, as_expr(0)).astype(dtype)
        return tirx.Select(valid, shift(x, count), rest)

    return elementwise(ctx, shifted, a, b, name="bitshift")


@converter("", "PRelu")
def _prelu(ctx: Context, node: ir.Node, x: relax.Expr, slope: relax.Expr) -> relax.Expr:
    if ctx.version(node) < 7 and ctx.rank(slope) == 1 and ctx.rank(x) > 1:
        slope = ctx.reshape(slope, [*ctx.shape(slope), *[1] * (ctx.rank(x) - 2)])
    return elementwise(ctx, lambda v, s: tirx.Select(v < _c(0, v), v * s, v), x, slope, name="prelu")


@converter("", "Where")
def _where(ctx: Context, node: ir.Node, condition: relax.Expr, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    return elementwise(
        ctx, lambda c, x, y: tirx.Select(c, x, y), condition, a, b, name="where", promote=False, dtype=ctx.storage(a)
    )


# -- variadic -------------------------------------------------------------------------------------------------------


def _register_variadic(op_type: str, combine: Callable[[Any, Any], Any]) -> None:
    @converter("", op_type)
    def convert(ctx: Context, node: ir.Node, *args: relax.Expr) -> relax.Expr:
        def all_of(*values: Any) -> Any:
            result = values[0]
            for value in values[1:]:
                result = combine(result, value)
            return result / _c(len(values), result) if op_type == "Mean" else result

        return elementwise(ctx, all_of, *args, name=op_type.lower())


for _name, _function in {
    "Sum": lambda a, b: a + b,
    "Mean": lambda a, b: a + b,
    "Max": maximum,
    "Min": minimum,
}.items():
    _register_variadic(_name, _function)


@converter("", "Clip")
def _clip(ctx: Context, node: ir.Node, x: relax.Expr, low: Any = None, high: Any = None) -> relax.Expr:
    """``min(max(x, low), high)``; the bounds are optional inputs, before opset 11 attributes."""
    dtype = ctx.storage(x)
    if ctx.version(node) < 11:
        low = ctx.const(np.array(attr(node, "min")), dtype) if "min" in node.attributes else None
        high = ctx.const(np.array(attr(node, "max")), dtype) if "max" in node.attributes else None
    given = [b for b in (low, high) if b is not None]

    def clip(v: Any, *bounds: Any) -> Any:
        rest = list(bounds)
        if low is not None:
            bound = rest.pop(0)
            v = tirx.Select(v < bound, bound, v)
        if high is not None:
            bound = rest.pop(0)
            v = tirx.Select(v > bound, bound, v)
        return v

    return elementwise(ctx, clip, x, *(ctx.reshape(b, []) for b in given), name="clip")
