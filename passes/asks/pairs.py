"""Scales before rotary positions: one per rotated pair of channels, shared between queries and keys.

    q' = q s,  k' = k / s,   s_p = (max|k_p| / max|q_p|)^(a)       with one s for both channels of a pair

Outlier channels of keys, which hurt a quantized cache, move into the queries, which are not stored. The analysis says
which channels form pairs and what else (a norm's gamma) takes the scale.

Source: "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks.base import Ask, Context, Refusal
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.request import mix


@dataclass(frozen=True)
class PairScale(Ask):
    """Equalize the ranges of rotated keys.

    Attributes:
        share: how much of the range moves from keys to queries.
    """

    share: float = 0.5

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale every pair of a rotated space."""
        if not space.limit & Limit.PLANE or not space.mixes or space.limit & Limit.RIGID:
            return None
        ranges = key_range(space, context)
        pairs = np.zeros(int(space.cells.max()) + 1)
        np.maximum.at(pairs, space.cells, ranges)
        if not (pairs > 0).all():
            raise Refusal("some pairs of keys are never used")
        s = (pairs / np.exp(np.log(pairs).mean())) ** self.share
        for pair, factor in enumerate(s):
            # The space is oriented like the queries: keys act contragrediently.
            mix(context.spaces, element, space, pair, np.eye(int((space.cells == pair).sum())) * factor)
        return f"pair scales {s.min():.3g} .. {s.max():.3g}"


def key_range(space: Space, context: Context) -> np.ndarray:
    """Largest magnitude per channel of the values that act contragrediently (the keys), as their projection writes them.

    Raises:
        Refusal: no data, or no such value with its channels on the last axis.
    """
    if context.data.measure is None:
        raise Refusal("no calibration data")
    spaces = context.spaces
    result = np.zeros(space.size)
    for name, axes in space.values:
        m = next(m for m in spaces.layouts[name] if m.axes == axes)
        place = spaces.index_in_space(m.flat, space)
        negative = spaces.solution.parity[m.flat] < 0
        if axes != (m.rank - 1,) or not (negative & (place >= 0)).any():
            continue
        found = context.data.measure(context.model, [name], False).get(name)
        if found is not None and len(found.absmax) == m.size:
            at = negative & (place >= 0)
            np.maximum.at(result, place[at], np.asarray(found.absmax, np.float64)[at])
    if not result.any():
        raise Refusal("keys are not found as channels of a last axis")
    return result
