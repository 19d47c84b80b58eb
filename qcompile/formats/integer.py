"""Integer formats: ``intN`` per channel or in groups along K, symmetric or asymmetric.

    symmetric    w ~ s * q,        q in [-2^(b-1), 2^(b-1) - 1]
    asymmetric   w ~ s * (q - z),  q, z in [0, 2^b - 1]

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 2.

The symmetric range has one more negative than positive code. Per group the scale is either ``max|w| / qmax``, which
leaves the extra code unused, or puts the extreme weight on the extra code, ``extreme / qmin``: that step is finer, but
weights near the other end are clipped, and the scale is negative where the extreme is positive. Whichever errs less
wins; at 2 bits it is nearly always the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.base import Format, FormatInfo, Grid, column_chunks, parse_group, register_format
from qcompile.formats.search import best_scale, usable

# The useful range of scales, relative to the one that covers all weights, and how many to try within it.
_SHRINK = {1: 0.2, 2: 0.3, 3: 0.45, 4: 0.55, 5: 0.7, 6: 0.75, 7: 0.85, 8: 0.9}
_STEPS = 14


@dataclass(frozen=True)
class IntFormat(Format):
    """``int<bits>[/g<group>][/asym]``; ``group`` is 0 for one scale per output channel."""

    bits: int
    group: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"int{self.bits}: integer weight formats have 1 to 8 bits")

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"/g{self.group}" if self.group else "") + ("" if self.symmetric else "/asym")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, _ = self.split(weight)
        low, high = blocks.min(1), blocks.max(1)
        if not self.symmetric:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            # Halving first keeps the range finite for weights near the largest float.
            scale = usable((high / 2 - low / 2) / (self.qmax / 2))
            zero = np.clip(np.rint(-low / scale), 0, self.qmax).astype(np.uint8)
            return Grid(scale, zero)
        extreme = np.where(-low > high, low, high)
        full = usable(extreme / self.qmin)
        if self.qmax < 1:
            return Grid(full)
        half = usable(np.abs(extreme) / self.qmax)
        unit = np.float32(1) / usable(np.abs(extreme))  # compare errors on normalised weights: squares cannot overflow
        normal = blocks * unit[:, None]
        error = [
            np.square(normal - self._snap(normal / (s * unit)[:, None]) * (s * unit)[:, None]).sum(1)
            for s in (half, full)
        ]
        return Grid(np.where(error[1] < error[0], full, half))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        fit = self._fit_symmetric if self.symmetric else self._fit_asymmetric
        parts = []
        for columns in column_chunks(weight):
            part = importance[:, columns] if importance is not None and importance.ndim == 2 else importance
            blocks, h = self.split(weight[:, columns], part)
            norm = usable(np.abs(blocks).max(1))
            scale, zero = fit(blocks / norm[:, None], h)
            parts.append((usable(scale * norm), zero))
        scale = np.concatenate([s for s, _ in parts], axis=1)
        return Grid(scale, None if self.symmetric else np.concatenate([z for _, z in parts], axis=1))

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        q = np.rint(values / grid.scale)
        if grid.zero_point is not None:
            q += grid.zero_point
        return np.clip(q, self.qmin, self.qmax, out=q).astype(np.int8 if self.symmetric else np.uint8)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        q = codes.astype(np.float32)
        if grid.zero_point is not None:
            q -= grid.zero_point
        return q * grid.scale

    def codes_for(self, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
        """Round ``weight`` to the grid with given ``scale`` and ``zero`` (both ``(G, N)``); int8 or uint8 codes."""
        return self.quantize(weight, Grid(scale, zero)).codes

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        k, n = shape
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + self.groups(k) * n * per_group / (k * n)

    def _snap(self, unit: np.ndarray, zero: int | np.ndarray = 0) -> np.ndarray:
        """Round multiples of the scale to the values a code can have, ``zero`` being the code of 0."""
        return np.clip(np.rint(unit), self.qmin - zero, self.qmax - zero)

    def _ratios(self) -> Iterator[np.float32]:
        yield from np.linspace(1, _SHRINK[self.bits], _STEPS, dtype=np.float32)

    def _fit_symmetric(self, blocks: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, None]:
        extreme = np.where(-blocks.min(1) > blocks.max(1), np.float32(-1), np.float32(1))
        half, full = np.full_like(extreme, 1 / max(self.qmax, 1)), extreme / self.qmin
        # Below 5 bits the spare code is worth a search with either sign; above, one step in 32 hardly matters.
        proposals = [half, full] + [full * r for r in self._ratios()]
        if self.bits < 5:
            proposals += [full * -r for r in self._ratios()]
        return best_scale(blocks, h, proposals, self._snap)[0], None

    def _fit_asymmetric(self, blocks: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
        centre = np.rint(-low / usable(high - low) * self.qmax)
        around = np.arange(-2, 3) if self.bits > 3 else np.arange(-self.qmax, self.qmax + 1)
        whole = usable((high - low) / self.qmax)
        best = whole, centre, np.full_like(whole, -1)
        for shift in around:
            zero = np.clip(centre + shift, 0, self.qmax)
            if (zero != centre + shift).all():
                continue
            cover = usable(np.maximum(high / np.maximum(self.qmax - zero, 0.5), -low / np.maximum(zero, 0.5)))
            snap = lambda unit, zero=zero: self._snap(unit, zero[:, None])  # noqa: E731
            proposals = [whole] + [cover * r for r in self._ratios()]
            scale, score = best_scale(blocks, h, proposals, snap, rounds=1)
            better = score > best[2]
            best = np.where(better, scale, best[0]), np.where(better, zero, best[1]), np.maximum(score, best[2])
        scale, zero, _ = best
        # The stored zero point is a code, so a group keeps its sign convention: a negative scale mirrors the zero.
        return np.where(scale < 0, -scale, scale), np.where(scale < 0, self.qmax - zero, zero).astype(np.uint8)


@dataclass(frozen=True)
class ActivationFormat:
    """How the input of a linear operator is quantized.

    Attributes:
        bits: 0 for float activations.
        granularity: ``token`` (one dynamic scale per row) or ``tensor`` (one static scale, zero point allowed).
    """

    bits: int = 0
    granularity: str = "token"

    def __str__(self) -> str:
        return f"int{self.bits}/{self.granularity}" if self.bits else "none"

    def round(self, rows: np.ndarray, scale: float | None = None, clip: float = 1.0) -> np.ndarray:
        """Return ``(..., K)`` activations as a reader sees them, float32.

        Args:
            rows: activations.
            scale: of static formats.
            clip: share of a token's largest magnitude that is represented.
        """
        rows = np.asarray(rows, np.float32)
        if not self.bits:
            return rows
        top = np.float32((1 << (self.bits - 1)) - 1)
        if self.granularity == "tensor":
            fixed = np.float32(scale or 1.0)
            return np.clip(np.rint(rows / fixed), -top - 1, top) * fixed
        step = np.abs(rows).max(-1, keepdims=True) * np.float32(clip) / top
        step = np.where(step == 0, np.float32(1), step)
        return np.clip(np.rint(rows / step), -top, top) * step


_INT = re.compile(r"^int([1-8])(?:/g(\d+)|/channel)?(/asym|/sym)?$")
_ACT = re.compile(r"^int([2-8])(?:/(token|tensor))?$")


@register_format(
    info=FormatInfo("int<1-8>[/g<N>][/asym]", "uniform integers, per output channel or in groups", IntFormat(4, 128))
)
def _parse_int(spelling: str) -> Format | None:
    if not (match := _INT.match(spelling)):
        return None
    bits, group, sym = match.groups()
    return IntFormat(int(bits), parse_group(spelling, group), sym != "/asym")


def parse_activation(spelling: str) -> ActivationFormat:
    """Return the activation format spelled ``none``, ``int8/token`` (the default granularity) or ``int8/tensor``."""
    if spelling in ("none", "float", "float32"):
        return ActivationFormat()
    if match := _ACT.match(spelling):
        return ActivationFormat(int(match[1]), match[2] or "token")
    raise FormatError(f"unknown activation format {spelling!r}; known: none, int2..int8 with /token or /tensor")
