"""Kronecker products at run time, before a linear operator, while they are learned.

    x W = (x T) (T^-1 W),    T = blockdiag(L (x) R, ..., L (x) R),    L, R invertible

``T`` costs rows(L) + rows(R) multiplications per element of x. A Hadamard matrix is such a product, with nothing to
learn. A learned factor is kept as ``U diag(exp(s)) V`` with orthogonal U and V, so that it can be inverted at any time.
The operator that stays in the graph in the end is the one of `qcompile.passes.asks.online`.

Source: Sun et al., "FlatQuant: Flatness Matters for LLM Quantization" (2024), sections 3.1 and 3.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from qcompile.formats.hadamard import hadamard_matrix
from qcompile.passes.asks.online import Hadamard, Kronecker, OnlineMap, has_hadamard, split
from qcompile.passes.learn.freedoms import Parameters, Tensor
from qcompile.passes.learn.stiefel import nearest_orthogonal
from qcompile.passes.spaces.groups import random_orthogonal


class Mixing(ABC):
    """``T`` of one activation."""

    def __init__(self) -> None:
        self.parameters = Parameters()

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``L, R, L^-1, R^-1``."""

    @abstractmethod
    def final(self) -> OnlineMap:
        """The operator, in float64."""

    def forward(self, x: Tensor) -> Tensor:
        """``x T`` of ``(..., K)``."""
        left, right, _, _ = self.factors()
        blocks = x.reshape(*x.shape[:-1], -1, len(left), len(right))
        return (left.T @ (blocks @ right)).reshape(x.shape)

    def inverse(self, weight: Tensor) -> Tensor:
        """``T^-1 W`` of ``(K, N)``."""
        _, _, left, right = self.factors()
        blocks = weight.reshape(-1, len(left), len(right), weight.shape[1])
        return torch.einsum("ia,xabn->xibn", left, torch.einsum("jb,xabn->xajn", right, blocks)).reshape(weight.shape)


class FixedHadamard(Mixing):
    """Hadamard blocks of one order."""

    def __init__(self, order: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.map = Hadamard(order, width)
        a, b = split(order)
        self.left, self.right = (
            torch.as_tensor(hadamard_matrix(n), dtype=like.dtype, device=like.device) for n in (a, b)
        )

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.left, self.right, self.left.T, self.right.T

    def final(self) -> OnlineMap:
        return self.map


class LearnedKronecker(Mixing):
    """Two learned factors, Hadamard matrices at first where they are known, else random orthogonal ones.

    Args:
        sizes: of L and R; their product divides the width.
        scaled: whether the singular values are learned, or stay at 1 (an orthogonal product).
    """

    def __init__(self, sizes: tuple[int, int], rng: np.random.Generator, like: Tensor, *, scaled: bool = True) -> None:
        super().__init__()
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for size in sizes:
            start = hadamard_matrix(size) if has_hadamard(size) else random_orthogonal(size, rng)
            start = start * rng.choice([-1.0, 1.0], size)
            u, v, s = (
                torch.as_tensor(a, dtype=like.dtype, device=like.device).clone().requires_grad_()
                for a in (start, np.eye(size), np.zeros(size))
            )
            self.parts.append((u, s, v))
            self.parameters.orthogonal += [u, v] if scaled else [u]
            if scaled:
                self.parameters.free.append(s)
        self.scaled = scaled

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        forward = [u * torch.exp(s) @ v for u, s, v in self.parts]
        backward = [v.T * torch.exp(-s) @ u.T for u, s, v in self.parts]
        return forward[0], forward[1], backward[0], backward[1]

    def final(self) -> OnlineMap:
        left, right = (
            (nearest_orthogonal(u) * torch.exp(s.detach().cpu().double()) @ nearest_orthogonal(v)).numpy()
            for u, s, v in self.parts
        )
        return Kronecker(left, right)


def balanced(width: int) -> tuple[int, int]:
    """The two factors of ``width`` that are nearest to each other, the smaller one first."""
    a = next(a for a in range(int(width**0.5), 0, -1) if width % a == 0)
    return a, width // a
