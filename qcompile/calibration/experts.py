"""Second moments of what each expert of a mixture multiplies with its weight.

    H_e = X_e^T X_e / T_e,     X_e: the T_e rows that the router sent to expert e

An expert that saw fewer rows than it has input channels has a moment without full rank. The rows of all experts make up for
what is missing:

    H_e <- (T_e H_e + (K - T_e) H) / K,     H = sum_e X_e^T X_e / sum_e T_e           where T_e < K
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.graph import constant
from qcompile.passes.sites import ExpertSite

LARGEST = 1 << 31
"""Bytes that the moments of all experts of a model may take; where they take more, experts share one."""


class ExpertMoments:
    """Hessians of one stack of experts, a batch at a time.

    Args:
        site: the product.

    Attributes:
        source, ids: names of its activation and of the indices.
        fixed: the indices where they are constant, else None.
        rows: how many each expert has seen, ``(E,)``.
    """

    cross = None
    """Moments with another model's rows are not kept."""

    def __init__(self, site: ExpertSite) -> None:
        self.source, self.ids, self.repeat = site.x.name or "", site.ids.name or "", site.repeat
        self.fixed = constant(site.ids)
        k = site.shape[0]
        self.rows = np.zeros(site.experts, np.int64)
        self.moment = np.zeros((site.experts, k, k), np.float32)
        self._waiting: dict[str, np.ndarray] = {}

    @staticmethod
    def size(site: ExpertSite) -> int:
        """Bytes it takes."""
        return 4 * site.experts * site.shape[0] ** 2

    def see_rows(self, batch: np.ndarray) -> None:
        """Activations ``(..., K)`` of a sample."""
        self._see("rows", np.asarray(batch, np.float32).reshape(-1, self.moment.shape[-1]))
        if self.fixed is not None:
            self.see_ids(self.fixed)

    def see_ids(self, batch: np.ndarray) -> None:
        """Which experts they go to."""
        self._see("ids", np.asarray(batch).reshape(-1) % len(self.rows))

    def _see(self, what: str, array: np.ndarray) -> None:
        self._waiting[what] = array
        if len(self._waiting) < 2:
            return
        rows, ids = self._waiting["rows"], self._waiting["ids"]
        self._waiting.clear()
        tokens = np.arange(len(ids)) // self.repeat
        for expert in np.unique(ids):
            mine = rows[tokens[ids == expert]]
            self.rows[expert] += len(mine)
            self.moment[expert] += mine.T @ mine

    @property
    def scarce(self) -> np.ndarray:
        """Experts that saw fewer rows than they have input channels."""
        return np.flatnonzero(self.rows < self.moment.shape[-1])

    @property
    def hessian(self) -> np.ndarray:
        """Float64 ``(E, K, K)``, see above."""
        k = self.moment.shape[-1]
        everybody = self.moment.sum(0, dtype=np.float64) / max(int(self.rows.sum()), 1)
        found = np.empty(self.moment.shape)
        for expert, seen in enumerate(self.rows):
            found[expert] = self.moment[expert]
            if seen < k:
                found[expert] += (k - seen) * everybody
            found[expert] /= max(seen, k)
        return found


def experts_key(site: ExpertSite) -> str:
    """What the moments of a stack are called among the statistics, which otherwise go by value names."""
    return f"{site.x.name} as {site.name} picks it by {site.ids.name}"
