"""What a solver is: it chooses the stored codes of one weight matrix.

The layer's output is ``x @ W``. Over calibration inputs ``X`` ``(tokens, K)`` the error of a quantized ``Q`` is

    ||X W - X Q||^2 / tokens = sum over columns of d^T H d,    d = W - Q,    H = X^T X / tokens

so a solver needs nothing from the model but ``H``, its *Hessian*. Without one, ``H`` is the identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from qcompile.errors import CalibrationError, RecipeError
from qcompile.formats.base import Format, Quantized, check_weight

Progress = Callable[[float], None]
"""Called with the finished fraction, from 0 to 1."""


@dataclass(frozen=True)
class Solver(ABC):
    """Chooses codes. Instances are values whose fields are the options; `solve` is deterministic."""

    name: ClassVar[str]
    needs_hessian: ClassVar[bool] = False
    """Whether `solve` is better than a data-free solver only with a Hessian; it works without one all the same."""

    def solve(
        self,
        weight: np.ndarray,
        fmt: Format,
        *,
        hessian: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> Quantized:
        """Quantize one matrix.

        Args:
            weight: float, ``(K, N)``.
            fmt: the format of the codes.
            hessian: ``X^T X / tokens``, float, ``(K, K)``.
            progress: called from time to time with the finished fraction.

        Raises:
            FormatError: the weight is not a matrix of finite floats.
            CalibrationError: the Hessian has the wrong shape, is not finite, or has a negative diagonal.
        """
        weight = check_weight(weight, fmt)
        if hessian is not None:
            hessian = check_hessian(hessian, weight.shape[0])
        # Many small products on one core beat BLAS threads that wait for each other, above all on a busy machine, and
        # the codes do not depend on the number of cores. Callers solve independent matrices in parallel.
        with threadpool_limits(1, user_api="blas"):
            result = self._solve(weight, fmt, hessian, progress or (lambda fraction: None))
        if progress is not None:
            progress(1.0)
        return result

    @abstractmethod
    def _solve(self, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None, progress: Progress) -> Quantized:
        """Quantize checked arguments: float32 ``weight``, float64 symmetric ``hessian``."""


def check_hessian(hessian: np.ndarray, k: int) -> np.ndarray:
    """Return ``hessian`` as a symmetric float64 matrix.

    Raises:
        CalibrationError: it has the wrong shape, is not finite, or has a negative diagonal.
    """
    hessian = np.asarray(hessian, np.float64)
    if hessian.shape != (k, k):
        raise CalibrationError(f"the Hessian of a weight with {k} input channels is ({k}, {k}), got {hessian.shape}")
    if not np.isfinite(hessian).all():
        raise CalibrationError("the Hessian holds NaN or infinity; look for overflow in the calibration activations")
    if (np.diag(hessian) < 0).any():
        raise CalibrationError("the Hessian has a negative diagonal; it must be X^T X of the layer's inputs")
    return (hessian + hessian.T) / 2


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray | None = None) -> float:
    """Return ``trace(d^T H d)``, ``d = weight - quantized``: the squared output error per token, summed over N."""
    delta = np.asarray(weight, np.float64) - quantized
    return float(np.vdot(delta, delta if hessian is None else np.asarray(hessian, np.float64) @ delta))


_SOLVERS: dict[str, type[Solver]] = {}


def register_solver(cls: type[Solver]) -> type[Solver]:
    """Make a solver known by its ``name``."""
    _SOLVERS[cls.name] = cls
    return cls


def get_solver(name: str, **options: Any) -> Solver:
    """Return the solver called ``name`` with some of its options changed.

    Raises:
        RecipeError: there is no such solver or option, or the option's value is out of range.
    """
    if name not in _SOLVERS:
        raise RecipeError(f"unknown solver {name!r}; known: {', '.join(sorted(_SOLVERS))}")
    known = {field.name for field in fields(_SOLVERS[name])}
    if unknown := sorted(set(options) - known):
        raise RecipeError(
            f"solver {name!r} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(sorted(known)) or 'none'}"
        )
    return _SOLVERS[name](**options)


def list_solvers() -> dict[str, type[Solver]]:
    """Return the registered solvers by name."""
    return dict(_SOLVERS)
