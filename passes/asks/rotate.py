"""Rotations folded into the weights: the residual stream and the values of every head.

    x' = Q x  with Q = H diag(+-1) orthogonal,  W_in' = Q W_in,  W_out' = W_out Q^T

An outlier channel is spread over all channels, so the range of a token shrinks from the size of its outlier to a few
standard deviations. Q goes wherever the analysis finds orthogonal matrices admitted and some quantized operator reads
the result; norm gammas are peeled into the readers by the engine. Behind a LayerNorm the ones vector is kept in place:
Q = H diag(1, +-1, ...) H^T with the first column of H proportional to ones.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.hadamard import hadamard_matrix
from qcompile.passes.asks.base import Ask, Context
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.groups import BlockGroup, Limit, ones_complement, random_orthogonal
from qcompile.passes.spaces.request import mix


@dataclass(frozen=True)
class Rotate(Ask):
    """Random rotations of every space that admits them and matters to a quantized reader.

    Attributes:
        kind: "hadamard" (entries of equal size; a random orthogonal matrix where no Hadamard matrix of that order is
            known) or "orthogonal" (uniformly random).
        seed: of the signs.
    """

    kind: str = "hadamard"
    seed: int = 0

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Mix every cell of the space by its own rotation."""
        groups = space.blocks
        if not space.mixes or space.limit & Limit.PLANE:
            return None
        if not reaches_quantized(space, context):
            return None
        rng = np.random.default_rng([self.seed, space.index])
        for cell in range(int(space.cells.max()) + 1):
            size = int((space.cells == cell).sum())
            mix(context.spaces, element, space, cell, self.matrix(BlockGroup(size, space.limit), rng))
        return f"rotated by {self.kind} matrices: " + ", ".join(f"{count} x {g.size}" for count, g in groups)

    def matrix(self, group: BlockGroup, rng: np.random.Generator) -> np.ndarray:
        """A rotation in ``group``."""
        if self.kind == "hadamard":
            return random_hadamard(group.size, rng, fix_ones=bool(group.limit & Limit.FIX_ONES))
        basis = ones_complement(group.size) if group.limit & Limit.FIX_ONES else None
        if basis is None:
            return random_orthogonal(group.size, rng)
        inner = random_orthogonal(group.size - 1, rng)
        return np.full((group.size, group.size), 1 / group.size) + basis @ inner @ basis.T


def reaches_quantized(space: Space, context: Context) -> bool:
    """Whether a quantized operator reads the space, or one that follows it through a norm."""
    return any(context.readers(s) for s in context.spaces if s is space or s.leader == space.index)


def random_hadamard(size: int, rng: np.random.Generator, *, fix_ones: bool = False) -> np.ndarray:
    """A Hadamard matrix with random signs, or a random orthogonal one where none is known; maybe fixing the ones vector."""
    signs = rng.choice([-1.0, 1.0], size)
    try:
        h = hadamard_matrix(size)
    except FormatError:
        h = random_orthogonal(size, rng)
        if fix_ones:
            basis = ones_complement(size)
            return np.full((size, size), 1 / size) + basis @ random_orthogonal(size - 1, rng) @ basis.T
        return h * signs
    if not fix_ones:
        return h * signs
    # Make the first column positive, then all vectors orthogonal to it sum to zero.
    h = h * np.sign(h[:, :1])
    signs[0] = 1
    return h * signs @ h.T
