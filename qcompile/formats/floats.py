"""Small floating-point formats and the normal-float table, with a float scale per channel or group.

    eXmY   one sign bit, X exponent bits, Y mantissa bits, bias 2^(X-1) - 1, subnormals
             e > 0:  (-1)^s 2^(e - bias) (1 + m / 2^Y)        e = 0:  (-1)^s 2^(1 - bias) m / 2^Y
    nfB    2^B quantiles of a normal distribution, with an exact zero and both ends at 1

All eXmY codes are finite, as in the Open Compute "Microscaling Formats (MX) Specification" (2023), except that e4m3 keeps
one code per sign for NaN (largest value 448) and e5m2 keeps its top exponent for infinity and NaN (largest value 57344),
as in Micikevicius et al., "FP8 Formats for Deep Learning" (2022). Codes are bit patterns, sign first.
nfB: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.base import Format, FormatInfo, parse_group, register_format
from qcompile.formats.levels import LevelFormat


def minifloat_table(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Return the value of every bit pattern, float32, NaN where it is not a finite number."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    value = sign * np.where(exponent > 0, 1 + fraction, fraction) * np.exp2(np.maximum(exponent, 1.0) - bias)
    if (exponent_bits, mantissa_bits) == (4, 3):
        value[codes & 0x7F == 0x7F] = np.nan
    if (exponent_bits, mantissa_bits) == (5, 2):
        value[codes & 0x7C == 0x7C] = np.nan
    return value.astype(np.float32)


@dataclass(frozen=True)
class Minifloat(LevelFormat):
    """``e<X>m<Y>[/g<group>]``; ``group`` is 0 for one scale per output channel."""

    exponent_bits: int
    mantissa_bits: int
    group: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.exponent_bits <= 5 and self.mantissa_bits >= 0 and 2 <= self.bits <= 8):
            raise FormatError(f"{self}: minifloats have 1 to 5 exponent bits and at most 8 bits with the sign")

    def __str__(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}" + (f"/g{self.group}" if self.group else "")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def table(self) -> np.ndarray:
        return minifloat_table(self.exponent_bits, self.mantissa_bits)


@dataclass(frozen=True)
class NormalFloat(LevelFormat):
    """``nf<bits>[/g<group>]``; codes ascend with the levels."""

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"nf{self.bits}" + (f"/g{self.group}" if self.group else "")

    @cached_property
    def table(self) -> np.ndarray:
        half = 1 << (self.bits - 1)
        # Half a quantile is left out at either end, where the normal distribution has no bound.
        outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
        positive = [NormalDist().inv_cdf(p) for p in np.linspace(0.5, outermost, half + 1)]
        negative = [-NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, half)]
        return (np.array(negative + positive[1:]) / positive[-1]).astype(np.float32)


_FLOAT = re.compile(r"^e(\d)m(\d)(?:/g(\d+)|/channel)?$")
_ALIAS = {"fp8": "e4m3", "fp6": "e3m2", "fp4": "e2m1"}
_NORMAL = re.compile(r"^nf([2-8])(?:/g(\d+)|/channel)?$")


@register_format(
    info=FormatInfo("e<X>m<Y>[/g<N>]", "minifloats; fp8 is e4m3, fp6 is e3m2, fp4 is e2m1", Minifloat(2, 1, 32))
)
def _parse_minifloat(spelling: str) -> Format | None:
    head, slash, tail = spelling.partition("/")
    if not (match := _FLOAT.match(_ALIAS.get(head, head) + slash + tail)):
        return None
    return Minifloat(int(match[1]), int(match[2]), parse_group(spelling, match[3]))


@register_format(info=FormatInfo("nf<2-8>[/g<N>]", "quantiles of the normal distribution (QLoRA)", NormalFloat(4, 64)))
def _parse_normal(spelling: str) -> Format | None:
    if not (match := _NORMAL.match(spelling)):
        return None
    return NormalFloat(int(match[1]), parse_group(spelling, match[2]))
