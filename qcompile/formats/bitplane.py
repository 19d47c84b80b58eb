"""Hierarchical linear quantization: one scale per bit plane and group, and an offset per group.

    w ~ o + sum over planes p of s[p] * b[p],    b[p] in 0, 1

Uniform integers are the case ``s[p] = 2^p s``, so no group errs more than with those, and a bit-serial kernel pays nothing for
the freedom: it multiplies each plane's sum by some scale in any case. ``Grid.scale`` is ``s`` ``(B, G, N)``,
``aux["offset"]`` is ``o`` ``(G, N)``; bit ``p`` of a code is ``b[p]``.

Source: "ELUTQ: Efficient LUT-Aware Quantization for Deploying Large Language Models on Edge Devices" (2025), section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, column_chunks, parse_group, register_format
from qcompile.formats.search import usable

_ROUNDS = 8


@dataclass(frozen=True)
class BitPlane(Format):
    """``bitplane<bits>[/g<group>]``."""

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"bitplane{self.bits}" + (f"/g{self.group}" if self.group else "")

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, _ = self.split(weight)
        return self._uniform(*self._range(blocks, weight.shape[0]))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        parts = []
        for columns in column_chunks(weight):
            part = importance[:, columns] if importance is not None and importance.ndim == 2 else importance
            parts.append(self._fit(*self.split(weight[:, columns], part), weight.shape[0]))
        return Grid(
            np.concatenate([p.scale for p in parts], axis=-1),
            None,
            {"offset": np.concatenate([p.aux["offset"] for p in parts], axis=-1)},
        )

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid:
        scaled = (grid.aux["offset"] * factor).astype(np.float32)
        return Grid((grid.scale * factor).astype(np.float32), None, {"offset": scaled})

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        codes = np.zeros(values.shape, np.uint8)
        least = np.full(values.shape, np.inf, np.float32)
        for code in range(1 << self.bits):
            distance = np.abs(values - self._level(code, grid))
            closer = distance < least
            codes[closer] = code
            np.minimum(least, distance, out=least)
        return codes

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        total = np.broadcast_to(grid.aux["offset"], codes.shape).astype(np.float32)
        for plane in range(self.bits):
            total = total + (codes >> plane & 1) * grid.scale[plane]
        return total

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        return self.bits + (self.bits + 1) * scale_bits * self.groups(shape[0]) / shape[0]

    def _level(self, code: int, grid: Grid) -> np.ndarray:
        return grid.aux["offset"] + sum(grid.scale[p] for p in range(self.bits) if code >> p & 1)

    def _range(self, blocks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest weight of each group, leaving out the padding of the last."""
        low, high = blocks.min(1), blocks.max(1)
        if rest := k % self.group_length(k):
            low[-1], high[-1] = blocks[-1, :rest].min(0), blocks[-1, :rest].max(0)
        return low, high

    def _uniform(self, low: np.ndarray, high: np.ndarray) -> Grid:
        step = high / (2**self.bits - 1) - low / (2**self.bits - 1)
        scale = step * np.exp2(np.arange(self.bits, dtype=np.float32))[:, None, None]
        return Grid(scale.astype(np.float32), None, {"offset": low.astype(np.float32)})

    def _fit(self, blocks: np.ndarray, h: np.ndarray, k: int) -> Grid:
        """Alternate nearest codes and least-squares scales from several clipped uniform grids; keep the best per group."""
        norm = usable(np.abs(blocks).max(1))
        blocks = blocks / norm[:, None]
        low, high = self._range(blocks, k)
        best = self._uniform(low, high)
        least = np.full_like(norm, np.inf)
        for clip in (1.0, 0.8, 0.6):
            grid = self._uniform(low * clip, high * clip)
            for round_ in range(_ROUNDS):
                aligned = Grid(grid.scale[:, :, None], None, {"offset": grid.aux["offset"][:, None]})
                codes = self.nearest(blocks, aligned)
                delta = blocks - self.values(codes, aligned)
                error = np.einsum("gln,gln->gn", delta * h, delta)
                offset = np.where(error < least, grid.aux["offset"], best.aux["offset"])
                best = Grid(np.where(error < least, grid.scale, best.scale), None, {"offset": offset})
                least = np.minimum(least, error)
                if round_ < _ROUNDS - 1:
                    grid = self._least_squares(blocks, h, codes, grid)
        return self.rescale(best, norm)

    def _least_squares(self, blocks: np.ndarray, h: np.ndarray, codes: np.ndarray, grid: Grid) -> Grid:
        """Return the offset and plane scales that fit given codes best, one small linear system per group."""
        planes = [np.ones_like(blocks)] + [(codes >> p & 1).astype(np.float32) for p in range(self.bits)]
        size = len(planes)
        normal = np.empty((blocks.shape[0], blocks.shape[2], size, size))
        right = np.empty((blocks.shape[0], blocks.shape[2], size))
        for i, plane in enumerate(planes):
            weighted = plane * h
            right[..., i] = np.einsum("gln,gln->gn", weighted, blocks)
            for j in range(i, size):
                normal[..., i, j] = normal[..., j, i] = np.einsum("gln,gln->gn", weighted, planes[j])
        present = np.concatenate([grid.aux["offset"][None], grid.scale]).transpose(1, 2, 0)
        # A plane that no code uses, or two that always agree, keep what they have.
        ridge = 1e-5 * normal[..., :1, :1] + 1e-12
        right += ridge[..., 0] * present
        solution = np.linalg.solve(normal + ridge * np.eye(size), right[..., None])[..., 0].astype(np.float32)
        return Grid(solution[..., 1:].transpose(2, 0, 1).copy(), None, {"offset": solution[..., 0].copy()})


_BITPLANE = re.compile(r"^bitplane([1-4])(?:/g(\d+)|/channel)?$")


@register_format(info=FormatInfo("bitplane<1-4>[/g<N>]", "one scale per bit plane and group (ELUTQ)", BitPlane(2, 128)))
def _parse_bitplane(spelling: str) -> Format | None:
    if not (match := _BITPLANE.match(spelling)):
        return None
    return BitPlane(int(match[1]), parse_group(spelling, match[2]))
