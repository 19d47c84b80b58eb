"""The geometry of a sliding window over an image in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.errors import FormatError


@dataclass(frozen=True)
class Geometry:
    """Windows of ``kernel`` rows and columns, ``stride`` apart, over an image with zeros around it.

    Attributes:
        height, width: of the image.
        kernel, stride, dilation: ``(rows, columns)``.
        pads: zeros added at the top, left, bottom, right.
    """

    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.pads) < 0 or min(self.out_shape) < 1:
            raise FormatError(
                f"no window of {self.kernel} fits an image of {(self.height, self.width)} with {self.pads}"
            )

    @property
    def out_shape(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        top, left, bottom, right = self.pads
        sizes = ((self.height + top + bottom, 0), (self.width + left + right, 1))
        return tuple((size - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for size, i in sizes)  # type: ignore[return-value]

    @property
    def windows(self) -> int:
        """Number of windows."""
        return self.out_shape[0] * self.out_shape[1]

    @property
    def taps(self) -> int:
        """Positions of a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def padded(self) -> bool:
        """Whether any window reaches outside."""
        return bool((self.tokens < 0).any())

    @cached_property
    def tokens(self) -> np.ndarray:
        """The token of every tap of every window, int64 ``(windows, taps)``; -1 outside the image."""
        rows, columns = self.out_shape
        y = np.arange(rows)[:, None] * self.stride[0] - self.pads[0] + np.arange(self.kernel[0]) * self.dilation[0]
        x = np.arange(columns)[:, None] * self.stride[1] - self.pads[1] + np.arange(self.kernel[1]) * self.dilation[1]
        y, x = y[:, None, :, None], x[None, :, None, :]
        inside = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        return np.where(inside, y * self.width + x, -1).reshape(self.windows, self.taps)

    def gather(self, x: np.ndarray, outside: int = 0) -> np.ndarray:
        """Taps of frames ``(V, height * width, C)``: ``(V, windows, taps, C)``."""
        known = x[:, np.maximum(self.tokens, 0)]
        return np.where(self.tokens[..., None] < 0, outside, known)
