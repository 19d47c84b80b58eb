"""Clip tokens: represent a share of each token's largest magnitude, so that the steps are finer for all the rest.

    scale = share * max|x| / qmax,   the share with the least error of the readers' outputs on sample rows

At 8 bits nothing is gained; at 4 bits and behind a rotation, where rows look Gaussian, the largest of 512 channels lies
three standard deviations out and the best share is near 0.8. Comes last in a recipe, as it depends on what is rounded.

Sources: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (a fixed share of 0.9); Choukroun
et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019 (least squares).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompile.errors import RecipeError
from qcompile.passes.asks.base import Ask, Context, Entry, Refusal, register_ask
from qcompile.passes.asks.online import product_readers
from qcompile.passes.asks.rounding import spread
from qcompile.passes.quantize import CLIP
from qcompile.passes.spaces import Spaces

ROWS, COLUMNS = 512, 256
"""Sample rows, and output channels of all readers of an activation, that are looked at."""


@register_ask("clip")
@dataclass(frozen=True)
class ClipTokens(Ask):
    """Chooses per activation which share of a token's largest magnitude is represented.

    Attributes:
        lowest: smallest share that is tried.
        steps: how many shares are tried, from ``lowest`` to 1.
        share: take this one everywhere instead of searching; needs no data.
    """

    lowest: float = 0.5
    steps: int = 26
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= 1 or self.steps < 1 or not 0 <= self.share <= 1:
            raise RecipeError("clip: shares lie between 0 and 1, and at least one is tried")

    def apply(self, context: Context) -> Spaces:
        """Leave the share with the activation; the quantizer takes it from there."""
        weights: dict[str, list[np.ndarray]] = {}
        formats, found = {}, {}
        for reader in product_readers(context):
            fmt = context.precision(reader).activation
            if fmt is not None and fmt.granularity == "token":
                formats[reader.activation] = fmt
                weights.setdefault(reader.activation, []).append(context.weight_rows(reader))
        rows: Mapping[str, np.ndarray] = {}
        if formats and not self.share:
            if context.data.rows is None:
                raise Refusal("no calibration samples")
            rows = context.data.rows(context.model, list(formats), ROWS)
        for name, fmt in formats.items():
            if self.share:
                found[name] = self.share
                continue
            x, weight = spread(rows[name], ROWS), np.concatenate(weights[name], 1)
            weight = weight[:, np.linspace(0, weight.shape[1] - 1, min(COLUMNS, weight.shape[1])).astype(int)]
            shares = np.linspace(self.lowest, 1, self.steps)
            error = [np.square((fmt.round(x, clip=float(s)) - x) @ weight).sum() for s in shares]
            found[name] = float(shares[int(np.argmin(error))])
        model = context.model.clone()
        for node in model.graph:
            for value in node.outputs:
                if value.name in found:
                    value.metadata_props[CLIP] = f"{found[value.name]:.6f}"
        text = f"{len(found)} activations clipped"
        if found:
            text += f" at {min(found.values()):.2f} .. {max(found.values()):.2f} of their largest entry"
        context.report.entries.append(Entry(self.name, -1, bool(found), text))
        return context.spaces.rebase(model)
