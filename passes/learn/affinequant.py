"""AffineQuant: near-diagonal invertible matrices, opened from the diagonal outwards while they are learned.

    x' = A x,   W' = W A^-1,   A strictly diagonally dominant, hence invertible

A folds only where the analysis finds room for any invertible matrix (values of heads, linear pairs); elsewhere it stays
diagonal. Begins with SmoothQuant's scales.

Source: Ma et al., "AffineQuant: Affine Transformation Quantization for Large Language Models" (2024), the gradual mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile.passes.asks.base import Context, register_ask
from qcompile.passes.learn.base import Learned

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@register_ask("affinequant")
@dataclass(frozen=True)
class AffineQuant(Learned):
    """Learns matrices near the diagonal where any fold, scales elsewhere, block by block, on calibration data.

    Attributes:
        alpha: of the SmoothQuant scales at the start.
        share: bound of the off-diagonal part of a row, relative to its diagonal.
    """

    blockwise: bool = True
    alpha: float = 0.5
    share: float = 0.9

    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """A dominant matrix per cell that admits GL, else scales."""
        from qcompile.passes.learn.freedoms import Dominant, Scales, admits_linear, equal_cells
        from qcompile.passes.learn.starts import scale_start
        from qcompile.passes.spaces.request import admits_diagonal

        for space in context.spaces:
            if not context.readers(space) or not admits_diagonal(space):
                continue
            start = scale_start(context, space, self.alpha)
            if admits_linear(space) and equal_cells(space):
                program.freedoms.append(Dominant(context.spaces, space, start, program.like, self.share))
            else:
                program.freedoms.append(Scales(context.spaces, space, start, program.like))
