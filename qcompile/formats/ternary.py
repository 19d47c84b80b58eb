"""Ternary weights: ``w ~ s * q`` with ``q`` in -1, 0, 1.

    absmean     s = mean |w|      absmedian     s = median |w|      q = clip(round(w / s), -1, 1)

Sources: Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (2024), section 2 (absmean); Nielsen
and Schneider-Kamp, "BitNet b1.58 Reloaded" (2024), section 3 (absmedian). Models trained to be ternary need their own rule;
for others the search of `Ternary.fit_grid` errs less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, column_chunks, parse_group, register_format
from qcompile.formats.search import best_scale, usable


@dataclass(frozen=True)
class Ternary(Format):
    """``ternary[/g<group>][/median]``; ``group`` is 0 for one scale per output channel. Codes are int8, stored in 2 bits."""

    group: int = 0
    median: bool = False

    bits = 2

    def __str__(self) -> str:
        return "ternary/" + (f"g{self.group}" if self.group else "channel") + ("/median" if self.median else "")

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        k, n = weight.shape
        length = self.group_length(k)
        typical = np.median if self.median else np.mean
        whole = k // length * length
        parts = [typical(np.abs(weight[:whole]).reshape(-1, length, n), axis=1)]
        if whole < k:
            parts.append(typical(np.abs(weight[whole:]), axis=0)[None])
        return Grid(usable(np.concatenate(parts)))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        parts = []
        for columns in column_chunks(weight):
            part = importance[:, columns] if importance is not None and importance.ndim == 2 else importance
            blocks, h = self.split(weight[:, columns], part)
            norm = usable(np.abs(blocks).max(1))
            unit = blocks / norm[:, None]
            proposals = [usable(self.minmax_grid(weight[:, columns]).scale / norm)]
            proposals += [np.full_like(norm, r) for r in np.geomspace(1, 0.1, 16)]
            scale, _ = best_scale(unit, h, proposals, lambda ratio: np.clip(np.rint(ratio), -1, 1))
            parts.append(usable(scale * norm))
        return Grid(np.concatenate(parts, axis=1))

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        return np.clip(np.rint(values / grid.scale), -1, 1).astype(np.int8)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        return codes * grid.scale

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        return self.bits + scale_bits * self.groups(shape[0]) / shape[0]


_TERNARY = re.compile(r"^ternary(?:/g(\d+)|/channel)?(/median|/mean)?$")


@register_format(
    info=FormatInfo("ternary/channel|g<N>[/median]", "-1, 0, 1 with the mean (median) magnitude as scale", Ternary())
)
def _parse_ternary(spelling: str) -> Format | None:
    if not (match := _TERNARY.match(spelling)):
        return None
    return Ternary(parse_group(spelling, match[1]), match[2] == "/median")
