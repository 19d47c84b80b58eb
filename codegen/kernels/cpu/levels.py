"""Codes that index a table of levels: how the levels become integers that kernels look up and multiply.

    w[k, n] = s[g, n] table[code],    table[i] ~ factor * level[i]

Levels of small floats and of powers of two are integers exactly (e2m1: halves, up to 12 of them; e3m2: sixteenths, up to
448). Levels of normal floats and of learned codebooks are rounded to 16 bits of the largest, or to what an int32 sum over a
group has room for; the rounding, half of ``factor``, is far below that of the codes. What model.onnx reads are the integers
too. Floats whose range 16 bits do not cover (e4m3, e5m2) are the business of `minifloats`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from qcompile.formats import Codebook, Format, Quantized
from qcompile.formats.levels import LevelFormat

ENTRIES = 16
"""Entries of a table in a register."""


@dataclass(frozen=True)
class Levels:
    """Integers ``level`` ``(entries,)`` that, times ``factor``, are the values of the codes; unused entries are 0."""

    level: np.ndarray
    factor: float


def is_table(fmt: Format) -> bool:
    """Whether ``fmt`` is a table of levels."""
    return isinstance(fmt, LevelFormat | Codebook)


def entries(fmt: Format) -> int:
    """Entries of the table of ``fmt`` as kernels keep it: whole registers."""
    return max(ENTRIES, 1 << fmt.bits)


def zero_code(fmt: Format) -> int | None:
    """The code whose level is 0 in every matrix; None if there need not be one."""
    zeros = np.flatnonzero(fmt.table == 0) if isinstance(fmt, LevelFormat) else np.empty(0, np.int64)
    return int(zeros[0]) if len(zeros) else None


def exact_levels(fmt: Format, largest: int = 127) -> Levels | None:
    """The levels of a format as integers of magnitude up to ``largest``, or None if they are none."""
    if not isinstance(fmt, LevelFormat):
        return None
    table = _padded(fmt.table)
    for shift in range(16):
        scaled = table * (1 << shift)
        if np.abs(scaled).max() > largest:
            return None
        if (scaled == np.rint(scaled)).all():
            return Levels(scaled.astype(np.int64), 1 / (1 << shift))
    return None


def rounded_levels(fmt: Format, weight: Quantized, largest: int) -> Levels:
    """The levels of a matrix as integers of magnitude up to ``largest``."""
    table = real_levels(fmt, weight)
    factor = float(np.abs(table).max()) / largest or 1.0
    return Levels(np.rint(table / factor).astype(np.int64), factor)


def real_levels(fmt: Format, weight: Quantized) -> np.ndarray:
    """The levels of a matrix, float64 ``(entries,)``."""
    return _padded(fmt.table if isinstance(fmt, LevelFormat) else weight.aux["codebook"])


@functools.cache
def adds_halves(fmt: Format) -> bool:
    """Whether the level of an 8-bit code is that of its low four bits plus that of its high four (sums of two powers)."""
    if not isinstance(fmt, LevelFormat) or fmt.bits != 8:
        return False
    half = fmt.table[:ENTRIES]
    return bool((fmt.table.reshape(ENTRIES, ENTRIES) == half[:, None] + half).all())


def _padded(table: np.ndarray) -> np.ndarray:
    values = np.zeros(max(ENTRIES, len(table)))
    values[: len(table)] = np.nan_to_num(table.astype(np.float64))
    return values
