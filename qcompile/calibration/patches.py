"""Second moments of the patches that a convolution multiplies with its weight.

Unfolded, the input ``(batch, C, *spatial)`` of a convolution has one row per output position: the window there, its kernel
positions outermost and the channels inside, as in `ConvSite.matrix`. Each of ``G`` groups sees ``C / G`` of the channels, so
there is one Hessian per group:

    H_g = P_g^T P_g / positions,    P_g  (positions, K),    K = kernel positions x C / G
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompile.passes.graph import attribute
from qcompile.passes.sites import ConvSite


class PatchMoments:
    """Hessians of one convolution, a batch at a time.

    Args:
        site: the convolution; its strides, pads, dilations and groups are read here.

    Attributes:
        source: name of its activation input.
        hessian: ``P_g^T P_g / positions`` of every group, float64 ``(G, K, K)``.
    """

    cross = None
    """Moments with another model's patches are not kept."""

    def __init__(self, site: ConvSite) -> None:
        self.source, self.kernel, self.groups = site.x.name or "", site.kernel, site.groups
        rank = len(self.kernel)

        def numbers(name: str, default: int, count: int) -> list[int]:
            values: Any = attribute(site.node, name, None)
            return [default] * count if values is None else [int(v) for v in values]

        self.strides = numbers("strides", 1, rank)
        self.dilations = numbers("dilations", 1, rank)
        self.pads = numbers("pads", 0, 2 * rank)
        self.auto_pad = str(attribute(site.node, "auto_pad", "NOTSET"))
        k = site.shape[0]
        self.positions = 0
        self.moment = np.zeros((self.groups, k, k))

    def update(self, batch: np.ndarray) -> None:
        """Add a batch ``(batch, C, *spatial)``."""
        rows = self.unfold(np.asarray(batch, np.float32))
        self.positions += rows.shape[1]
        self.moment += np.matmul(rows.transpose(0, 2, 1), rows)

    @property
    def hessian(self) -> np.ndarray:
        """``P_g^T P_g / positions`` of every group, float64 ``(G, K, K)``."""
        return self.moment / max(self.positions, 1)

    def unfold(self, x: np.ndarray) -> np.ndarray:
        """Patches ``(G, positions, K)`` of ``x`` ``(batch, C, *spatial)``."""
        rank, (batch, channels) = len(self.kernel), x.shape[:2]
        extents = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations)]
        padded = np.pad(x, [(0, 0), (0, 0), *self._padding(x.shape[2:], extents)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, extents, tuple(range(2, 2 + rank)))
        steps = [slice(None, None, s) for s in (*self.strides, *self.dilations)]
        windows = windows[(slice(None), slice(None), *steps)]
        windows = windows.reshape(batch, self.groups, channels // self.groups, *windows.shape[2:])
        places = [3 + i for i in range(rank)]
        order = [1, 0, *places, *(p + rank for p in places), 2]
        return windows.transpose(order).reshape(self.groups, -1, self.moment.shape[1])

    def _padding(self, spatial: Sequence[int], extents: Sequence[int]) -> list[tuple[int, int]]:
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            totals = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(spatial, self.strides, extents)]
            halves = [(t // 2, t - t // 2) for t in totals]
            return halves if self.auto_pad == "SAME_UPPER" else [(b, a) for a, b in halves]
        if self.auto_pad == "VALID":
            return [(0, 0)] * len(spatial)
        return list(zip(self.pads[: len(spatial)], self.pads[len(spatial) :]))


def patches_key(site: ConvSite) -> str:
    """What the moments of a convolution are called among the statistics, which otherwise go by value names."""
    return f"{site.x.name} as {site.name} unfolds it"
