"""Rotations that do not fold: an explicit operator before a linear layer, its inverse in the weight.

    x W = (x H) (H^T W)

For activations behind a gate or a nonlinearity no analysis can find room for a rotation, so it is paid for at run time:
``qcompile::BlockRotate``, n log n additions per row for a Hadamard matrix. Only inputs that no folded rotation reaches
are rotated.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (the rotation before the
down-projection).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.asks.base import Context, Entry, Rewrite
from qcompile.passes.rotate_inputs import block_order, rotate
from qcompile.passes.sites import linear_sites
from qcompile.passes.spaces import Space


@dataclass(frozen=True)
class RotateOnline(Rewrite):
    """A Hadamard rotation at run time of every quantized input that cannot be rotated by folding.

    Attributes:
        block: largest order of the rotated blocks; 0 for whole rows where a Hadamard matrix of that order is known.
        everywhere: rotate also inputs that a folded rotation reaches.
    """

    block: int = 0
    everywhere: bool = False

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Insert the operators; the report says what was refused."""
        chosen = set()
        for space in context.spaces:
            if context.readers(space) and (self.everywhere or not can_rotate(space, context)):
                chosen |= {r.node for r in context.readers(space)}
        done = 0
        for site in linear_sites(model):
            if site.node.name in chosen:
                width = site.shape[0]
                count, refused = rotate(model, [site], block_order(width, self.block or width))
                done += count
                for _, reason in refused:
                    context.report.entries.append(Entry(self.name, -1, False, f"{site.name}: {reason}"))
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} activations rotated at run time"))
        return done > 0


def can_rotate(space: Space, context: Context) -> bool:
    """Whether a rotation of this space folds: it mixes by itself or follows one that does."""
    return (space if space.leader is None else context.spaces[space.leader]).mixes
