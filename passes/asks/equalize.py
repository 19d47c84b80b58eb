"""Cross-layer equalization: give the channels of writers and readers the same range.

    d_j = sqrt(r_in_j / r_out_j),   x'_j = d_j x_j,  W_out' = d W_out,  W_in' = W_in / d

with r_out_j the largest weight that writes channel j and r_in_j the largest that reads it. All spaces move at once, by
half of what they want, and again until the scales stay put, because neighbouring spaces share weights. No data needed.
It goes wherever positive scales fold: ReLU networks, depthwise convolutions, linear pairs; ReLU6 after `PromoteClip`.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks.base import Ask, Context, Entry, register_ask
from qcompile.passes.spaces import Space, Spaces, fold
from qcompile.passes.spaces.request import admits_diagonal, scale


@register_ask("equalize")
@dataclass(frozen=True)
class Equalize(Ask):
    """Gives the channels of writers and readers one range (cross-layer equalization); needs no data.

    Attributes:
        rounds: most repetitions.
        tolerance: largest change of a scale at which to stop.
    """

    rounds: int = 20
    tolerance: float = 0.02

    def apply(self, context: Context) -> Spaces:
        """Repeat proposal and folding until the scales settle."""
        current = context.spaces
        chosen = [s for s in current if admits_diagonal(s) and _both_sides(s)]
        for _ in range(self.rounds if chosen else 0):
            change = 0.0
            element = current.identity()
            for space in chosen:
                writers, readers = (weight_range(current, space, role) for role in ("writer", "reader"))
                usable = (writers > 0) & (readers > 0)
                ratio = np.where(usable, readers, 1.0) / np.where(usable, writers, 1.0)
                scale(current, element, space, ratio**0.25)
                change = max(change, float(np.abs(np.log(ratio)).max()) / 2)
            current = current.rebase(fold(current, element))
            if change < self.tolerance:
                break
        for space in chosen:
            context.report.entries.append(Entry(self.name, space.index, True, f"{space.size} channels equalized"))
        return current


def _both_sides(space: Space) -> bool:
    return {"writer", "reader"} <= {m.role for m in space.members}


def weight_range(spaces: Spaces, space: Space, role: str) -> np.ndarray:
    """Largest weight per channel of the space over its members of one role."""
    result = np.zeros(space.size)
    for member in space.members:
        if member.role != role:
            continue
        tensor = spaces.model.graph.initializers[member.name].const_value
        assert tensor is not None
        array = np.abs(tensor.numpy().astype(np.float64))
        for m in spaces.constants[member.name]:
            if m.axes != member.axes:
                continue
            rows = np.moveaxis(array, m.axes, range(len(m.axes))).reshape(m.size, -1).max(1)
            place = spaces.index_in_space(m.flat, space)
            np.maximum.at(result, place[place >= 0], rows[place >= 0])
    return result
