"""Streaming statistics of activations, one batch at a time.

For a value with rows ``x`` (all leading axes flattened, ``K`` channels) the sums needed later are

    absmax_k = max |x_k|     mean_k = sum x_k / T     H = sum x x^T / T     histogram of log2 |x|

The second moment H is what second-order solvers minimise against (Frantar et al., GPTQ, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_BINS = 512
_GATHER = 1024  # rows
_LOW, _HIGH = -24.0, 24.0  # log2 range of the magnitude histogram


@dataclass
class ChannelStatistics:
    """Statistics of one activation.

    Attributes:
        channels: length ``K`` of the last axis.
        with_hessian: whether to accumulate the ``(K, K)`` second moment.
        with_cross: whether to accumulate the ``(K, K)`` moment with the float model's activation.
        tokens: rows seen.
        absmax, minimum, maximum, total, squares: float ``(K,)``.
        moment: float64 ``(K, K)`` sum of outer products, or None.
        cross_moment: float64 ``(K, K)`` sum of outer products with the float model's rows, or None.
        histogram: counts of ``log2 |x|`` over all channels.
        token_absmax: sum over rows of the row's absolute maximum, for the mean dynamic scale.
    """

    channels: int
    with_hessian: bool = False
    with_cross: bool = False
    tokens: int = 0
    absmax: np.ndarray = field(init=False)
    minimum: np.ndarray = field(init=False)
    maximum: np.ndarray = field(init=False)
    total: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)
    moment: np.ndarray | None = field(init=False)
    cross_moment: np.ndarray | None = field(init=False)
    histogram: np.ndarray = field(init=False)
    token_absmax: float = 0.0

    def __post_init__(self) -> None:
        k = self.channels
        self.absmax = np.zeros(k, np.float32)
        self.minimum = np.full(k, np.inf, np.float32)
        self.maximum = np.full(k, -np.inf, np.float32)
        self.total = np.zeros(k)
        self.squares = np.zeros(k)
        self.moment = np.zeros((k, k)) if self.with_hessian else None
        self.cross_moment = np.zeros((k, k)) if self.with_cross else None
        self.histogram = np.zeros(_BINS, np.int64)
        self._waiting: list[np.ndarray] = []
        self._exact: list[np.ndarray] = []

    def update(self, batch: np.ndarray, exact: np.ndarray | None = None) -> None:
        """Add a batch ``(..., K)``, with ``exact`` the same rows of the float model if cross moments are wanted.

        Small batches are gathered: a product of few rows costs as much as one of many.
        """
        self._waiting.append(np.array(batch, np.float32).reshape(-1, self.channels))
        if exact is not None:
            self._exact.append(np.array(exact, np.float32).reshape(-1, self.channels))
        if sum(map(len, self._waiting)) >= _GATHER:
            self.flush()

    def flush(self) -> None:
        """Take what was gathered into the sums; call it after the last `update`."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting.clear()
        if not len(rows):
            return
        magnitude = np.abs(rows)
        self.tokens += len(rows)
        self.absmax = np.maximum(self.absmax, magnitude.max(0))
        self.minimum = np.minimum(self.minimum, rows.min(0))
        self.maximum = np.maximum(self.maximum, rows.max(0))
        self.total += rows.sum(0, dtype=np.float64)
        self.squares += np.square(rows, dtype=np.float64).sum(0)
        self.token_absmax += float(magnitude.max(1).sum(dtype=np.float64))
        with np.errstate(divide="ignore"):
            position = (np.log2(magnitude) - _LOW) * (_BINS / (_HIGH - _LOW))
        self.histogram += np.bincount(np.clip(position, 0, _BINS - 1).astype(np.int64).ravel(), minlength=_BINS)
        if self.moment is not None:
            self.moment += rows.T @ rows
        if self.cross_moment is not None and self._exact:
            self.cross_moment += rows.T @ np.concatenate(self._exact)
        self._exact.clear()

    @property
    def mean(self) -> np.ndarray:
        """Mean per channel ``(K,)``."""
        return self.total / max(self.tokens, 1)

    @property
    def hessian(self) -> np.ndarray | None:
        """``X^T X / tokens``, float64 ``(K, K)``, or None if it was not asked for."""
        return None if self.moment is None else self.moment / max(self.tokens, 1)

    @property
    def cross(self) -> np.ndarray | None:
        """``X'^T X / tokens`` with ``X`` of the float model, float64 ``(K, K)``, or None if it was not asked for."""
        return None if self.cross_moment is None else self.cross_moment / max(self.tokens, 1)

    def percentile(self, q: float) -> float:
        """Magnitude below which ``q`` percent of all entries lie, within 7 % (one histogram bin), capped at the maximum."""
        count = np.cumsum(self.histogram)
        if not count[-1]:
            return 0.0
        index = int(np.searchsorted(count, count[-1] * q / 100.0))
        upper = 2.0 ** (_LOW + (min(index, _BINS - 1) + 1) * (_HIGH - _LOW) / _BINS)
        return float(min(upper, self.absmax.max()))
