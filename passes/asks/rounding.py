"""What rounding costs at a space: the error of its readers' outputs on sample rows, for asks that search.

    e(s) = sum over readers |Q(x s) Q(W / s) - x W|^2 / |x W|^2

with x quantized as the reader's activation format says, W as its weight format says, both to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from qcompile.formats import ActivationFormat
from qcompile.passes.asks.base import Context, Precision, Refusal
from qcompile.passes.spaces import Space

ROWS, COLUMNS = 256, 256
"""Sample rows, and output channels of each reader, that are looked at."""


@dataclass(frozen=True)
class _Sample:
    """One reader: ``x (T, K)``, ``weight (K, N)``, index in the space of each of the K channels, formats."""

    x: np.ndarray
    weight: np.ndarray
    channels: np.ndarray
    precision: Precision


class RoundingError:
    """Measures e(s) at one space.

    Raises:
        Refusal: there are no sample rows, or nothing but convolutions reads the space.
    """

    def __init__(self, space: Space, context: Context) -> None:
        rows = context.rows(ROWS)
        self.space = space
        self.samples: list[_Sample] = []
        for reader in context.readers(space):
            weight = context.model.graph.initializers[reader.weight]
            x = rows.get(reader.activation)
            if x is None or weight.shape is None or len(weight.shape) != 2:
                continue
            matrix = context.weight_rows(reader)
            # Output channels are rounded independently, so some of them tell as much as all.
            chosen = np.linspace(0, matrix.shape[1] - 1, min(COLUMNS, matrix.shape[1])).astype(int)
            self.samples.append(_Sample(spread(x), matrix[:, chosen], reader.channels, context.precision(reader)))
        if not self.samples:
            raise Refusal("no matrix product with sample rows reads it")

    @property
    def magnitude(self) -> np.ndarray:
        """Mean magnitude ``(size,)`` of each channel of the space over the sample rows."""
        total, count = np.zeros(self.space.size), np.zeros(self.space.size)
        for sample in self.samples:
            mine = sample.channels >= 0
            np.add.at(total, sample.channels[mine], np.abs(sample.x[:, mine]).mean(0))
            np.add.at(count, sample.channels[mine], 1)
        return total / np.maximum(count, 1)

    def __call__(self, factor: np.ndarray) -> float:
        """e for ``x' = x factor``."""
        total = 0.0
        for sample in self.samples:
            f = np.where(sample.channels >= 0, factor[sample.channels], 1.0)
            exact = sample.x @ sample.weight
            x, w = sample.x * f, sample.weight / f[:, None]
            if sample.precision.activation is not None:
                x = round_rows(x, sample.precision.activation)
            if sample.precision.weight is not None:
                fmt = sample.precision.weight
                w = fmt.decode(fmt.encode(w.astype(np.float32)))
            total += float(((x @ w - exact) ** 2).sum()) / (float((exact**2).sum()) or 1.0)
        return total

    def best(self, candidates: Iterable[float], factor: Callable[[float], np.ndarray]) -> tuple[float, np.ndarray]:
        """The candidate with the least error, and its factors; the first of equals."""
        found = [(self(f), c, f) for c in candidates for f in [factor(c)]]
        _, candidate, chosen = min(found, key=lambda e: e[0])
        return candidate, chosen


def round_rows(x: np.ndarray, fmt: ActivationFormat) -> np.ndarray:
    """``x`` after quantization: one scale per row, or one for all."""
    top = 2 ** (fmt.bits - 1) - 1
    largest = np.abs(x).max(1, keepdims=True) if fmt.granularity == "token" else np.abs(x).max(keepdims=True)
    step = np.where(largest == 0, 1.0, largest / top)
    return np.rint(x / step) * step


def spread(x: np.ndarray, count: int = ROWS) -> np.ndarray:
    """Up to ``count`` rows, evenly spread, float64."""
    return x[np.linspace(0, len(x) - 1, min(count, len(x))).astype(int)].astype(np.float64)
