"""Multiplier-free formats: fixed point, and sums of powers of two.

    fixed<w,i>   w ~ 2^(i - w) * q          q a signed w-bit integer; i integer bits, the sign among them (Qi.(w-i))
    fixed<w>     likewise, one binary point per matrix, chosen for the least error
    pow2sum<N>   w ~ 2^e * sum of N terms   each term is 0 or +-2^-a, a in 0..6; one e per channel or group

A product with such a weight is shifts and additions. A pow2sum code has 4 bits per term, the first term lowest: a sign and
``a + 1``, or 0 for no term.

Sources: Zhang et al., "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (2024), section 3; Li,
Dong and Wang, "Additive Powers-of-Two Quantization" (2020), section 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.base import Format, FormatInfo, Grid, parse_group, register_format
from qcompile.formats.integer import IntFormat
from qcompile.formats.levels import LevelFormat


@dataclass(frozen=True)
class FixedPoint(Format):
    """``fixed<w,i>``, or ``fixed<w>`` with the binary point left to the search."""

    bits: int
    integer_bits: int | None = None

    group = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"{self}: fixed-point weights have 2 to 8 bits")

    def __str__(self) -> str:
        return f"fixed<{self.bits}>" if self.integer_bits is None else f"fixed<{self.bits},{self.integer_bits}>"

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        if self.integer_bits is not None:
            return self._grid(weight, self.integer_bits)
        low, high = float(weight.min()), float(weight.max())
        exponent = self._covering(max(-low, high))
        # The exponent that keeps the largest weight from being clipped, not just within half a step.
        return self._grid(weight, exponent + (high > (1 - 2.0 ** (1 - self.bits)) * 2.0 ** (exponent - 1)))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        if self.integer_bits is not None:
            return self._grid(weight, self.integer_bits)
        h = np.ones((1, 1)) if importance is None or not importance.any() else importance.reshape(len(importance), -1)
        covering = self._covering(float(np.abs(weight).max()))
        grids = [self._grid(weight, covering - shift) for shift in range(-1, self.bits)]
        errors = [
            (h * np.square(weight.astype(np.float64) - self.decode(self.quantize(weight, g)))).sum() for g in grids
        ]
        return grids[int(np.argmin(errors))]

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        return None

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        return self._integer.nearest(values, grid)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        return self._integer.values(codes, grid)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return float(self.bits)

    @property
    def _integer(self) -> IntFormat:
        return IntFormat(self.bits)

    def _covering(self, extreme: float) -> int:
        """Integer bits, sign included, with which ``-extreme`` can be written."""
        return int(np.ceil(np.log2(extreme))) + 1 if extreme > 0 else 1

    def _grid(self, weight: np.ndarray, integer_bits: int) -> Grid:
        exponent = np.clip(integer_bits - self.bits, -126, 127)
        return Grid(np.full((1, weight.shape[1]), 2.0**exponent, np.float32))


@dataclass(frozen=True)
class PowerOfTwoSum(LevelFormat):
    """``pow2sum<terms>[/g<group>]``; ``group`` is 0 for one exponent per output channel."""

    terms: int
    group: int = 0

    free_scale = False
    ratios = (2.0, 0.25, 4)

    def __post_init__(self) -> None:
        if not 1 <= self.terms <= 2:
            raise FormatError(f"{self}: a code of 8 bits holds one or two powers of two")

    def __str__(self) -> str:
        return f"pow2sum{self.terms}" + (f"/g{self.group}" if self.group else "")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Four per term."""
        return 4 * self.terms

    @cached_property
    def table(self) -> np.ndarray:
        field = np.arange(16)
        term = np.where(field & 7, np.exp2(1.0 - (field & 7)), 0) * np.where(field & 8, -1, 1)
        total = term
        for _ in range(1, self.terms):
            total = (term[:, None] + total).ravel()
        return total.astype(np.float32)

    def store_scale(self, scale: np.ndarray) -> np.ndarray:
        return np.exp2(np.clip(np.rint(np.log2(scale)), -126, 127)).astype(np.float32)

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 8) -> float:
        return super().bits_per_weight(shape, scale_bits)


_FIXED = re.compile(r"^fixed<(\d+)(?:,(-?\d+))?>$")
_POW2SUM = re.compile(r"^pow2sum(\d)(?:/g(\d+)|/channel)?$")


@register_format(info=FormatInfo("fixed<w[,i]>", "fixed point with w bits, i of them integer (QFX)", FixedPoint(8)))
def _parse_fixed(spelling: str) -> Format | None:
    if not (match := _FIXED.match(spelling)):
        return None
    return FixedPoint(int(match[1]), None if match[2] is None else int(match[2]))


@register_format(
    info=FormatInfo("pow2sum<1-2>[/g<N>]", "sums of one or two signed powers of two (APoT)", PowerOfTwoSum(2))
)
def _parse_pow2sum(spelling: str) -> Format | None:
    if not (match := _POW2SUM.match(spelling)):
        return None
    return PowerOfTwoSum(int(match[1]), parse_group(spelling, match[2]))
