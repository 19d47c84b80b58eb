"""Parameters and latency of ``rtl/mac_array.v``, which matrix-vector units, depthwise convolutions and products of streams share."""

from __future__ import annotations

import numpy as np

from qcompile.codegen.fixed.nodes.base import divisors
from qcompile.codegen.verilog import build
from qcompile.formats.fixed import IntType, Requantize

STYLES = {"dsp": 0, "lut": 1}
"""How products are formed: by multipliers of the device, or by adders (``rtl/product.v``)."""

POWERS = 2
"""The style of ``rtl/product.v`` for factors that are codes of powers of two."""


def turns(pe: int, rows: int) -> int:
    """Sums that one unit of ``rtl/scale_array.v`` requantizes in turns: they become whole at most every ``rows`` cycles."""
    return max(d for d in divisors(pe) if d <= rows)


def mac_array(
    *,
    pe: int,
    simd: int,
    rows: int,
    style: int,
    weight: IntType,
    product: IntType,
    accumulator: IntType,
    requantize: Requantize | None,
    bounds: tuple[np.ndarray, np.ndarray],
    output: IntType,
    search: dict[str, int] | None = None,
) -> tuple[dict[str, int], int]:
    """Parameters of the array but for its inputs, and the cycles from a step to the beat it makes.

    Args:
        pe, simd: of the folding.
        rows: steps of a sum.
        style: of ``rtl/product.v``.
        weight, product, accumulator, output: types.
        requantize: to the output.
        bounds: exact range of the accumulator per channel.
        search: parameters of ``rtl/thresholds.v``, where it takes the place of a multiplication.
    """
    a_bits = build.signed_bits(accumulator)
    parameters, cycles = scale_array(pe, rows, requantize, bounds, output, a_bits, search)
    triple = style == STYLES["lut"] and weight.bits > (2 if weight.signed else 1)
    multiplied = (weight.bits + 1) // 2 if style == STYLES["lut"] else 1
    summed = 1 + triple + multiplied + (simd - 1).bit_length() + 1
    values = dict(
        STYLE=style,
        P_BITS=build.signed_bits(product),
        A_BITS=a_bits,
        **parameters,
    )
    return values, summed + cycles + 1


def scale_array(
    pe: int,
    rows: int,
    requantize: Requantize | None,
    bounds: tuple[np.ndarray, np.ndarray],
    output: IntType,
    a_bits: int,
    search: dict[str, int] | None = None,
) -> tuple[dict[str, int], int]:
    """Parameters of ``rtl/scale_array.v`` and the cycles it takes; arguments as in `mac_array`, `a_bits` of the sums."""
    parameters, cycles = build.requantize_parameters(requantize, bounds, output, a_bits)
    if search is not None:
        parameters |= dict(MULTIPLY=0, SHIFT=0, ROUND=0, CLAMP_LOW=0, CLAMP_HIGH=0, **search)
        cycles = search["THRESHOLDS"]
    shared = turns(pe, rows) if parameters["MULTIPLY"] or search else 1
    captured = shared > 1 and search is not None
    return parameters | {"TURNS": shared}, captured + shared - 1 + cycles


def scale_words(requantize: Requantize | None, columns: int, units: int) -> np.ndarray:
    """Multipliers of ``columns`` channels in the words that ``units`` units of ``rtl/scale_array.v`` read."""
    assert requantize is not None
    return np.broadcast_to(build.scale_codes(requantize), (columns,)).reshape(-1, units)
