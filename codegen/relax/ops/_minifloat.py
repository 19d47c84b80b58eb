"""Conversion between float32 and the 8-bit and 4-bit floats, on bit patterns held in bytes.

A finite number of a format with ``m`` mantissa bits and exponent bias ``b`` is ``2^(E - m) * q`` with ``E >= 1 - b`` and an
integer ``q < 2^(m + 1)``; its code without the sign is ``(E - (1 - b)) * 2^m + q``. Encoding therefore rounds
``|x| * 2^(m - E)`` to the nearest even integer, where ``E`` is the exponent of ``x`` or ``1 - b`` if that is larger; a carry
into the next exponent comes out right by itself. Decoding looks the code up in a table.

Formats: OCP 8-bit floating point specification (E4M3, E5M2), Noune et al. 2022 (the FNUZ variants), OCP microscaling
formats (E2M1, E8M0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.ops._kernels import elementwise

_D = ir.DataType


@dataclass(frozen=True)
class Minifloat:
    """A format of at most 8 bits with a sign.

    Attributes:
        bits: width.
        mantissa: number of mantissa bits.
        bias: of the exponent.
        largest: code of the largest finite number.
        infinity: code of infinity, or ``None``.
        nan: code that a NaN gets.
        signed_zero: whether there is a negative zero.
        saturating: whether what is too large always becomes the largest finite number.
    """

    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int
    signed_zero: bool = True
    saturating: bool = False


FORMATS = {
    _D.FLOAT8E4M3FN: Minifloat(8, 3, 7, 0x7E, None, 0x7F),
    _D.FLOAT8E4M3FNUZ: Minifloat(8, 3, 8, 0x7F, None, 0x80, signed_zero=False),
    _D.FLOAT8E5M2: Minifloat(8, 2, 15, 0x7B, 0x7C, 0x7E),
    _D.FLOAT8E5M2FNUZ: Minifloat(8, 2, 16, 0x7F, None, 0x80, signed_zero=False),
    _D.FLOAT4E2M1: Minifloat(4, 1, 1, 0x7, None, 0x8, saturating=True),  # a NaN becomes -0
}


def decode(ctx: Context, x: relax.Expr, dtype: ir.DataType) -> relax.Expr:
    """The float32 values of a tensor of codes."""
    codes: np.ndarray = np.arange(256, dtype=np.uint8)
    if dtype == _D.FLOAT4E2M1:
        codes = codes & np.uint8(0xF)
    with np.errstate(all="ignore"):
        table = ctx.const(codes.view(dtype.numpy()).astype(np.float32))
    return ctx.te(
        lambda c, t: te.compute(c.shape, lambda *i: t(c(*i).astype("int64")), name="decode"), x, table, name="decode"
    )


def encode(ctx: Context, x: relax.Expr, dtype: ir.DataType, *, saturate: bool, round_mode: str = "up") -> relax.Expr:
    """The codes of a float32 tensor, rounded to nearest even (E8M0: as ``round_mode`` says)."""
    if dtype == _D.FLOAT8E8M0:
        return elementwise(ctx, lambda v: _encode_exponent(v, saturate, round_mode), x, name="encode", dtype="uint8")
    fmt = FORMATS[dtype]
    return elementwise(ctx, lambda v: _encode(v, fmt, saturate), x, name="encode", dtype="uint8")


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _power_of_two(exponent: Any) -> Any:
    return tirx.reinterpret("float32", tirx.shift_left(exponent + _i32(127), _i32(23)))


def _encode(v: Any, fmt: Minifloat, saturate: bool) -> Any:
    raw = tirx.reinterpret("int32", v)
    magnitude = tirx.bitwise_and(raw, _i32(0x7FFFFFFF))
    smallest = 1 - fmt.bias
    exponent = tirx.max(tirx.shift_right(magnitude, _i32(23)) - _i32(127), _i32(smallest))
    bounded = tirx.min(exponent, _i32(60))  # far above every format, far below overflow of the scaling
    quotient = tirx.nearbyint(tirx.reinterpret("float32", magnitude) * _power_of_two(_i32(fmt.mantissa) - bounded))
    scaled = tirx.min(quotient, tirx.const(float(1 << 20), "float32")).astype("int32")
    code = (bounded - _i32(smallest)) * _i32(1 << fmt.mantissa) + scaled
    infinite = tirx.EQ(magnitude, _i32(0x7F800000))
    is_nan = magnitude > _i32(0x7F800000)
    limit = _i32(fmt.largest)
    if saturate or fmt.saturating:
        code = tirx.Select(tirx.Or(infinite, code > limit), limit, code)
    else:
        overflow = _i32(fmt.nan if fmt.infinity is None else fmt.infinity)
        code = tirx.Select(tirx.Or(infinite, code > limit), overflow, code)
    negative = raw < _i32(0)
    sign = _i32(1 << (fmt.bits - 1))
    if fmt.signed_zero:
        signed = tirx.Select(negative, tirx.bitwise_or(code, sign), code)
    else:
        keep = tirx.And(negative, tirx.And(code > _i32(0), code < _i32(0x80)))
        signed = tirx.Select(keep, tirx.bitwise_or(code, sign), code)
    nan = _i32(fmt.nan)
    with_sign = tirx.Select(negative, tirx.bitwise_or(nan, sign), nan)
    return tirx.Select(is_nan, with_sign if fmt.signed_zero else nan, signed)


def _encode_exponent(v: Any, saturate: bool, round_mode: str) -> Any:
    """E8M0: the exponent of a positive number, ``code = log2(v) + 127`` rounded up, down, or to nearest."""
    raw = tirx.reinterpret("int32", v)
    magnitude = tirx.bitwise_and(raw, _i32(0x7FFFFFFF))
    exponent = tirx.shift_right(magnitude, _i32(23))
    fraction = tirx.bitwise_and(magnitude, _i32(0x7FFFFF))
    if round_mode == "up":
        normal = tirx.Select(fraction > _i32(0), exponent + _i32(1), exponent)
        # below 2^-126 the field is 0 and 2^-127 is half of the fraction's range
        small = tirx.Select(fraction > _i32(0x400000), _i32(1), _i32(0))
    elif round_mode == "down":
        normal, small = exponent, _i32(0)
    else:
        normal = tirx.Select(fraction >= _i32(0x400000), exponent + _i32(1), exponent)
        small = tirx.Select(fraction > _i32(0x600000), _i32(1), _i32(0))
    code = tirx.Select(tirx.EQ(exponent, _i32(0)), small, normal)
    top = _i32(254)
    code = tirx.Select(code > top, top if saturate else _i32(255), code)
    infinite = tirx.EQ(magnitude, _i32(0x7F800000))
    code = tirx.Select(infinite, top if saturate else _i32(255), code)
    return tirx.Select(magnitude > _i32(0x7F800000), _i32(255), code)
