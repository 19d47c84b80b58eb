"""Super-blocks: integers in short blocks, whose scales are small integers times one scale per 256 weights (K-quants).

    q2_k, q4_k, q5_k   w ~ d[s] a[g] q - m[s] b[g],   q in [0, 2^bits - 1],               a, b unsigned
    q3_k, q6_k         w ~ d[s] a[g] q,               q in [-2^(bits-1), 2^(bits-1) - 1],  a signed

    format   block g   integers a, b   weights of s
    q2_k     16        4 bits          256
    q3_k     16        6 bits          256
    q4_k     32        6 bits          256
    q5_k     32        6 bits          256
    q6_k     16        8 bits          256

``d`` and ``m`` are floats of 11 significant bits. ``Grid.scale`` is ``d a``, ``aux["super_scale"]`` is ``d``; those with an offset
have ``aux["offset"]``, ``-m b``, and ``aux["super_offset"]``, ``m``; all ``(G, N)``, what 256 weights share repeated. Formats and names
are those of llama.cpp's `ggml-quants`; what a file of its own holds byte by byte is another matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, Quantized, register_format
from qcompile.formats.integer import IntFormat
from qcompile.formats.search import usable

SUPER = 256
"""Weights along K of a super-block."""

_BLOCK = {2: (16, 15), 3: (16, 31), 4: (32, 63), 5: (32, 63), 6: (16, 127)}
"""By bits: length of a block, and the largest integer of its scale."""

_INTEGER_BITS = {2: 4, 3: 6, 4: 6, 5: 6, 6: 8}


@dataclass(frozen=True)
class SuperBlock(Format):
    """``q<bits>_k``."""

    bits: int

    def __str__(self) -> str:
        return f"q{self.bits}_k"

    @property
    def group(self) -> int:  # type: ignore[override]
        """Weights of a block."""
        return _BLOCK[self.bits][0]

    @property
    def top(self) -> int:
        """The largest integer scale of a block."""
        return _BLOCK[self.bits][1]

    @property
    def symmetric(self) -> bool:
        """Whether there are no offsets."""
        return self.bits in (3, 6)

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        if self.symmetric:
            return self._grid(IntFormat(self.bits, self.group).minmax_grid(weight).scale, None)
        blocks, _ = self.split(weight)
        return self._grid(*self._range(blocks, 1.0))

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        blocks, h = self.split(weight, importance)
        best = self.minmax_grid(weight)
        fitted = self._grid(*self._fit(weight, importance))
        norm = usable(np.abs(blocks).max((0, 1)))

        def error(grid: Grid) -> np.ndarray:
            """Of every super-block, ``(G, N)``."""
            each = Grid(grid.scale[:, None], None, {name: array[:, None] for name, array in grid.aux.items()})
            delta = (blocks - self.values(self.nearest(blocks, each), each)) / norm
            return self._spread(np.einsum("gln,gln->gn", delta * h, delta), np.add.reduce)

        better = error(fitted) < error(best)
        merged = {name: np.where(better, array, dict(best._arrays())[name]) for name, array in fitted._arrays()}
        return Grid(merged.pop("scale"), None, merged)

    def fit_group(self, weight: np.ndarray, importance: np.ndarray, grid: Grid) -> Grid:
        scale, offset = self._fit(weight, importance)
        aux = {name: array for name, array in grid.aux.items() if name != "offset"}
        if offset is not None:
            aux["offset"] = -aux["super_offset"] * self._integers(-offset, aux["super_offset"], 0)
        return Grid(aux["super_scale"] * self._integers(scale, aux["super_scale"], 1), None, aux)

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid:
        factor = np.broadcast_to(factor, grid.scale.shape).astype(np.float32)
        return self._grid(grid.scale * factor, None if self.symmetric else grid.aux["offset"] * factor)

    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        if self.symmetric:
            low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
            return np.clip(np.rint(values / grid.scale), low, high).astype(np.int8)
        unit = (values - grid.aux["offset"]) / grid.scale
        return np.clip(np.rint(unit), 0, (1 << self.bits) - 1).astype(np.uint8)

    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        scaled = codes.astype(np.float32) * grid.scale
        return scaled if self.symmetric else scaled + grid.aux["offset"]

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        parameters = 1 if self.symmetric else 2
        k, _ = shape
        stored = self.groups(k) * _INTEGER_BITS[self.bits] + -(-k // SUPER) * 16
        return self.bits + parameters * stored / k

    # Parts: integers per block and floats per super-block

    def parts(self, quantized: Quantized) -> dict[str, np.ndarray]:
        """The integers of blocks, int8 ``(G, N)``, and the floats of super-blocks, float32 ``(S, N)``."""
        step = SUPER // self.group
        whole = quantized.aux["super_scale"]
        found = {"block_scale": np.rint(quantized.scale / whole).astype(np.int8), "super_scale": whole[::step]}
        if not self.symmetric:
            whole = quantized.aux["super_offset"]
            offset = np.rint(-quantized.aux["offset"] / whole).astype(np.int8)
            found |= {"block_offset": offset, "super_offset": whole[::step]}
        return found

    def assemble(self, codes: np.ndarray, parts: dict[str, np.ndarray]) -> Quantized:
        """The inverse of `parts`."""
        groups = self.groups(len(codes))

        def whole(name: str) -> np.ndarray:
            return np.repeat(parts[name].astype(np.float32), SUPER // self.group, axis=0)[:groups]

        aux = {"super_scale": whole("super_scale")}
        if not self.symmetric:
            aux["super_offset"] = whole("super_offset")
            aux["offset"] = -aux["super_offset"] * parts["block_offset"].astype(np.float32)
        return Quantized(codes, aux["super_scale"] * parts["block_scale"].astype(np.float32), None, aux)

    def _grid(self, scale: np.ndarray, offset: np.ndarray | None) -> Grid:
        whole = self._whole(scale)
        aux = {"super_scale": whole}
        if offset is not None:
            aux["super_offset"] = self._whole(offset)
            aux["offset"] = -aux["super_offset"] * self._integers(-offset, aux["super_offset"], 0)
        return Grid(whole * self._integers(scale, whole, 1), None, aux)

    def _whole(self, values: np.ndarray) -> np.ndarray:
        """The float of each super-block, so that its largest value is the largest integer."""
        step = usable(self._spread(np.abs(values), np.maximum.reduce) / self.top)
        mantissa, exponent = np.frexp(step)
        return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent).astype(np.float32)

    def _integers(self, values: np.ndarray, whole: np.ndarray, least: int) -> np.ndarray:
        """``values / whole`` as integers of magnitude ``least`` to ``top``, float32."""
        size = np.clip(np.rint(np.abs(values) / whole), least, self.top)
        return np.where(values < 0, -size, size).astype(np.float32)

    def _spread(self, values: np.ndarray, reduce: Callable[..., np.ndarray]) -> np.ndarray:
        """Reduce ``(G, N)`` over the blocks of each super-block, and repeat the result."""
        step = SUPER // self.group
        return np.repeat(reduce_at(values, step, reduce), step, axis=0)[: len(values)]

    # Blocks

    def _range(self, blocks: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(blocks.min(1), 0), blocks.max(1)
        top = (1 << self.bits) - 1
        return usable((high / top - low / top) * share), (low * share).astype(np.float32)

    def _fit(self, weight: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Float scales and offsets of blocks: least squares on the codes of ranges clipped more and more."""
        if self.symmetric:
            return IntFormat(self.bits, self.group).fit_grid(weight, importance).scale, None
        blocks, h = self.split(weight, importance)
        norm = usable(np.abs(blocks).max(1))
        blocks = blocks / norm[:, None]
        total = np.broadcast_to(h, blocks.shape).sum(1)
        mean = (blocks * h).sum(1) / total
        best = self._range(blocks, 1.0)
        least = np.full(norm.shape, np.inf, np.float32)
        for share in (1.0, 0.9, 0.8, 0.7):
            scale, offset = self._range(blocks, share)
            for _ in range(4):
                codes = np.clip(np.rint((blocks - offset[:, None]) / scale[:, None]), 0, (1 << self.bits) - 1)
                delta = blocks - codes * scale[:, None] - offset[:, None]
                error = (delta * delta * h).sum(1)
                best = (np.where(error < least, scale, best[0]), np.where(error < least, offset, best[1]))
                least = np.minimum(error, least)
                middle = (codes * h).sum(1) / total
                spread = (codes * codes * h).sum(1) / total - middle * middle
                slope = (codes * blocks * h).sum(1) / total - middle * mean
                scale = np.where(spread > 1e-6, slope / np.where(spread > 1e-6, spread, 1), scale)
                scale = np.maximum(scale, 1e-6).astype(np.float32)
                offset = np.minimum(mean - scale * middle, 0).astype(np.float32)
        return usable(best[0] * norm), best[1] * norm


def reduce_at(values: np.ndarray, step: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """Reduce runs of ``step`` rows; the last may be shorter."""
    return np.stack([reduce(values[i : i + step], axis=0) for i in range(0, len(values), step)])


_SUPERBLOCK = re.compile(r"^q([2-6])_k$")


@register_format(
    info=FormatInfo(
        "q<2-6>_k", "blocks of 16 or 32 with integer scales in super-blocks of 256 (K-quants)", SuperBlock(4)
    )
)
def _parse_superblock(spelling: str) -> Format | None:
    return SuperBlock(int(match[1])) if (match := _SUPERBLOCK.match(spelling)) else None
