"""Streams: what flows between the nodes of a fixed-point program.

A stream carries frames of ``tokens`` vectors of ``channels`` integers, row-major. An image is a stream of
``height * width`` tokens in raster order, a flat vector one of a single token. Every channel has an exact range: the
smallest and largest integer that any input of the program can make it take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType


@dataclass(frozen=True, eq=False)
class Stream:
    """The type of an edge.

    Attributes:
        name: unique in its program.
        tokens, channels: shape of a frame.
        low, high: int64 ``(channels,)``, the exact range of every channel.
        scale: what one step stands for, float64 scalar or ``(channels,)``; None where nobody asked.
    """

    name: str
    tokens: int
    channels: int
    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray | float | None = None

    def __post_init__(self) -> None:
        if self.low.shape != (self.channels,) or self.high.shape != (self.channels,):
            raise FormatError(f"{self.name}: ranges must have one entry per channel")
        if (self.low > self.high).any():
            raise FormatError(f"{self.name}: an empty range")

    @classmethod
    def of(cls, name: str, tokens: int, channels: int, kind: IntType, scale: float | None = None) -> Stream:
        """A stream that may take every value of an integer type."""
        low, high = (np.full(channels, v, np.int64) for v in (kind.low, kind.high))
        return cls(name, tokens, channels, low, high, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """``(tokens, channels)``."""
        return self.tokens, self.channels

    @property
    def type(self) -> IntType:
        """The narrowest type that holds every channel."""
        return IntType.covering(int(self.low.min()), int(self.high.max()))

    def check(self, values: np.ndarray) -> np.ndarray:
        """Return ``values`` ``(V, tokens, channels)`` as int64.

        Raises:
            FormatError: wrong shape, or a value outside the range.
        """
        values = np.asarray(values, np.int64)
        if values.ndim != 3 or values.shape[1:] != self.shape:
            raise FormatError(f"{self.name}: expected (V, {self.tokens}, {self.channels}), got {values.shape}")
        if ((values < self.low) | (values > self.high)).any():
            raise FormatError(f"{self.name}: a value lies outside [{self.low.min()}, {self.high.max()}]")
        return values
