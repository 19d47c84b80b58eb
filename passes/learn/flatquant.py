"""FlatQuant: an invertible Kronecker product before every linear operator, with scales and matrices of heads folded.

    x W = (x D T) (T^-1 D^-1 W),    T = L (x) R learned and applied at run time, D learned and folded

Matrices of values' heads fold into the projections on both sides. Blocks are trained one after another on the float
model's own inputs and outputs.

Source: Sun et al., "FlatQuant: Flatness Matters for LLM Quantization" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile.passes.asks.base import Context, register_ask
from qcompile.passes.learn.base import Learned

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@register_ask("flatquant")
@dataclass(frozen=True)
class FlatQuant(Learned):
    """Learns Kronecker products at run time and what folds with them, block by block, on calibration data.

    Attributes:
        heads: learn matrices of cells that admit any (values of heads).
        orthogonal: keep the products orthogonal.
    """

    blockwise: bool = True
    heads: bool = True
    orthogonal: bool = False

    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """One product per activation, one scale per channel, one matrix per head."""
        from qcompile.passes.learn.freedoms import Linear, admits_linear
        from qcompile.passes.learn.starts import add_kroneckers, add_scales, hadamards, rotating_spaces

        for space in rotating_spaces(context, self.name) if self.heads else ():
            if admits_linear(space):
                program.freedoms.append(Linear(context.spaces, space, hadamards(space, self.seed), program.like))
        add_scales(context, program)
        add_kroneckers(context, program, rng, scaled=not self.orthogonal)
