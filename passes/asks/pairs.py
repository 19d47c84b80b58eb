"""Scales before rotary positions: one per rotated pair of channels, shared between queries and keys.

    q' = q s,  k' = k / s,   s_p = (max|k_p| / mean over pairs)^a       with one s for both channels of a pair

Outlier channels of keys, which hurt a quantized cache, move into the queries, which are not stored. The analysis says
which channels form pairs and what else (a norm's gamma) takes the scale.

Source: "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks.base import Ask, Context, Refusal, register_ask
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.request import mix, scale


@register_ask("pair-scale")
@dataclass(frozen=True)
class PairScale(Ask):
    """Equalizes the ranges of rotated keys, pair by pair, at the cost of the queries (FireQ).

    Attributes:
        share: how much of the range moves from keys to queries.
    """

    share: float = 0.5

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale every pair of a rotated space."""
        pair = rotated_pairs(space, context)
        if pair is None or (space.mixes and space.limit & Limit.RIGID) or not (space.mixes or space.scalable):
            return None
        side = key_side(space, context)
        ranges = np.zeros(int(pair.max()) + 1)
        np.maximum.at(ranges, pair, key_range(space, context, side))
        if not (ranges > 0).all():
            raise Refusal("some pairs of keys are never used")
        s = (ranges / np.exp(np.log(ranges).mean())) ** -self.share
        if space.mixes:
            for cell in range(int(space.cells.max()) + 1):
                inside = space.cells == cell
                mix(context.spaces, element, space, cell, np.eye(int(inside.sum())) * s[pair[inside][0]] ** side)
        else:
            scale(context.spaces, element, space, s[pair] ** side)
        return f"pair scales {1 / s.max():.3g} .. {1 / s.min():.3g}"


def rotated_pairs(space: Space, context: Context) -> np.ndarray | None:
    """Number of the rotated pair of each channel ``(size,)``; None if not all channels are rotated."""
    solution = context.spaces.solution
    pair = np.full(space.size, -1)
    for use in solution.constraints.uses:
        if use.limit & Limit.PLANE and use.mix is not None:
            place = context.spaces.index_in_space(use.coordinates, space)
            if (place >= 0).any():
                pair[place[place >= 0]] = use.mix[place >= 0]
    if (pair < 0).any():
        return None
    return np.unique(pair, return_inverse=True)[1]


def key_side(space: Space, context: Context) -> int:
    """1 if keys act as the space does, -1 if contragrediently (then queries act as the space does).

    Raises:
        Refusal: no attention operator reads the space.
    """
    spaces = context.spaces
    for node in context.model.graph:
        key = node.inputs[1] if node.op_type == "Attention" else None
        for m in spaces.layouts.get(key.name or "", ()) if key is not None else ():
            inside = spaces.index_in_space(m.flat, space) >= 0
            if inside.any():
                return int(spaces.solution.parity[m.flat][inside][0])
    raise Refusal("no attention operator reads these pairs as keys")


def key_range(space: Space, context: Context, side: int) -> np.ndarray:
    """Largest magnitude per channel of the values on the keys' side, as their projection writes them.

    Raises:
        Refusal: no data, or no such value with its channels on the last axis.
    """
    if context.data.measure is None:
        raise Refusal("no calibration data")
    spaces = context.spaces
    # Values that tell heads apart say more than those that show all heads along another axis.
    for apart in (True, False):
        result = np.zeros(space.size)
        for name, axes in space.values:
            m = next(m for m in spaces.layouts[name] if m.axes == axes)
            place = spaces.index_in_space(m.flat, space)
            at = (spaces.solution.parity[m.flat] == side) & (place >= 0)
            if axes[-1] != m.rank - 1 or (len(axes) == 1) != apart or not at.any():
                continue
            found = context.data.measure(context.model, [name], False).get(name)
            if found is not None and len(found.absmax) == m.table.shape[-1]:
                ranges = np.broadcast_to(np.asarray(found.absmax, np.float64), m.table.shape).reshape(-1)
                np.maximum.at(result, place[at], ranges[at])
        if result.any():
            return result
    raise Refusal("keys are not found as channels of a last axis")
