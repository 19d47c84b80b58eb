"""The protocol of a weight format and its short spelling.

A weight matrix is always ``(K, N)``: ``K`` input channels (the reduction axis), ``N`` output channels, as in ONNX
``MatMul``. A format maps it to integer codes, scales and, if asymmetric, zero points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError


@dataclass(frozen=True)
class Quantized:
    """A quantized ``(K, N)`` matrix.

    Attributes:
        codes: integer codes ``(K, N)``.
        scale: float32, ``(G, N)``; ``G`` is the number of groups along ``K`` (1 for per-channel).
        zero_point: integer, same shape as ``scale``, or None for symmetric formats.
        aux: further parameter arrays of formats that need them (codebooks, second-level scales ...).
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    aux: dict[str, np.ndarray] | None = None


class Format(ABC):
    """What stored codes of a weight matrix mean. Instances are hashable values; ``str(fmt)`` is the spelling."""

    @abstractmethod
    def encode(self, weight: np.ndarray) -> Quantized:
        """Round ``weight`` (float, ``(K, N)``) to nearest on the grid given by its own min/max statistics."""

    @abstractmethod
    def decode(self, quantized: Quantized) -> np.ndarray:
        """Return the float32 ``(K, N)`` matrix that the codes stand for."""

    @abstractmethod
    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per weight of a ``(K, N)`` matrix, scales and zero points included."""


_PARSERS: list[Callable[[str], Format | None]] = []


def register_format(parser: Callable[[str], Format | None]) -> Callable[[str], Format | None]:
    """Add a function that turns a spelling into a Format, or returns None if the spelling is not its own."""
    _PARSERS.append(parser)
    return parser


def parse_format(spelling: str) -> Format:
    """Return the format spelled ``spelling``, e.g. ``int8``, ``int4/g128``, ``int3/g64/asym``.

    Raises:
        FormatError: no registered format has this spelling.
    """
    for parser in _PARSERS:
        if (found := parser(spelling)) is not None:
            return found
    raise FormatError(f"unknown format {spelling!r}; `qcompile formats` lists the spellings")
