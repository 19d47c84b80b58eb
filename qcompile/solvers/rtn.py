"""Round to nearest on the grid that covers the weights' range. The baseline: no data, no search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.formats.base import Format, Quantized
from qcompile.solvers.base import Progress, Solver, register_solver


@register_solver
@dataclass(frozen=True)
class RoundToNearest(Solver):
    """``rtn``: the format's own `Format.encode`."""

    name = "rtn"

    def _solve(self, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None, progress: Progress) -> Quantized:
        return fmt.encode(weight)
