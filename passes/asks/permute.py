"""Permutations folded into the weights: channels of a like kind side by side.

    sort         by range, so that groups of neighbouring channels share a scale well (Quamba2's sort and cluster)
    outliers     the channels of largest range into the last block, which stays at higher precision (COMET, ABQ-LLM)
    importance   by the diagonal of the Hessian, GPTQ's act-order made static
    zigzag       ranges dealt over the blocks back and forth, so that all blocks are equally hard (DuQuant)

The order is the only choice; that it folds, the analysis guarantees: all spaces of a family move together.

Sources: Chiang et al., "Quamba2", 2025; Liu et al., "COMET", 2024; Frantar et al., "GPTQ", 2022; Lin et al.,
"DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized LLMs", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import RecipeError
from qcompile.passes.asks.base import Ask, Context, register_ask
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.request import permute


@register_ask("permute")
@dataclass(frozen=True)
class Permute(Ask):
    """Reorders all channels that may trade places, so that those of a like kind lie side by side.

    Attributes:
        order: "sort", "outliers", "importance" or "zigzag".
        block: channels per block ("outliers", "zigzag").
    """

    order: str = "sort"
    block: int = 128

    def __post_init__(self) -> None:
        if self.order not in ("sort", "outliers", "importance", "zigzag"):
            raise RecipeError(f"permute: unknown order {self.order!r}; choose sort, outliers, importance or zigzag")

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Permute the family of a space that a quantized operator reads, once, by what all its readers see."""
        if not context.readers(space) or (element.source[space.classes] != space.classes).any():
            return None
        solution = context.spaces.solution
        family = solution.families[space.family]
        key = np.zeros(len(family.classes))
        for other in context.spaces:
            if other.family == space.family and context.readers(other):
                values = self._key(other, context)
                np.maximum.at(key, solution.row_of[other.classes], values / (values.mean() or 1.0))
        source = np.arange(len(key))
        groups = np.unique(family.alike, return_inverse=True)[1]
        for group in np.flatnonzero(np.bincount(groups) > 1):
            rows = np.flatnonzero(groups == group)
            source[rows] = rows[channel_order(key[rows], self.order, self.block)]
        moved = int((source != np.arange(len(source))).sum())
        if not moved:
            return None
        permute(context.spaces, element, space, source)
        return f"{moved} of {len(source)} channels moved, in order of {self.order}"

    def _key(self, space: Space, context: Context) -> np.ndarray:
        if self.order != "importance":
            return context.activation_range(space)
        statistics = context.statistics(moments=True)
        result = np.zeros(space.size)
        for reader in context.readers(space):
            found = statistics.get(reader.activation)
            if found is not None and found.hessian is not None:
                mine = reader.channels >= 0
                np.add.at(result, reader.channels[mine], np.diagonal(found.hessian)[mine])
        return result


def channel_order(key: np.ndarray, order: str, block: int) -> np.ndarray:
    """Which channel comes to each place."""
    falling = np.argsort(-key, kind="stable")
    if order in ("sort", "importance"):
        return falling
    if order == "outliers":
        outliers = np.sort(falling[:block])
        rest = np.sort(falling[block:])
        return np.concatenate([rest, outliers])
    blocks = -(-len(key) // block)
    lanes: list[list[int]] = [[] for _ in range(blocks)]
    turn, step = 0, 1
    for channel in falling.tolist():
        # Deal one channel to every block, turning round at the ends; a full block is passed over.
        while len(lanes[turn]) >= block:
            turn, step = _next(turn, step, blocks)
        lanes[turn].append(channel)
        turn, step = _next(turn, step, blocks)
    return np.array([c for lane in lanes for c in lane])


def _next(turn: int, step: int, blocks: int) -> tuple[int, int]:
    if not 0 <= turn + step < blocks:
        return turn, -step
    return turn + step, step
