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
        """Move every matrix with a gradient; those of one order together."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for n, matrices in by_order(group["params"]).items():
                if all(m.grad is None for m in matrices):
                    continue
                r = torch.cat([m.reshape(-1, n, n) for m in matrices])
                gradients = [torch.zeros_like(m) if m.grad is None else m.grad for m in matrices]
                gradient = torch.cat([g.reshape(-1, n, n) for g in gradients])
                direction = self._direction(r, gradient, self.state[matrices[0]], group)
                size = torch.linalg.matrix_norm(direction) * group["lr"]
                bound = LARGEST_TURN * n**0.5
                scale = group["lr"] * torch.clamp(bound / size.clamp_min(1e-30), max=1.0)
                moved = orthonormal(cayley(direction * scale[..., None, None]) @ r)
                for m, part in zip(matrices, moved.split([m.numel() // n**2 for m in matrices])):
                    m.copy_(part.reshape(m.shape))
        return loss

    @staticmethod
    def _direction(
        r: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        """Skew-symmetric directions of ``(count, n, n)`` matrices; ``state`` is kept with the first of them."""
        product = gradient @ r.mT
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


def by_order(matrices: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Matrices of one order together, since one batched operation is faster than many small ones."""
    found: dict[int, list[torch.Tensor]] = {}
    for m in matrices:
        found.setdefault(m.shape[-1], []).append(m)
    return found


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
