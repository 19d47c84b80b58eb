"""Coordinate descent: improve given codes one input channel at a time, and the scales in between.

Source: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models" (2023).

With ``D = W - Q`` and ``G = H D``, the loss ``trace(D^T H D)`` as a function of row ``k`` of ``Q`` alone is a parabola
with its minimum at ``q_k + G[k] / H[k, k]``. The nearest code to that is the best one, so no step makes the loss larger.
GPTQ visits each channel once and only looks ahead; here a channel is revisited when all others are known.

Between sweeps the scales are refitted to the codes: with ``V`` the values of the codes on the present grid and one factor
``f[g]`` per group, ``Q[k] = f[g(k)] V[k]`` is linear in ``f``, hence for each column a system of ``G`` equations

    M f = r,    M[g, h] = sum over i in g, j in h of V[i] H[i, j] V[j],    r[g] = sum over i in g, all j of V[i] H[i, j] W[j]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import RecipeError
from qcompile.formats.base import Format, Quantized, column_chunks
from qcompile.solvers.base import Progress, register_solver
from qcompile.solvers.gptq import Gptq
from qcompile.solvers.mse import LeastSquares


@register_solver
@dataclass(frozen=True)
class QuantEase(Gptq):
    """``quantease``: start from GPTQ, then alternate sweeps of coordinate descent with refitted scales.

    Attributes:
        sweeps: how often every channel is revisited.
        rescale: refit the scales before each sweep.
    """

    name = "quantease"

    sweeps: int = 4
    rescale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweeps < 0:
            raise RecipeError(f"quantease: sweeps must not be negative, got {self.sweeps}")

    def _solve(self, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None, progress: Progress) -> Quantized:
        if hessian is None or not hessian.any():
            return LeastSquares()._solve(weight, fmt, None, progress)
        quantized = super()._solve(weight, fmt, hessian, lambda fraction: progress(fraction / (1 + self.sweeps)))
        mean = np.diag(hessian).mean()
        damped = (hessian + np.diag(np.full(len(hessian), self.damping * mean))).astype(np.float32)
        for sweep in range(self.sweeps):
            if self.rescale:
                quantized = refit_scales(weight, fmt, quantized, damped)
            quantized, changed = descend(weight, fmt, quantized, damped, self.block)
            progress((sweep + 2) / (1 + self.sweeps))
            if not changed:
                break
        return quantized


def descend(
    weight: np.ndarray, fmt: Format, quantized: Quantized, hessian: np.ndarray, block: int = 128
) -> tuple[Quantized, bool]:
    """Visit every channel once; return the better codes and whether any changed.

    Args:
        weight: float32, ``(K, N)``.
        fmt: the format of ``quantized``.
        quantized: the codes to start from; its grid stays as it is.
        hessian: float32, ``(K, K)``, positive diagonal.
        block: rows whose effect on the rest of the gradient is applied together.
    """
    k = weight.shape[0]
    codes = quantized.codes.copy()
    grid = quantized.grid
    values = fmt.decode(quantized)
    gradient = hessian @ (weight - values)
    power = np.diag(hessian)
    for start in range(0, k, block):
        stop = min(start + block, k)
        change = np.zeros_like(values[start:stop])
        local = hessian[start:stop, start:stop]
        for i in range(start, stop):
            here = fmt.rows(grid, np.array([i]), k)
            wanted = values[i : i + 1] + gradient[i] / power[i]
            codes[i] = fmt.nearest(wanted, here)[0]
            change[i - start] = fmt.values(codes[i : i + 1], here)[0] - values[i]
            gradient[i + 1 : stop] -= local[i - start, i + 1 - start :, None] * change[i - start]
        gradient[stop:] -= hessian[stop:, start:stop] @ change
    return grid.with_codes(codes), bool((codes != quantized.codes).any())


def refit_scales(weight: np.ndarray, fmt: Format, quantized: Quantized, hessian: np.ndarray) -> Quantized:
    """Return ``quantized`` with the scales that minimise the loss for its codes.

    Columns for which the format cannot store better scales, or has none to fit, keep theirs.
    """
    values = fmt.decode(quantized)
    factor = np.empty((fmt.groups(weight.shape[0]), weight.shape[1]), np.float32)
    for columns in column_chunks(factor, elements=1 << 12):
        factor[:, columns] = _best_factors(fmt, weight[:, columns], values[:, columns], hessian)
    grid = fmt.rescale(quantized.grid, factor)
    if grid is None:
        return quantized
    before, after = weight - values, weight - fmt.decode(grid.with_codes(quantized.codes))
    better = np.einsum("kn,kn->n", after, hessian @ after) < np.einsum("kn,kn->n", before, hessian @ before)
    return quantized.grid.where(better, grid).with_codes(quantized.codes)


def _best_factors(fmt: Format, weight: np.ndarray, values: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    k, n = values.shape
    groups, length = fmt.groups(k), fmt.group_length(k)
    starts = np.arange(0, k, length)
    normal = np.empty((n, groups, groups))
    for g, start in enumerate(starts):
        seen = hessian[:, start : start + length] @ values[start : start + length]
        normal[:, :, g] = np.add.reduceat(seen * values, starts, axis=0).T
    # Solve for the change of the factors, pulled slightly towards none: a group of zero codes keeps its scale.
    wanted = np.add.reduceat((hessian @ (weight - values)) * values, starts, axis=0).T.astype(np.float64)
    diagonal = np.einsum("ngg->ng", normal)
    diagonal += 1e-4 * diagonal.mean(1, keepdims=True) + 1e-30
    return 1 + np.linalg.solve(normal, wanted[..., None])[..., 0].T
