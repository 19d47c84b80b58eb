"""Block-scaled floats whose scales are small floats themselves.

    mxfp4, mxfp6, mxfp8   w ~ 2^e * v     one power of two (8 bits, E8M0) per 32 weights
    nvfp4                 w ~ t * b * v   one e4m3 scale b per 16 weights, one float32 scale t per matrix

with ``v`` an e2m1, e3m2 or e4m3 number. ``Grid.scale`` holds the product of all scales, exactly.

Sources: Open Compute, "Microscaling Formats (MX) Specification" (2023), sections 5 and 6; NVIDIA, "Pretraining Large
Language Models with NVFP4" (2025), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.formats.base import Format, FormatInfo, Grid, register_format
from qcompile.formats.floats import minifloat_table
from qcompile.formats.levels import LevelFormat
from qcompile.formats.search import usable

_ELEMENTS = {4: (2, 1), 6: (3, 2), 8: (4, 3)}


@dataclass(frozen=True)
class MxFloat(LevelFormat):
    """``mxfp4``, ``mxfp6`` (e3m2) and ``mxfp8`` (e4m3)."""

    bits: int

    group = 32
    free_scale = False
    ratios = (2.0, 0.5, 4)  # covers the three powers of two around the one that just avoids clipping

    def __str__(self) -> str:
        return f"mxfp{self.bits}"

    @cached_property
    def table(self) -> np.ndarray:
        return minifloat_table(*_ELEMENTS[self.bits])

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        # The specification's rule: the largest weight gets the largest exponent, even if its mantissa is then clipped.
        blocks, _ = self.split(weight)
        largest = np.exp2(np.floor(np.log2(self._top)))
        return Grid(self.store_scale(usable(np.abs(blocks).max(1) / largest), np.floor))

    def store_scale(self, scale: np.ndarray, rounding: np.ufunc = np.rint) -> np.ndarray:
        return np.exp2(np.clip(rounding(np.log2(scale)), -126, 127)).astype(np.float32)

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 8) -> float:
        return super().bits_per_weight(shape, scale_bits)


@dataclass(frozen=True)
class NvFp4(LevelFormat):
    """``nvfp4``; ``aux["tensor_scale"]`` is ``t``, a scalar."""

    bits = 4
    group = 16
    free_scale = False
    ratios = (1.5, 0.6, 14)

    def __str__(self) -> str:
        return "nvfp4"

    @cached_property
    def table(self) -> np.ndarray:
        return minifloat_table(2, 1)

    def store_scale(self, scale: np.ndarray) -> np.ndarray:
        return _E4M3[np.searchsorted((_E4M3[1:] + _E4M3[:-1]) / 2, scale)]

    def minmax_grid(self, weight: np.ndarray) -> Grid:
        blocks, _ = self.split(weight)
        tensor_scale = self._tensor_scale(weight)
        return self._product(usable(np.abs(blocks).max(1) / self._top) / tensor_scale, tensor_scale)

    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        tensor_scale = self._tensor_scale(weight)
        return self._product(self.search_scale(weight / tensor_scale, importance), tensor_scale)

    def fit_group(self, weight: np.ndarray, importance: np.ndarray, grid: Grid) -> Grid:
        tensor_scale = grid.aux["tensor_scale"]
        return self._product(self.search_scale(weight / tensor_scale, importance), tensor_scale)

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        tensor_scale = grid.aux["tensor_scale"]
        return self._product(usable(np.abs(grid.scale * factor)) / tensor_scale, tensor_scale)

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 8) -> float:
        return super().bits_per_weight(shape, scale_bits) + 32 / (shape[0] * shape[1])

    def _product(self, block_scale: np.ndarray, tensor_scale: np.ndarray) -> Grid:
        scale = self.store_scale(block_scale) * tensor_scale
        return Grid(scale.astype(np.float32), None, {"tensor_scale": tensor_scale})

    def _tensor_scale(self, weight: np.ndarray) -> np.ndarray:
        return usable(np.abs(weight).max() / (self._top * _E4M3[-1]))


_E4M3 = np.sort(minifloat_table(4, 3)[1:127])  # positive finite values


def _parser(spelling: str, fmt: Format, description: str) -> None:
    register_format(info=FormatInfo(spelling, description, fmt))(lambda text: fmt if text == spelling else None)


for _bits in _ELEMENTS:
    _exponent, _mantissa = _ELEMENTS[_bits]
    _parser(f"mxfp{_bits}", MxFloat(_bits), f"e{_exponent}m{_mantissa} with a power-of-two scale per 32 weights")
_parser("nvfp4", NvFp4(), "e2m1 with an e4m3 scale per 16 weights and one scale per matrix")
