"""Learned levels: ``w ~ s * table[code]`` with one table of ``2^b`` levels per matrix and a scale per group.

The table is the weighted one-dimensional k-means of the weights, each divided by its group's largest magnitude. Kernels
that look weights up in a table of 16 entries (NF4, FP4) run it unchanged.

Sources: Lloyd, "Least squares quantization in PCM" (1982); for language models Kim et al., "SqueezeLLM: Dense-and-Sparse
Quantization" (2024), section 4.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, parse_group, register_format
from qcompile.formats.search import best_scale, usable

_SAMPLES = 1 << 20
_ITERATIONS = 40


@dataclass(frozen=True)
class Codebook(Format):
    """``codebook<bits>[/g<group>]``; codes ascend with the levels, ``aux["codebook"]`` is the table, ``(2**bits,)``."""

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"codebook{self.bits}" + (f"/g{self.group}" if self.group else "")

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, h = self.split(weight)
        scale = usable(np.abs(blocks).max(1))
        return Grid(scale, None, {"codebook": self._learn(blocks / scale[:, None], np.broadcast_to(h, blocks.shape))})

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        blocks, h = self.split(weight, importance)
        start = self.minmax_grid(weight)
        largest = start.scale.max()

        def error(grid: Grid) -> float:
            levels, table = grid.scale / largest, grid.aux["codebook"]
            unit = blocks / largest
            delta = unit - table[_index(unit / levels[:, None], table)] * levels[:, None]
            return float(np.vdot(delta * h, delta))

        grids, scale = [start], start.scale
        for _ in range(3):
            # An error at scale s counts s^2 times.
            table = self._learn(blocks / scale[:, None], h * np.square(scale / largest)[:, None])
            scale = self._scales(blocks, h, scale, table)
            grids.append(Grid(scale, None, {"codebook": table}))
        return min(grids, key=error)

    def fit_group(self, weight: np.ndarray, importance: np.ndarray, grid: Grid) -> Grid:
        blocks, h = self.split(weight, importance)
        table = grid.aux["codebook"]
        return Grid(self._scales(blocks, h, usable(np.abs(blocks).max(1)), table), None, {"codebook": table})

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        return Grid(usable(grid.scale * factor), None, grid.aux)

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        return _index(values / grid.scale, grid.aux["codebook"]).astype(np.uint8)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        return grid.aux["codebook"][codes] * grid.scale

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        k, n = shape
        return self.bits + scale_bits * self.groups(k) / k + 16 * 2**self.bits / (k * n)

    def _scales(self, blocks: np.ndarray, h: np.ndarray, scale: np.ndarray, table: np.ndarray) -> np.ndarray:
        norm = scale[:, None]
        proposals = [np.full_like(scale, r) for r in np.linspace(1.3, 0.7, 9)]
        factor, _ = best_scale(blocks / norm, h, proposals, lambda unit: table[_index(unit, table)])
        return usable(factor * scale)

    def _learn(self, unit: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Weighted k-means in one dimension: sorted values make every cluster a range, and sums of ranges differences."""
        stride = -(-unit.size // _SAMPLES)
        # A step coprime to the row length samples all columns and rows.
        while stride > 1 and np.gcd(stride, unit.shape[-1]) != 1:
            stride += 1
        x, w = unit.reshape(-1)[::stride].astype(np.float64), weight.reshape(-1)[::stride].astype(np.float64)
        keep = w > 0
        if not keep.any():
            return np.linspace(-1, 1, 1 << self.bits, dtype=np.float32)
        order = np.argsort(x[keep], kind="stable")
        x, w = x[keep][order], w[keep][order]
        mass, moment = np.concatenate([[0], np.cumsum(w)]), np.concatenate([[0], np.cumsum(w * x)])
        quantiles = (np.arange(1 << self.bits) + 0.5) / (1 << self.bits)
        # Start between quantiles and even spacing, so that the tails get levels of their own.
        table = (np.interp(quantiles * mass[-1], mass[1:], x) + x[0] + (x[-1] - x[0]) * quantiles) / 2
        for _ in range(_ITERATIONS):
            edges = np.concatenate([[0], np.searchsorted(x, (table[1:] + table[:-1]) / 2), [len(x)]])
            inside = np.diff(mass[edges])
            table = np.where(inside > 0, np.diff(moment[edges]) / np.where(inside > 0, inside, 1), table)
        return np.sort(table).astype(np.float32)


def _index(unit: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.searchsorted((table[1:] + table[:-1]) / 2, unit)


_CODEBOOK = re.compile(r"^codebook([1-4])(?:/g(\d+)|/channel)?$")


@register_format(
    info=FormatInfo("codebook<1-4>[/g<N>]", "levels learned by k-means, one table per matrix", Codebook(4, 64))
)
def _parse_codebook(spelling: str) -> Format | None:
    if not (match := _CODEBOOK.match(spelling)):
        return None
    return Codebook(int(match[1]), parse_group(spelling, match[2]))
