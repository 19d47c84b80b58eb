"""Diagonals from the range of activations alone.

    CrossQuant   the activation scale is row^a column^(1-a); the column factor folds:  x'_j = x_j / max|x_j|^(1-a)
    FP exponent  per-channel powers of two, the exponent bias of a floating point format: s_j = 2^round(log2 max|x_j|)

Sources: Liu et al., "CrossQuant", 2024; Liu et al., "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks.base import Ask, Context, Refusal, register_ask
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.request import admits_diagonal, scale


@register_ask("column-scale")
@dataclass(frozen=True)
class ColumnScale(Ask):
    """Divides every channel by a power of its range (CrossQuant), maybe rounded to powers of two (LLM-FP4).

    Attributes:
        share: the exponent; 1 gives all channels one range, 0 changes nothing. CrossQuant's a is 1 - share.
        power_of_two: round scales to powers of two, which an exponent bias can hold.
    """

    share: float = 0.85
    power_of_two: bool = False

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale the space by the inverse of its column factor."""
        if not context.readers(space):
            return None
        if not admits_diagonal(space):
            raise Refusal(f"its group {space.group} has no scales")
        s = column_factor(context.activation_range(space), self.share, self.power_of_two)
        scale(context.spaces, element, space, 1 / s)
        return f"column factors {s.min():.3g} .. {s.max():.3g}"


def column_factor(x: np.ndarray, share: float, power_of_two: bool) -> np.ndarray:
    """``(max|x_j| / geometric mean)^share``, 1 for channels that are never used."""
    used = x > 0
    s = np.ones_like(x)
    if used.any():
        logs = np.log2(x[used])
        logs = share * (logs - logs.mean())
        s[used] = np.exp2(np.round(logs) if power_of_two else logs)
    return s
