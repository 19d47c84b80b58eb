"""Formats whose codes index a fixed table of levels: ``w ~ s * table[code]``.

Rounding needs the levels in ascending order: a value lies between two of them, and the midpoint decides.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from qcompile.formats.base import Format, Grid, column_chunks
from qcompile.formats.search import best_scale, least_error, usable


class LevelFormat(Format):
    """Base of formats with one table of levels, sorted out of `table`, and a scale per group."""

    ratios: tuple[float, float, int] = (1.0, 0.4, 20)
    """Scales tried, relative to the one that covers the group: first, last, how many."""

    free_scale: bool = True
    """Whether any float can be a scale; otherwise `store_scale` rounds and the search compares stored scales."""

    @property
    @abstractmethod
    def table(self) -> np.ndarray:
        """The value of every code at scale 1, float32, ``(2**bits,)``; NaN where a code is not used."""

    def store_scale(self, scale: np.ndarray) -> np.ndarray:
        """Round scales ``(G, N)`` to what the format can store; float32 as they are unless overridden."""
        return scale

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, _ = self.split(weight)
        return Grid(self.store_scale(usable(np.abs(blocks).max(1) / self._top)))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        return Grid(self.search_scale(weight, importance))

    def search_scale(self, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """Return the storable scales ``(G, N)`` with the least weighted error."""
        first, last, count = self.ratios
        ratios = [np.float32(1), *np.geomspace(first, last, count, dtype=np.float32)]
        parts = []
        for columns in column_chunks(weight):
            part = importance[:, columns] if importance is not None and importance.ndim == 2 else importance
            blocks, h = self.split(weight[:, columns], part)
            norm = usable(np.abs(blocks).max(1))
            cover = np.full_like(norm, 1 / self._top)
            if self.free_scale:
                scale, _ = best_scale(blocks / norm[:, None], h, (cover * r for r in ratios), self._snap)
                parts.append(usable(np.abs(scale) * norm))
            else:
                stored = (self.store_scale(usable(cover * r * norm)) for r in ratios)
                parts.append(least_error(blocks, h, stored, self._snap))
        return np.concatenate(parts, axis=1)

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        return Grid(self.store_scale(usable(np.abs(grid.scale * factor))))

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        return self._code[np.searchsorted(self._midpoints, values / grid.scale)]

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        return self.table[codes] * grid.scale

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        k, _ = shape
        return self.bits + scale_bits * self.groups(k) / k

    @cached_property
    def _code(self) -> np.ndarray:
        """Codes by ascending level, each level once."""
        codes = np.argsort(self.table, kind="stable")  # NaN sorts last
        levels = self.table[codes]
        first = np.concatenate([[True], levels[1:] != levels[:-1]])
        return codes[first & ~np.isnan(levels)].astype(np.uint8)

    @cached_property
    def _levels(self) -> np.ndarray:
        return self.table[self._code]

    @cached_property
    def _midpoints(self) -> np.ndarray:
        return ((self._levels[1:].astype(np.float64) + self._levels[:-1]) / 2).astype(np.float32)

    @cached_property
    def _top(self) -> np.float32:
        return np.abs(self._levels).max()

    def _snap(self, unit: np.ndarray) -> np.ndarray:
        return self._levels[np.searchsorted(self._midpoints, unit)]
