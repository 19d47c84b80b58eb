"""Fixed-point integers: element types, and the exact step from one scale to another.

A tensor of real numbers ``x`` is held as integers ``q`` with ``x ~ scale * q``. Passing from an accumulator ``a`` to a
narrower ``y`` with another scale is a multiplication by a ratio of scales, done in integers:

    y = clamp(round_half_even(a * multiplier / 2^shift), low, high),    multiplier / 2^shift ~ scale_a / scale_y

(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), section
2.2, with ties to even instead of upwards). The rounding needs one addition, since for ``s > 0``

    round_half_even(p / 2^s) = floor((p + 2^(s-1) - 1 + bit_s(p)) / 2^s)

with ``bit_s(p)`` the bit that becomes the lowest one. Clamping comes before narrowing. For a positive multiplier the map
is monotone, so it can also be written with thresholds: ``y = low + sum_j [a >= t_j]`` (Umuroglu et al., "FINN" (2017),
section 4.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.errors import FormatError

MAX_PRODUCT_BITS = 62
"""Products are formed in 64-bit integers; one bit is left for the rounding."""


@dataclass(frozen=True)
class IntType:
    """Two's complement or unsigned integers of ``bits`` bits."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            raise FormatError(f"an integer type has 1 to 64 bits, not {self.bits}")

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @classmethod
    def covering(cls, low: int, high: int) -> IntType:
        """The narrowest type that holds every integer from ``low`` to ``high``."""
        if low > high:
            raise FormatError(f"empty range [{low}, {high}]")
        if low >= 0:
            return cls(max(1, int(high).bit_length()), False)
        return cls(max(max(int(high), 0).bit_length(), int(~low).bit_length()) + 1, True)

    @property
    def low(self) -> int:
        """Smallest value."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest value."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> str:
        """The machine type with 8, 16, 32 or 64 bits that holds it, e.g. ``int16``."""
        width = next(w for w in (8, 16, 32, 64) if w >= self.bits)
        return f"{'int' if self.signed else 'uint'}{width}"

    def holds(self, values: np.ndarray) -> bool:
        """Whether every one of ``values`` is in range."""
        return not values.size or (int(values.min()) >= self.low and int(values.max()) <= self.high)


def shift_half_even(product: np.ndarray, shift: int) -> np.ndarray:
    """``round_half_even(product / 2^shift)`` on int64, elementwise; ``shift >= 0``."""
    product = np.asarray(product, np.int64)
    if not shift:
        return product
    return (product + ((1 << (shift - 1)) - 1) + ((product >> shift) & 1)) >> shift


@dataclass(frozen=True, eq=False)
class Requantize:
    """``y = clamp(round_half_even(a * multiplier / 2^shift), low, high)``.

    Attributes:
        multiplier: int64 ``(N,)``, one per channel, or ``(1,)`` for all.
        shift: bits shifted out, the same for all channels.
        low, high: range of the result.
    """

    multiplier: np.ndarray
    shift: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.multiplier.ndim != 1 or self.multiplier.dtype != np.int64:
            raise FormatError("multipliers are an int64 vector")
        if not 0 <= self.shift <= MAX_PRODUCT_BITS or self.low > self.high:
            raise FormatError(f"requantization by 2^-{self.shift} to [{self.low}, {self.high}] is not possible")

    @classmethod
    def from_scale(
        cls, scale: np.ndarray, low: int, high: int, *, error: float = 2.0**-6, bits: int = 17
    ) -> Requantize:
        """The one with the narrowest multipliers whose result differs from ``a * scale`` by at most ``error`` before rounding.

        Args:
            scale: positive or negative float64 ``(N,)``, the ratio of the scales.
            low, high: range of the result.
            error: largest difference, in steps of the result, anywhere in its range.
            bits: of the largest magnitude of a multiplier, 17 so that multipliers of 18 bits take it with a sign; where
                it binds, the error is what it allows.

        Raises:
            FormatError: a ratio is not finite, or is so large that the multiplier would be wider than ``bits``.
        """
        scale = np.atleast_1d(np.asarray(scale, np.float64))
        if not np.isfinite(scale).all():
            raise FormatError("ratios of scales must be finite")
        reach = max(abs(low), abs(high), 1)
        used = np.abs(scale[scale != 0])
        best = None
        for shift in range(MAX_PRODUCT_BITS):
            multiplier = np.rint(scale * 2.0**shift)
            if np.abs(multiplier).max(initial=0) >= 2**bits:
                break
            best = cls(multiplier.astype(np.int64), shift, low, high)
            if not used.size or (np.abs(multiplier / 2.0**shift - scale)[scale != 0] / used).max() * reach <= error:
                break
        if best is None:
            raise FormatError(f"a ratio of scales of {np.abs(scale).max():g} needs more than {bits} bits")
        return best

    @property
    def type(self) -> IntType:
        """The narrowest type of the result, whatever comes in."""
        return IntType.covering(self.low, self.high)

    @property
    def multiplier_type(self) -> IntType:
        """The narrowest type of the multipliers."""
        return IntType.covering(int(self.multiplier.min()), int(self.multiplier.max()))

    @cached_property
    def is_shift(self) -> bool:
        """Whether every multiplier is 1, so that no multiplication is needed."""
        return bool((self.multiplier == 1).all())

    @property
    def is_clamp(self) -> bool:
        """Whether nothing but the clamp is left."""
        return self.is_shift and self.shift == 0

    def apply(self, accumulator: np.ndarray) -> np.ndarray:
        """Requantize ``(..., N)`` integers; int64."""
        product = np.asarray(accumulator, np.int64) * self.multiplier
        return np.clip(shift_half_even(product, self.shift), self.low, self.high)

    def bounds(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The exact range of the result per channel, given that of the accumulator ``(N,)``.

        Raises:
            FormatError: a product does not fit 64-bit integers.
        """
        least, most = self.unclamped(low, high)
        return np.clip(least, self.low, self.high), np.clip(most, self.low, self.high)

    def unclamped(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Like `bounds`, before the clamp."""
        reach = max(abs(int(low.min())), abs(int(high.max())), abs(int(low.max())), abs(int(high.min())))
        widest = reach * int(np.abs(self.multiplier).max())
        if widest.bit_length() > MAX_PRODUCT_BITS:
            raise FormatError(
                f"products of requantization need {widest.bit_length() + 1} bits; 64-bit integers are used"
            )
        ends = np.stack([shift_half_even(end * self.multiplier, self.shift) for end in (low, high)])
        return ends.min(0), ends.max(0)

    def product_type(self, low: np.ndarray, high: np.ndarray) -> IntType:
        """The narrowest type of ``a * multiplier``."""
        ends = np.stack([low * self.multiplier, high * self.multiplier])
        return IntType.covering(int(ends.min()), int(ends.max()))

    def thresholds(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Thresholds ``t`` int64 ``(high - low, N)``, ascending, with ``y = self.low + sum_j [a >= t_j]`` for all ``a``.

        Found by bisection over the accumulator's range ``low`` to ``high`` ``(N,)``; a threshold that no accumulator
        reaches is ``high + 1``, one that all reach is ``low``.

        Raises:
            FormatError: a multiplier is negative, which makes the map decreasing.
        """
        if (self.multiplier < 0).any():
            raise FormatError("thresholds need positive multipliers")
        shape = (self.high - self.low, len(low))
        below, above = np.broadcast_to(low - 1, shape).copy(), np.broadcast_to(high + 1, shape).copy()
        wanted = self.low + 1 + np.arange(shape[0])[:, None]
        while (above - below > 1).any():
            middle = (above + below) // 2
            reached = self.apply(middle) >= wanted
            open_ = above - below > 1
            above = np.where(open_ & reached, middle, above)
            below = np.where(open_ & ~reached, middle, below)
        return above
