"""Dual-grained int4: integer groups inside an integer channel, so that kernels accumulate in integers only.

    w ~ s[n] * c,    c = g[k // size, n] * q,    q in [-8, 7],  g in [1, 15],  hence |c| <= 120

``c`` is an exact int8 weight with one float scale per output channel: a W8A8 kernel runs it unchanged once the groups are
multiplied out, which is an integer operation. ``Grid.scale`` is ``s`` ``(1, N)``, ``aux["group_scale"]`` is ``g`` ``(G, N)``.

Source: Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM" (2023), section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, Quantized, column_chunks, parse_group, register_format
from qcompile.formats.search import best_scale, usable

_TOP = 15  # largest group scale


@dataclass(frozen=True)
class DualInt4(Format):
    """``dual4/g<group>``."""

    group: int = 128

    bits = 4

    def __str__(self) -> str:
        return f"dual4/g{self.group}"

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, _ = self.split(weight)
        step = np.maximum(blocks.max(1) / 7, -blocks.min(1) / 8)
        channel = usable(step.max(0, keepdims=True) / _TOP)
        # Rounding up keeps every weight within range.
        return self._grid(channel, np.ceil(step / channel - 1e-4))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        parts = []
        for columns in column_chunks(weight):
            part = importance[:, columns] if importance is not None and importance.ndim == 2 else importance
            parts.append(self._fit(weight[:, columns], part))
        return self._grid(np.concatenate([c for c, _ in parts], axis=1), np.concatenate([g for _, g in parts], axis=1))

    def fit_group(self, weight: np.ndarray, importance: np.ndarray, grid: Grid) -> Grid:
        blocks, h = self.split(weight / grid.scale, importance)
        one = np.ones_like(grid.scale)
        return self._grid(grid.scale, self._best_group_scale(blocks, h, one, range(1, _TOP + 1))[0])

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        return self._grid(grid.scale, np.rint(grid.aux["group_scale"] * factor))

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        return _snap(values / (grid.scale * grid.aux["group_scale"])).astype(np.int8)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        # In this order, so that the product with the channel scale is that of the int8 weight.
        return (codes * grid.aux["group_scale"].astype(np.int16)).astype(np.float32) * grid.scale

    def int8_codes(self, quantized: Quantized) -> np.ndarray:
        """Return the int8 weights ``c`` ``(K, N)`` that stand for the same matrix with the channel scales alone."""
        multiplier = self.expand(quantized.aux["group_scale"], quantized.codes.shape[0])
        return (quantized.codes.astype(np.int16) * multiplier).astype(np.int8)

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        k, _ = shape
        return self.bits + (4 * self.groups(k) + scale_bits) / k

    def _fit(self, weight: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """First the best real scale per group, then the channel scale of which they are nearly integer multiples."""
        unit = usable(np.abs(weight).max(0, keepdims=True))
        blocks, h = self.split(weight / unit, importance)
        norm = usable(np.abs(blocks).max(1))
        proposals = (np.full_like(norm, r / 7.5) for r in np.linspace(1, 0.55, 14))
        wanted = np.abs(best_scale(blocks / norm[:, None], h, proposals, _snap)[0]) * norm
        covering = self.minmax_grid(weight / unit)
        channel, group = covering.scale, covering.aux["group_scale"]
        group, error = self._best_group_scale(blocks, h, channel, [group])
        best = channel, group, error
        for shrink in np.linspace(1, 0.6, 9, dtype=np.float32):
            channel = usable(wanted.max(0, keepdims=True) * shrink / _TOP)
            near = np.rint(wanted / channel)
            group, error = self._best_group_scale(blocks, h, channel, [near - 1, near, near + 1])
            better = error.sum(0, keepdims=True) < best[2].sum(0, keepdims=True)
            best = (
                np.where(better, channel, best[0]),
                np.where(better, group, best[1]),
                np.where(better, error, best[2]),
            )
        return best[0] * unit, best[1]

    @staticmethod
    def _best_group_scale(
        blocks: np.ndarray, h: np.ndarray, channel: np.ndarray, candidates: Iterable
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best of some integer group scales, ``(G, N)``, and its errors."""
        best = np.ones((blocks.shape[0], blocks.shape[2]), np.float32)
        least = np.full_like(best, np.inf)
        for candidate in candidates:
            group = np.broadcast_to(np.clip(candidate, 1, _TOP), best.shape).astype(np.float32)
            step = (group * channel)[:, None]
            delta = blocks - _snap(blocks / step) * step
            error = np.einsum("gln,gln->gn", delta * h, delta)
            best, least = np.where(error < least, group, best), np.minimum(error, least)
        return best, least

    def _grid(self, channel: np.ndarray, group: np.ndarray) -> Grid:
        return Grid(channel.astype(np.float32), None, {"group_scale": np.clip(group, 1, _TOP).astype(np.uint8)})


def _snap(unit: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(unit), -8, 7)


_DUAL = re.compile(r"^dual4/g(\d+)$")


@register_format(
    info=FormatInfo("dual4/g<N>", "int4 groups that multiply out to an exact int8 channel (DGQ)", DualInt4(128))
)
def _parse_dual(spelling: str) -> Format | None:
    if not (match := _DUAL.match(spelling)):
        return None
    return DualInt4(parse_group(spelling, match[1]))
