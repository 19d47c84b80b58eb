"""Choose a format for every matrix: least total loss within a budget of stored bits.

With one loss per matrix and format, measured one matrix at a time, and losses that add up, this is a multiple-choice
knapsack:

    minimise  sum of loss[i, f] x[i, f]
    subject to  sum of bits[i, f] x[i, f] <= budget,  sum over f of x[i, f] = 1 for every i,  x in 0, 1

solved to optimality by HiGHS.

Sources: Hubara et al., "Accurate Post Training Quantization with Small Calibration Sets" (2021), section 4 (integer
programming over layers); the additive loss is the assumption of all such methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qcompile.errors import RecipeError


@dataclass(frozen=True)
class Choice:
    """What one candidate format of one matrix costs: ``loss`` in any additive unit, ``bits`` stored."""

    loss: float
    bits: float


@dataclass(frozen=True)
class Allocation:
    """The format chosen for every matrix, and the totals."""

    formats: dict[str, str]
    loss: float
    bits: float


def allocate(candidates: Mapping[str, Mapping[str, Choice]], budget: float) -> Allocation:
    """Pick one format per matrix with the least total loss, at most ``budget`` bits in total.

    Args:
        candidates: for every matrix by name, its possible formats by spelling.
        budget: bits.

    Raises:
        RecipeError: a matrix has no candidates, a loss is not finite, or even the smallest formats exceed the budget.
    """
    options = [(name, spelling, choice) for name, choices in candidates.items() for spelling, choice in choices.items()]
    for name, choices in candidates.items():
        if not choices:
            raise RecipeError(f"{name}: no format to choose from")
    for name, spelling, choice in options:
        if not (np.isfinite(choice.loss) and np.isfinite(choice.bits)):
            raise RecipeError(f"{name}: {spelling} has loss {choice.loss} and {choice.bits} bits; both must be finite")
    smallest = sum(min(choice.bits for choice in choices.values()) for choices in candidates.values())
    if smallest > budget:
        raise RecipeError(f"the budget is {budget:.0f} bits, but the smallest formats take {smallest:.0f}")
    if not options:
        return Allocation({}, 0.0, 0.0)

    index = {name: i for i, name in enumerate(candidates)}
    owner = np.array([index[name] for name, _, _ in options])
    count = len(options)
    one_each = coo_array((np.ones(count), (owner, np.arange(count))), shape=(len(index), count))
    loss, bits = np.array([c.loss for *_, c in options]), np.array([c.bits for *_, c in options])
    # Tolerances of the solver are absolute: scale both sums to about one per matrix.
    unit_loss, unit_bits = np.abs(loss).max() or 1, bits.max() or 1
    solution = milp(
        loss / unit_loss,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bits[None] / unit_bits, -np.inf, budget / unit_bits),
        ],
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise RecipeError(f"no allocation found: {solution.message}")
    chosen = np.flatnonzero(solution.x > 0.5)
    formats = {options[i][0]: options[i][1] for i in chosen}
    return Allocation(formats, float(loss[chosen].sum()), float(bits[chosen].sum()))


def equal_loss_bits(
    sensitivity: np.ndarray, sizes: np.ndarray, mean_bits: float, low: float, high: float
) -> np.ndarray:
    """Return real bits per matrix in closed form, for formats whose loss falls fourfold with each bit.

    If matrix ``i`` of ``sizes[i]`` weights loses ``sensitivity[i] * 4**-bits[i]`` per weight, the total is least when all lose
    the same per weight: ``bits[i] = constant + log4(sensitivity[i])``, clipped to ``low`` and ``high``, with the constant
    that makes the mean over all weights ``mean_bits``.

    Source: "BAQ: Efficient Bit Allocation Quantization for Large Language Models" (2025), section 3.

    Raises:
        RecipeError: a sensitivity is not positive, or ``mean_bits`` lies outside of ``low`` and ``high``.
    """
    sensitivity, sizes = np.asarray(sensitivity, np.float64), np.asarray(sizes, np.float64)
    if not (sensitivity > 0).all():
        raise RecipeError("sensitivities must be positive")
    if not low <= mean_bits <= high:
        raise RecipeError(f"a mean of {mean_bits} bits cannot be reached with {low} to {high} bits")
    wanted = np.log(sensitivity) / np.log(4)
    below, above = low - wanted.max(), high - wanted.min()
    for _ in range(100):  # the clipped mean rises with the constant: bisection
        constant = (below + above) / 2
        bits = np.clip(wanted + constant, low, high)
        if (bits * sizes).sum() > mean_bits * sizes.sum():
            above = constant
        else:
            below = constant
    return np.clip(wanted + below, low, high)
