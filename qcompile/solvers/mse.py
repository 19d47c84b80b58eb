"""Round to nearest on the grid with the least squared error, found by a search over clipping ranges.

With a Hessian the error of a weight counts as much as the power of the channel it multiplies, ``H[k, k]``: the output
error if input channels were uncorrelated. Without one all weights count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, Quantized
from qcompile.solvers.base import Progress, Solver, register_solver


@register_solver
@dataclass(frozen=True)
class LeastSquares(Solver):
    """``mse``: `Format.fit_grid` weighted by the diagonal of the Hessian, then rounding."""

    name = "mse"

    def _solve(self, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None, progress: Progress) -> Quantized:
        return fmt.quantize(weight, fmt.fit_grid(weight, None if hessian is None else np.diag(hessian)))
