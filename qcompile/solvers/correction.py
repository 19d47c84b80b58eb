"""Undo, with what is still in float, the errors made upstream and by rounding.

**Weights.** In the quantized model a layer does not see the inputs ``X`` of the float model but ``X'``: rounded, and behind
layers already quantized. The best target is then not ``X' W`` but ``X W``. With ``H = X'^T X' / t`` and ``C = X'^T X / t``

    ||X W - X' Q||^2 = ||X' (W' - Q)||^2 + constant,    W' = H^-1 C W

so an ordinary solver run on ``W'`` and ``H`` minimises the error against the float model.

**Bias.** A constant output error, ``mean(X W - X' Q)``, moves into the bias. With a bias to absorb it, the mean should not
count in the Hessian: use ``H - m m^T`` with ``m = mean(X')``.
Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from qcompile.errors import CalibrationError
from qcompile.solvers.base import check_hessian


def correct_weight(weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray, damping: float = 0.1) -> np.ndarray:
    """Return the float32 weight ``(K, N)`` that reproduces the float model's outputs on the quantized model's inputs.

    Args:
        weight: float, ``(K, N)``.
        hessian: ``X'^T X' / tokens``, ``(K, K)``.
        cross: ``X'^T X / tokens``, ``(K, K)``.
        damping: pull towards ``weight``, as a fraction of the mean of the Hessian's diagonal.

    Raises:
        CalibrationError: a matrix has the wrong shape or is not finite.
    """
    k = weight.shape[0]
    hessian = check_hessian(hessian, k)
    if np.shape(cross) != (k, k) or not np.isfinite(cross).all():
        raise CalibrationError(f"the cross moments must be finite and ({k}, {k}), got shape {np.shape(cross)}")
    ridge = damping * np.diag(hessian).mean() or 1.0
    factor = cho_factor(hessian + np.diag(np.full(k, ridge)), overwrite_a=True, check_finite=False)
    change = cho_solve(factor, (np.asarray(cross, np.float64) - hessian) @ weight)
    return (weight + change).astype(np.float32)


def correct_bias(
    bias: np.ndarray,
    weight: np.ndarray,
    quantized: np.ndarray,
    mean: np.ndarray,
    quantized_mean: np.ndarray | None = None,
) -> np.ndarray:
    """Return ``bias + mean @ weight - quantized_mean @ quantized``, float32, ``(N,)``.

    Args:
        bias: ``(N,)``.
        weight: the float weight, ``(K, N)``.
        quantized: the decoded weight, ``(K, N)``.
        mean: mean input of the layer in the float model, ``(K,)``.
        quantized_mean: mean input in the quantized model; ``mean`` if None.
    """
    mean = np.asarray(mean, np.float64)
    seen = mean if quantized_mean is None else np.asarray(quantized_mean, np.float64)
    return (bias + mean @ weight - seen @ quantized).astype(np.float32)
