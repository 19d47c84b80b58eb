"""OmniQuant's learnable equivalent transformation: scales and shifts of channels.

    x' = D x + t,   y = x' W' + b',   W' = D^-1 W,   b' = b - t W'

Scales fold wherever the analysis admits them. A shift is learned where constants alone can write it and take it back: a
LayerNorm's beta and the biases of its readers, a projection's bias and what follows.

Source: Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile.passes.asks.base import Context, register_ask
from qcompile.passes.learn.base import Learned

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@register_ask("omniquant")
@dataclass(frozen=True)
class OmniQuant(Learned):
    """Learns scales and shifts of channels, block by block, on calibration data.

    Attributes:
        alpha: of the SmoothQuant scales at the start.
        shift: learn shifts too.
    """

    blockwise: bool = True
    clip_weights: bool = True
    alpha: float = 0.5
    shift: bool = True

    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """Scales of all spaces, shifts of all activations, that admit them."""
        from qcompile.passes.learn.starts import add_scales, add_shifts

        add_scales(context, program, self.alpha)
        if self.shift:
            add_shifts(context, program)
