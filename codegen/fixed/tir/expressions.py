"""TIR expressions that several nodes share."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from qcompile.formats.fixed import IntType, Requantize


def machine_int(bits: int) -> str:
    """``int32`` where ``bits`` fit, else ``int64``; sums are formed in these."""
    return "int32" if bits <= 32 else "int64"


def const(value: int, dtype: str) -> Any:
    """An integer constant."""
    return tirx.const(value, dtype)


def shift_half_even(product: Any, shift: int, dtype: str) -> Any:
    """``round_half_even(product / 2^shift)``; see `qcompile.formats.fixed`."""
    if not shift:
        return product
    lowest = (product >> const(shift, dtype)) & const(1, dtype)
    return (product + (lowest + const((1 << (shift - 1)) - 1, dtype))) >> const(shift, dtype)


def put_out(
    accumulator: Any,
    multiplier: Any,
    step: Requantize | None,
    bounds: tuple[np.ndarray, np.ndarray],
    out: IntType,
) -> Any:
    """Requantize one accumulator, whose range per channel is ``bounds``, to type ``out``.

    A multiplication by 1, a shift by 0 and a clamp that cannot bind are left out.
    """
    if step is None:
        return accumulator.astype(out.dtype)
    work = machine_int(step.product_type(*bounds).bits + 2)
    value = accumulator.astype(work)
    if not step.is_shift:
        value = value * multiplier.astype(work)
    product = tirx.Var("product", work)
    result = clamp(shift_half_even(product, step.shift, work), step, bounds, work).astype(out.dtype)
    return tirx.Let(product, value, result)


def clamp(value: Any, step: Requantize, bounds: tuple[np.ndarray, np.ndarray], dtype: str) -> Any:
    """Clamp where the exact range of the unclamped value says it can bind."""
    least, most = step.unclamped(*bounds)
    if most.max() > step.high:
        value = tirx.min(value, const(step.high, dtype))
    if least.min() < step.low:
        value = tirx.max(value, const(step.low, dtype))
    return value
