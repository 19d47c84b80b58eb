"""Vector exp, erf, tanh and sigmoid as TIR expressions.

TVM lowers ``exp`` of a vector to one libm call per lane. These helpers build the same functions from multiplications
and additions, so they stay in vector registers on every target. They take and return a float32 expression of any
number of lanes and may be called from TVMScript or from an IR builder.

    exp     x = n ln 2 + r, |r| <= ln 2 / 2;  exp(x) = 2^n p(r), p of degree 5 with p(r) = 1 + r + r^2 q(r)
            (Cody and Waite, "Software Manual for the Elementary Functions", 1980, chapter 6)
    erf     x p(x^2 / 7.6832 - 1), p of degree 13, for |x| < 3.92, where erf rounds to 1; centred on the interval the
            coefficients stay small, and there is no division, which costs as much as ten multiplications
    tanh    x P(x^2) / Q(x^2), degrees 4 and 4, for |x| < 9.01, where tanh rounds to 1

The coefficients minimise the largest relative error (least squares with Lawson's reweighting); in float32 arithmetic it
stays below 8e-7 over the whole range. NaN propagates, infinities give the limits, exp underflows to 0 below -87.33.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

Expr = Any

_EXP = (0.499992311000824, 0.16667114198207855, 0.041890114545822144, 0.008312525227665901)
_ERF = (
    0.36073702573776245,
    -0.1801082193851471,
    0.134063720703125,
    -0.10918579995632172,
    0.09094574302434921,
    -0.0740312784910202,
    0.05622238665819168,
    -0.04303095117211342,
    0.03611025959253311,
    -0.021755563095211983,
    0.004543966148048639,
    -0.004454320762306452,
    0.009117135778069496,
    -0.004072187934070826,
)
_TANH_P = (1.0, 0.133803606, 0.00349479727, 2.0596049580490217e-05, 1.3336546977882335e-08)
_TANH_Q = (1.0, 0.4671367407, 0.02587397397, 0.0003284340783, 7.769157832626661e-07)

_EXP_LOW, _EXP_HIGH = -87.33654, 88.72284
_ERF_ONE, _TANH_ONE = 3.92, 9.01
_ROUND = 1.5 * 2.0**23
"""Adding this to a float32 of magnitude below 2^22 leaves its nearest integer in the low mantissa bits."""


def lanes_of(x: Expr) -> int:
    """Number of lanes of an expression."""
    return x.ty.dtype.lanes


def const(value: float, lanes: int, dtype: str = "float32") -> Expr:
    """``value`` in every lane."""
    scalar = tirx.const(value, dtype)
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a * b + c``, one instruction where the target has it."""
    return tirx.call_llvm_pure_intrin(a.ty, "llvm.fmuladd", a, b, c)


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """``body(v)`` with ``v`` evaluated once; expressions are trees, so a shared node would be computed per use."""
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """``sum_i coefficients[i] x^i``; ``x`` must be a variable (it is used more than once).

    Even and odd powers are two of Horner's chains in ``x^2``: half the latency of one for a single multiplication more.
    """
    n = lanes_of(x)

    def chain(coefficients: Sequence[float], x: Expr) -> Expr:
        result = const(coefficients[-1], n)
        for c in reversed(coefficients[:-1]):
            result = fma(result, x, const(c, n))
        return result

    if len(coefficients) < 4:
        return chain(coefficients, x)
    return _let(x * x, lambda square: fma(chain(coefficients[1::2], square), x, chain(coefficients[::2], square)))


def exp(x: Expr) -> Expr:
    """``e^x``; relative error below 3e-7, 0 for x < -87.33654, +inf for x > 88.72284."""
    n = lanes_of(x)
    ints = f"int32x{n}" if n > 1 else "int32"
    high, low = 0.693359375, -2.12194440e-4  # ln 2 = high + low, high with few bits so that k * high is exact

    def body(x: Expr) -> Expr:
        def reduced(shifted: Expr) -> Expr:
            k = shifted - const(_ROUND, n)
            r = _let(k, lambda k: fma(k, const(-low, n), fma(k, const(-high, n), x)))
            p = _let(r, lambda r: polynomial(r, (1.0, 1.0, *_EXP)))
            # The low bits of `shifted` are k; adding them to the exponent field multiplies by 2^k.
            bits = tirx.reinterpret(ints, p) + tirx.shift_left(tirx.reinterpret(ints, shifted), const(23, n, "int32"))
            value = tirx.reinterpret(x.ty, bits)
            over = tirx.Select(x > const(_EXP_HIGH, n), const(math.inf, n), value)
            return tirx.Select(x < const(_EXP_LOW, n), const(0.0, n), over)

        return _let(fma(x, const(1 / math.log(2), n), const(_ROUND, n)), reduced)

    return _let(x, body)


def _saturated(x: Expr, one: float, inside: Callable[[Expr], Expr]) -> Expr:
    """``inside(x)`` for ``|x| < one``, else the sign of ``x``; NaN for NaN."""
    n = lanes_of(x)

    def body(x: Expr) -> Expr:
        upper = tirx.Select(x > const(one, n), const(1.0, n), inside(x))
        return tirx.Select(x < const(-one, n), const(-1.0, n), upper)

    return _let(x, body)


def erf(x: Expr) -> Expr:
    """The error function; relative error below 8e-7."""
    n = lanes_of(x)

    def inside(x: Expr) -> Expr:
        centred = fma(x * x, const(2 / _ERF_ONE**2, n), const(-1.0, n))
        return _let(centred, lambda s: x * polynomial(s, _ERF))

    return _saturated(x, _ERF_ONE, inside)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent; relative error below 5e-7."""

    def inside(x: Expr) -> Expr:
        return _let(x * x, lambda t: x * polynomial(t, _TANH_P) / polynomial(t, _TANH_Q))

    return _saturated(x, _TANH_ONE, inside)


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + e^-x)``; relative error below 5e-7."""
    n = lanes_of(x)
    return const(1.0, n) / (const(1.0, n) + exp(const(0.0, n) - x))


def relu(x: Expr) -> Expr:
    """``max(x, 0)``."""
    return tirx.max(x, const(0.0, lanes_of(x)))


def gelu(x: Expr) -> Expr:
    """``x (1 + erf(x / sqrt 2)) / 2``, as ``x / 2 + x^2 p(x^2)`` with the polynomial of `erf`."""
    n = lanes_of(x)
    coefficients = [c * math.sqrt(0.125) for c in _ERF]

    def body(x: Expr, square: Expr) -> Expr:
        centred = fma(square, const(1 / _ERF_ONE**2, n), const(-1.0, n))
        inside = _let(centred, lambda s: fma(square, polynomial(s, coefficients), x * const(0.5, n)))
        return tirx.Select(square > const(2 * _ERF_ONE**2, n), relu(x), inside)

    return _let(x, lambda x: _let(x * x, lambda square: body(x, square)))


def gelu_tanh(x: Expr) -> Expr:
    """``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    n = lanes_of(x)
    c = math.sqrt(2 / math.pi)

    def body(x: Expr) -> Expr:
        inner = x * fma(x * x, const(0.044715 * c, n), const(c, n))
        half = x * const(0.5, n)
        return _let(half, lambda h: fma(h, tanh(inner), h))

    return _let(x, body)


def silu(x: Expr) -> Expr:
    """``x sigmoid(x)``."""
    return _let(x, lambda x: x * sigmoid(x))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
"""The activations of `Epilogue`, by name."""
