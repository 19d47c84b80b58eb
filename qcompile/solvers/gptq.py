"""GPTQ: round one input channel at a time and let the channels not yet rounded absorb its error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).

Let ``U`` be the upper triangular factor of the inverse Hessian, ``H^-1 = U^T U``. Rounding row ``i`` of ``W`` to ``q``
leaves the scaled error ``e = (w_i - q) / U[i, i]``, and the best update of the later rows is ``w_j -= U[i, j] e``. The
loss is then exactly the sum of ``e^2``. Hence ``1 / U[i, i]^2`` is the weight with which row ``i``'s rounding error
counts once later rows compensate, and it is what the search for scales is weighted with.

``U`` needs no explicit inverse: if ``H = R R^T`` with ``R`` upper triangular (a Cholesky factor with both axes reversed),
then ``U = R^-1``.

Order. Rounding important channels first leaves more freedom to correct for them. Codes stay where they are and groups
are those of the stored matrix, whatever the order, so kernels see an ordinary group-wise format. Whole groups are
ordered by their importance and rows within them, which lets a group's scale be fitted to the weights as they are when
its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cholesky, lapack

from qcompile.errors import CalibrationError, RecipeError
from qcompile.formats.base import Format, Quantized
from qcompile.solvers.base import Progress, Solver, register_solver
from qcompile.solvers.mse import LeastSquares


@register_solver
@dataclass(frozen=True)
class Gptq(Solver):
    """``gptq``.

    Attributes:
        damping: added to the diagonal of the Hessian, as a fraction of its mean. It keeps codes from fitting the noise of
            few calibration tokens: with less than about twenty tokens per input channel, 0.3 does better still.
        act_order: round important channels first.
        block: rows whose updates of the remaining matrix are applied together.
        refit: fit a group's grid when its turn comes, to the weights corrected so far; else before the first row.
    """

    name = "gptq"
    needs_hessian = True

    damping: float = 0.1
    act_order: bool = True
    block: int = 128
    refit: bool = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise RecipeError(f"gptq: damping must be positive, got {self.damping}")
        if self.block < 1:
            raise RecipeError(f"gptq: a block has at least one row, got {self.block}")

    def _solve(self, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None, progress: Progress) -> Quantized:
        if hessian is None or not hessian.any():
            return LeastSquares()._solve(weight, fmt, None, progress)
        k = weight.shape[0]
        power = np.diag(hessian)
        if not self.act_order:
            order = np.arange(k)
        elif self.refit:
            order = grouped_order(power, fmt.group_length(k))
        else:
            order = np.argsort(-power, kind="stable")
        factor = inverse_factor(hessian[np.ix_(order, order)], self.damping)
        return self._round(weight, fmt, order, factor, progress)

    def _round(
        self, weight: np.ndarray, fmt: Format, order: np.ndarray, factor: np.ndarray, progress: Progress
    ) -> Quantized:
        """Round the rows of ``weight`` in the given order; ``factor`` is ``U`` of the reordered Hessian."""
        k, n = weight.shape
        group_of = order // fmt.group_length(k)
        power = np.diag(factor) ** -2.0
        importance = np.empty(k)
        importance[order] = power
        grid = fmt.fit_grid(weight, importance)
        work = weight[order]  # rows in rounding order, corrected in place
        factor = factor.astype(np.float32)
        codes = np.empty((k, n), np.int16)
        group = -1
        for start, stop in self._blocks(group_of):
            errors = np.empty((stop - start, n), np.float32)
            for i in range(start, stop):
                row = work[i : i + 1]
                if group_of[i] != group:
                    group = group_of[i]
                    if self.refit:
                        members = np.flatnonzero(group_of == group)
                        here = fmt.fit_group(work[members], power[members], fmt.rows(grid, order[i : i + 1], k))
                        grid = grid.replace(group, here)
                    here = fmt.rows(grid, order[i : i + 1], k)
                code = fmt.nearest(row, here)
                codes[order[i]] = code[0]
                errors[i - start] = (row - fmt.values(code, here))[0] / factor[i, i]
                work[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
            work[stop:] -= factor[start:stop, stop:].T @ errors
            progress(stop / k)
        return grid.with_codes(codes.astype(code.dtype))

    def _blocks(self, group_of: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield blocks of rows. One ends where a group begins that it could not hold: grids are fitted to rows that all
        earlier errors have reached."""
        k = len(group_of)
        begins = np.flatnonzero(np.diff(group_of, prepend=-1))
        start = 0
        while start < k:
            stop = min(start + self.block, k)
            if self.refit and stop < k and (whole := begins[np.searchsorted(begins, stop, side="right") - 1]) > start:
                stop = int(whole)
            yield start, stop
            start = stop


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Return upper triangular ``U`` with ``U^T U`` the inverse of ``hessian + damping * mean(diag) * I``.

    A Hessian that rounding errors have made indefinite is damped ten times more, up to the mean of its diagonal.

    Raises:
        CalibrationError: not even that makes it positive definite.
    """
    mean = np.diag(hessian).mean()
    while damping <= 1:
        damped = hessian + np.diag(np.full(len(hessian), damping * mean))
        try:
            reverse = cholesky(damped[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            damping *= 10
            continue
        factor, info = lapack.dtrtri(np.asfortranarray(reverse[::-1, ::-1]), lower=0)
        if info == 0 and np.isfinite(factor).all():
            return np.triu(factor)
        damping *= 10
    raise CalibrationError("the Hessian is not positive semi-definite; it must be X^T X of the layer's inputs")


def grouped_order(power: np.ndarray, length: int) -> np.ndarray:
    """Return channels sorted by falling ``power``, group by group, the group with the largest mean power first."""
    groups = np.arange(len(power)) // length
    mean = np.bincount(groups, power) / np.bincount(groups)
    return np.lexsort((-power, groups, -mean[groups]))
