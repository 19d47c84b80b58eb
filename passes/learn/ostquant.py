"""OSTQuant: rotations and per-channel scales learned together.

    x' = D R x,   W' = W R^T D^-1

The rotation spreads outliers, the scale behind it evens out what is left: the distribution of the rotated channels is
fitted to the quantizer's range. In front of a norm's readers D takes the place of the norm's gamma; at values and
up-projections it folds into weights. The loss looks at the most likely classes only (KL-Top).

Source: Hu et al., "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for
Better Distribution Fitting" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile.passes.asks.base import Context, register_ask
from qcompile.passes.learn.base import Learned

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@register_ask("ostquant")
@dataclass(frozen=True)
class OSTQuant(Learned):
    """Learns rotations and scales that fold into the weights, together, on calibration data.

    Attributes:
        online: rotate what no rotation folds into by a Hadamard matrix at run time.
    """

    loss: str = "kl-top"
    online: bool = True

    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """Rotations and scales of all spaces that admit them."""
        from qcompile.passes.learn.starts import add_hadamards, add_rotations, add_scales

        add_rotations(context, program, self.seed, self.name)
        add_scales(context, program)
        if self.online:
            add_hadamards(context, program, self.name)
