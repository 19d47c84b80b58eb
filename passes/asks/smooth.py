"""Scales between activations and weights, channel by channel.

    x'_j = x_j / s_j,   W'_j = s_j W_j

    SmoothQuant    s_j = max|x_j|^a / max|W_j|^(1-a)     a given, or searched for each space
    AWQ            s_j = mean|x_j|^a                      a searched for each space

They apply to every space that admits positive scales and is read by a quantized linear operator: outputs of norms,
values to the output projection, up-projections to down-projections, or whatever else the model has of that kind.

Sources: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML
2023; Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", MLSys 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import RecipeError
from qcompile.passes.asks.base import Ask, Context, Refusal, register_ask
from qcompile.passes.asks.rounding import RoundingError
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.request import admits_diagonal, scale


@register_ask("smooth")
@dataclass(frozen=True)
class Smooth(Ask):
    """Moves the range of activations into weights by SmoothQuant scales.

    Attributes:
        alpha: share of the range that goes to the weights, 0 (none) to 1 (all).
        search: if positive, alpha is chosen among this many values from 0 to 1 for each space, and no scales at all.
        limit: largest factor by which a channel is changed, against numbers out of range.
    """

    alpha: float = 0.5
    search: int = 0
    limit: float = 1e4

    def __post_init__(self) -> None:
        if self.search < 0 or not self.limit >= 1:
            raise RecipeError("smooth: search is 0 or a number of values, limit a factor of at least 1")

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale the space by 1 / s; see the module text."""
        if not context.readers(space):
            return None
        if not admits_diagonal(space):
            raise Refusal(f"its group {space.group} has no scales")
        x, w = context.activation_range(space), context.weight_range(space)

        def factor(alpha: float) -> np.ndarray:
            return 1 / np.clip(smooth_scale(x, w, alpha), 1 / self.limit, self.limit)

        alpha, s = self.alpha, factor(self.alpha)
        if self.search:
            error = RoundingError(space, context)
            alpha, s = error.best(np.linspace(0, 1, self.search), factor)
            if error(np.ones(space.size)) <= error(s):
                return None
        scale(context.spaces, element, space, s)
        return f"scales {1 / s.max():.3g} .. {1 / s.min():.3g}, alpha {alpha:.2g}"


def smooth_scale(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """``max|x|^alpha / max|W|^(1-alpha)`` per channel; 1 for channels that are never used or never read."""
    usable = (x > 0) & (w > 0)
    s = np.ones_like(x)
    s[usable] = x[usable] ** alpha / w[usable] ** (1 - alpha)
    return s


@register_ask("awq")
@dataclass(frozen=True)
class Awq(Ask):
    """Scales up weights whose activations are large, by AWQ's search.

    Attributes:
        grid: number of exponents tried from 0 (no scales) to 1.
    """

    grid: int = 20

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise RecipeError(f"awq: at least one exponent is tried, not {self.grid}")

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale the space by 1 / s; see the module text."""
        if not context.readers(space):
            return None
        if not admits_diagonal(space):
            raise Refusal(f"its group {space.group} has no scales")
        error = RoundingError(space, context)
        x = error.magnitude
        used = x > 0

        def factor(exponent: float) -> np.ndarray:
            s = np.ones_like(x)
            s[used] = x[used] ** exponent
            # Around one, so that the range of the weights as a whole stays where it was.
            return np.sqrt(s.max() * s.min()) / s

        exponent, chosen = error.best(np.linspace(0, 1, self.grid), factor)
        scale(context.spaces, element, space, chosen)
        return f"scales {1 / chosen.max():.3g} .. {1 / chosen.min():.3g}, exponent {exponent:.2g}"
