"""Descent on orthogonal matrices: a step along a skew-symmetric direction, taken by the Cayley transform.

With ``G = dL/dR`` at an orthogonal ``R`` the steepest descent that stays tangent to O(n) is ``-A R`` with the
skew-symmetric ``A = G R^T - R G^T``, and

    R' = (I + t/2 D)^-1 (I - t/2 D) R

is orthogonal again for any skew ``D``. Here D is A with momentum, or A scaled entry by entry by running second moments
as in Adam; both leave it skew. A acts from the left, in one fixed frame, so momentum needs no transport from step to
step. ``|t D|`` is bounded, so that a wild gradient does not turn the matrix over.

Sources: Wen and Yin, "A feasible method for optimization with orthogonality constraints" (2013); Li, Li and Todorovic,
"Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform" (2020), which SpinQuant uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

LARGEST_TURN = 1.0
"""Bound on the Frobenius norm of ``t D`` per square root of the order: about the angle of one step, in radians."""


class Cayley(torch.optim.Optimizer):
    """Optimizer of orthogonal matrices, parameters of shape ``(..., n, n)``.

    Args:
        params: the matrices.
        lr: step length.
        momentum: of the plain method; first decay rate of the adaptive one.
        adaptive: 0 for the plain method (Cayley SGD), else the decay rate of the second moments (Cayley Adam).
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.9, adaptive: float = 0.999
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "adaptive": adaptive})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every matrix with a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for r in group["params"]:
                if r.grad is not None:
                    direction = self._direction(r, group)
                    bound = LARGEST_TURN * r.shape[-1] ** 0.5
                    size = torch.linalg.matrix_norm(direction) * group["lr"]
                    scale = group["lr"] * torch.clamp(bound / size.clamp_min(1e-30), max=1.0)
                    r.copy_(orthonormal(cayley(direction * scale[..., None, None]) @ r))
        return loss

    def _direction(self, r: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[r]
        assert r.grad is not None
        product = r.grad @ r.mT
        skew = product - product.mT
        beta, beta2 = group["momentum"], group["adaptive"]
        if not state:
            state["count"], state["mean"] = 0, torch.zeros_like(r)
            if beta2:
                state["square"] = torch.zeros_like(r)
        state["count"] += 1
        if not beta2:
            state["mean"].mul_(beta).add_(skew)
            return state["mean"]
        state["mean"].lerp_(skew, 1 - beta)
        state["square"].lerp_(skew.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta ** state["count"])
        square = state["square"] / (1 - beta2 ** state["count"])
        return mean / (square.sqrt() + 1e-12 + 1e-8 * square.amax((-2, -1), keepdim=True).sqrt())


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``(I + D/2)^-1 (I - D/2)``: the orthogonal matrix that a skew-symmetric ``D`` generates, about ``exp(-D)``."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew / 2, identity - skew / 2)


def orthonormal(r: torch.Tensor) -> torch.Tensor:
    """One Newton-Schulz step towards the nearest orthogonal matrix: it undoes the rounding errors of a product."""
    return 1.5 * r - 0.5 * r @ (r.mT @ r)


def nearest_orthogonal(r: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to ``r`` (its polar factor), computed in float64."""
    u, _, v = torch.linalg.svd(r.detach().to("cpu", torch.float64))
    return u @ v
