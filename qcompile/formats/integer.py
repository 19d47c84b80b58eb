"""Integer formats: ``intN`` per channel or in groups along K, symmetric or asymmetric.

    symmetric    w ~ s * q,        q in [-2^(b-1), 2^(b-1) - 1]
    asymmetric   w ~ s * (q - z),  q, z in [0, 2^b - 1]

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.base import Format, Quantized, register_format


@dataclass(frozen=True)
class IntFormat(Format):
    """``int<bits>[/g<group>][/asym]``; ``group`` is 0 for one scale per output channel."""

    bits: int
    group: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"int{self.bits}: integer weight formats have 1 to 8 bits")

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"/g{self.group}" if self.group else "") + ("" if self.symmetric else "/asym")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        """Number of groups along a reduction axis of length ``k``; the last one may be shorter."""
        return -(-k // self.group) if self.group else 1

    def encode(self, weight: np.ndarray) -> Quantized:
        k, n = weight.shape
        size = self.group or k
        groups = self.groups(k)
        padded = np.zeros((groups * size, n), np.float64)
        padded[:k] = weight
        blocks = padded.reshape(groups, size, n)
        if self.symmetric:
            # The grid has one more negative than positive step; clipping the positive end by half a step is
            # worse than never using the extra code, except for 1 and 2 bits where codes are scarce.
            scale = np.abs(blocks).max(1) / max(self.qmax, 1)
            zero = None
        else:
            low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
            scale = (high - low) / self.qmax
            zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, self.qmax)
        scale = np.where(scale == 0, 1, scale).astype(np.float32)
        return Quantized(self.codes_for(weight, scale, zero), scale, None if zero is None else zero.astype(np.uint8))

    def codes_for(self, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
        """Round ``weight`` to the grid with given ``scale`` and ``zero`` (both ``(G, N)``); int8 or uint8 codes."""
        k = weight.shape[0]
        step = self.expand(scale, k).astype(np.float64)
        q = np.rint(weight / step)
        if zero is not None:
            q = q + self.expand(zero, k)
        return np.clip(q, self.qmin, self.qmax).astype(np.int8 if self.symmetric else np.uint8)

    def expand(self, per_group: np.ndarray, k: int) -> np.ndarray:
        """Repeat ``(G, N)`` parameters to ``(K, N)``."""
        return np.repeat(per_group, self.group or k, axis=0)[:k]

    def decode(self, quantized: Quantized) -> np.ndarray:
        k = quantized.codes.shape[0]
        q = quantized.codes.astype(np.float32)
        if quantized.zero_point is not None:
            q = q - self.expand(quantized.zero_point, k).astype(np.float32)
        return (q * self.expand(quantized.scale.astype(np.float32), k)).astype(np.float32)

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        k, n = shape
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + self.groups(k) * n * per_group / (k * n)


@dataclass(frozen=True)
class ActivationFormat:
    """How the input of a linear operator is quantized.

    Attributes:
        bits: 0 for float activations.
        granularity: ``token`` (one dynamic scale per row) or ``tensor`` (one static scale, zero point allowed).
    """

    bits: int = 0
    granularity: str = "token"

    def __str__(self) -> str:
        return f"int{self.bits}/{self.granularity}" if self.bits else "none"


_INT = re.compile(r"^int([1-8])(?:/g(\d+)|/channel)?(/asym|/sym)?$")
_ACT = re.compile(r"^int([2-8])(?:/(token|tensor))?$")


@register_format
def _parse_int(spelling: str) -> Format | None:
    if not (match := _INT.match(spelling)):
        return None
    bits, group, sym = match.groups()
    if group is not None and int(group) < 1:
        raise FormatError(f"{spelling}: a group holds at least one weight")
    return IntFormat(int(bits), int(group or 0), sym != "/asym")


def parse_activation(spelling: str) -> ActivationFormat:
    """Return the activation format spelled ``none``, ``int8/token`` (the default granularity) or ``int8/tensor``."""
    if spelling in ("none", "float", "float32"):
        return ActivationFormat()
    if match := _ACT.match(spelling):
        return ActivationFormat(int(match[1]), match[2] or "token")
    raise FormatError(f"unknown activation format {spelling!r}; known: none, int2..int8 with /token or /tensor")
