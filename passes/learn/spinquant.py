"""SpinQuant: rotations learned on the Stiefel manifold.

    R1 of the residual stream, R2 of every head's values   folded into the weights, learned by Cayley descent
    R4 of what no rotation can be folded into              a Hadamard matrix at run time

Spaces are found by analysis: whatever admits orthogonal matrices and is read by a quantized operator. The loss is the
divergence from the float model's own predictions; the paper minimises the cross entropy of the next token.

Source: Liu et al., "SpinQuant: LLM Quantization with Learned Rotations" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile.passes.asks.base import Context, register_ask
from qcompile.passes.learn.base import Learned

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@register_ask("spinquant")
@dataclass(frozen=True)
class SpinQuant(Learned):
    """Learns rotations that fold into the weights, on calibration data.

    Attributes:
        online: rotate what no rotation folds into by a Hadamard matrix at run time.
    """

    online: bool = True

    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """Rotations of all spaces that admit them."""
        from qcompile.passes.learn.starts import add_hadamards, add_rotations

        add_rotations(context, program, self.seed, self.name)
        if self.online:
            add_hadamards(context, program, self.name)
