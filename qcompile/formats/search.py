"""The scale search that most formats share.

For codes with values ``v`` the scale that minimises ``E(s) = sum h (w - s v)^2`` is ``s = sum(h w v) / sum(h v^2)``,
and then ``E = sum(h w^2) - sum(h w v)^2 / sum(h v^2)``. So a candidate scale only has to *propose* codes: rounding
with it gives ``v``, the closed form gives the best scale for these codes, and the proposal with the largest
``sum(h w v)^2 / sum(h v^2)`` wins. Rounding again on the winning scale can only lower the error further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def best_scale(
    blocks: np.ndarray,
    importance: np.ndarray,
    proposals: Iterable[np.ndarray],
    snap: Callable[[np.ndarray], np.ndarray],
    rounds: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best scale per group and column and its score, the larger the better.

    Args:
        blocks: weights ``(G, length, N)``.
        importance: weights of the squared errors, ``(G, length, 1 or N)``.
        proposals: scales ``(G, N)`` to try; non-zero.
        snap: rounds ``blocks / scale`` to the values a unit-scale code can have.
        rounds: how often the winner is re-rounded on its own scale.
    """
    weighted = blocks * importance
    best = np.zeros(blocks.shape[::2], np.float32)
    score = np.full(blocks.shape[::2], -1.0, np.float32)

    def consider(scale: np.ndarray) -> None:
        nonlocal best, score
        unit = snap(blocks / scale[:, None])
        cross = np.einsum("gln,gln->gn", weighted, unit)
        power = (
            np.einsum("gln,gln->gn", importance * unit, unit) if importance.shape[2] > 1 else _power(importance, unit)
        )
        usable = power > 0
        power = np.where(usable, power, 1)
        gain = np.where(usable, cross * cross / power, 0)
        better = gain > score
        # Codes that are all zero say nothing about the scale: keep the proposal itself.
        best = np.where(better, np.where(usable & (cross != 0), cross / power, scale), best)
        score = np.where(better, gain, score)

    for scale in proposals:
        consider(np.asarray(scale, np.float32))
    for _ in range(rounds):
        consider(best)
    return best, score


def _power(importance: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return np.matmul(importance.transpose(0, 2, 1), unit * unit)[:, 0]


def least_error(
    blocks: np.ndarray,
    importance: np.ndarray,
    scales: Iterable[np.ndarray],
    snap: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return, per group and column, that one of ``scales`` which rounds with the least error.

    For formats that can store few scales only, so that the closed form is of no use. Arguments as for `best_scale`.
    """
    norm = usable(np.abs(blocks).max(1))  # so that squares neither overflow nor vanish
    best = np.ones_like(norm)
    least = np.full_like(norm, np.inf)
    for scale in scales:
        delta = (blocks - snap(blocks / scale[:, None]) * scale[:, None]) / norm[:, None]
        error = np.einsum("gln,gln->gn", delta * importance, delta)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def usable(scale: np.ndarray) -> np.ndarray:
    """Replace scales of zero (all-zero groups), or too small to divide by, with 1: zeros stay zeros."""
    return np.where(np.abs(scale) < np.finfo(np.float32).tiny, 1, scale).astype(np.float32)
