"""SmoothQuant: move the range of activations into weights, channel by channel.

    x'_j = x_j / s_j,   W'_j = s_j W_j,   s_j = max|x_j|^a / max|W_j|^(1-a)

(Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.)
It applies to every space that admits positive scales and is read by a quantized linear operator: outputs of norms,
values to the output projection, up-projections to down-projections, or whatever else the model has of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks.base import Ask, Context, Refusal
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.request import admits_diagonal, scale


@dataclass(frozen=True)
class Smooth(Ask):
    """SmoothQuant scales.

    Attributes:
        alpha: share of the range that goes to the weights, 0 (none) to 1 (all).
        limit: largest factor by which a channel is changed, against numbers out of range.
    """

    alpha: float = 0.5
    limit: float = 1e4

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale the space by 1 / s; see the module text."""
        if not context.readers(space):
            return None
        if not admits_diagonal(space):
            raise Refusal(f"its group {space.group} has no scales")
        s = smooth_scale(context.activation_range(space), context.weight_range(space), self.alpha)
        s = np.clip(s, 1 / self.limit, self.limit)
        scale(context.spaces, element, space, 1 / s)
        return f"scales {s.min():.3g} .. {s.max():.3g}, alpha {self.alpha}"


def smooth_scale(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """``max|x|^alpha / max|W|^(1-alpha)`` per channel; 1 for channels that are never used or never read."""
    usable = (x > 0) & (w > 0)
    s = np.ones_like(x)
    s[usable] = x[usable] ** alpha / w[usable] ** (1 - alpha)
    return s
