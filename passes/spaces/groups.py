"""What may act on a channel space without changing the function, and how such permissions intersect.

An element acts on the channels ``x`` of a space as ``x' = M P x``: a permutation P, then a matrix M that is block
diagonal over the *cells* of the space. Permutations, positive diagonals and O(n) are not nested, so a permission is not
a rank in a chain but a set of independent restrictions on the block M of one cell (all true for GL(k), the free one):

    ORTHOGONAL   M^T M = c^2 I                    normalisation by a quadratic mean
    FIX_ONES     M 1 = c 1, M^T 1 = c 1           the mean is subtracted first
    PLANE        M = c R(phi)                     a pair of channels rotated by a position
    SCALAR       M = c I, c > 0                   anything else that is linear on positive multiples
    RIGID        c = 1                            the scale c is visible to the operator
    COMMON       one c for all channels of the operator's own block

``meet`` is the union of the restrictions, and a cell is refined to the common refinement of the cells of all uses. A
restriction keeps its meaning on a sub-block: the sub-blocks of an orthogonal block diagonal matrix are orthogonal, of
one that fixes the ones vector fix the shorter ones vector, and so on. What a sub-block may lose is the common factor c;
the solver checks that (see `solve.py`).

On a single channel these become the groups of the literature:

    no restriction                 GL(1) = R*          PReLU-free multiplication, linear operators
    SCALAR                         R+                  ReLU, max-pool
    ORTHOGONAL, RIGID              {+1, -1}            odd functions, RMSNorm with fixed gamma
    SCALAR, RIGID                  1                   SiLU, GELU, anything else
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np


class Limit(IntFlag):
    """Restrictions on the block of one cell. The empty set is GL(k)."""

    NONE = 0
    ORTHOGONAL = 1
    FIX_ONES = 2
    PLANE = 4
    SCALAR = 8
    RIGID = 16
    COMMON = 32


GL = Limit.NONE
"""Any invertible matrix."""
SCALED_ORTHOGONAL = Limit.ORTHOGONAL | Limit.COMMON
"""R+ . O(k): an operator that sees the space through its quadratic mean and is told the scale."""
ORTHOGONAL = Limit.ORTHOGONAL | Limit.RIGID
"""O(k)."""
SCALED_CENTRED = Limit.ORTHOGONAL | Limit.FIX_ONES | Limit.COMMON
"""R+ . {Q in O(k): Q 1 = 1}: the same behind a subtraction of the mean."""
CENTRED = Limit.ORTHOGONAL | Limit.FIX_ONES | Limit.RIGID
"""{Q in O(k): Q 1 = 1}."""
PLANE = Limit.PLANE | Limit.COMMON
"""SO(2) x R+ on a pair: the matrices that commute with all rotations of the plane."""
POSITIVE = Limit.SCALAR | Limit.COMMON
"""R+."""
FIXED = Limit.SCALAR | Limit.RIGID
"""Only permutations, which are kept separately."""


def meet(*limits: Limit) -> Limit:
    """The largest permission contained in all of ``limits``."""
    result = Limit.NONE
    for limit in limits:
        result |= limit
    return normal(result)


def normal(limit: Limit) -> Limit:
    """Drop restrictions that others imply, so that equal groups have equal flags."""
    if limit & Limit.SCALAR:
        limit &= ~(Limit.ORTHOGONAL | Limit.FIX_ONES | Limit.PLANE)
    if limit & Limit.PLANE:
        # SO(2) is orthogonal already; a rotation of the plane fixes (1, 1) only if it is the identity.
        if limit & Limit.FIX_ONES:
            return normal((limit & ~Limit.PLANE) | Limit.SCALAR)
        limit &= ~Limit.ORTHOGONAL
    if limit & Limit.RIGID:
        limit &= ~Limit.COMMON
    return limit


@dataclass(frozen=True)
class BlockGroup:
    """The group acting on one cell.

    Attributes:
        size: channels of the cell.
        limit: the restrictions.
    """

    size: int
    limit: Limit

    @property
    def scalable(self) -> bool:
        """Whether the cell may be multiplied by a positive number."""
        return not self.limit & Limit.RIGID

    @property
    def signed(self) -> bool:
        """Whether a single channel of the cell may change sign."""
        return not self.limit & (Limit.SCALAR | Limit.FIX_ONES | Limit.PLANE)

    @property
    def mixes(self) -> bool:
        """Whether elements mix the channels of the cell."""
        return self.size > 1 and not self.limit & Limit.SCALAR and not (self.limit & Limit.FIX_ONES and self.size < 3)

    @property
    def dimension(self) -> int:
        """Dimension of the group as a manifold (its Lie algebra), permutations and signs not counted."""
        k, c = self.size, int(self.scalable)
        if self.limit & Limit.SCALAR:
            return c
        if self.limit & Limit.PLANE:
            return 1 + c
        if self.limit & Limit.ORTHOGONAL:
            n = k - 1 if self.limit & Limit.FIX_ONES else k
            return n * (n - 1) // 2 + c
        return k * k if c else 0

    def __str__(self) -> str:
        k = self.size
        scale = "R+." if self.scalable else ""
        if self.limit & Limit.SCALAR:
            return "R+" if self.scalable else "1"
        if self.limit & Limit.PLANE:
            return "SO(2)xR+" if self.scalable else "SO(2)"
        if self.limit & Limit.ORTHOGONAL:
            if self.limit & Limit.FIX_ONES:
                return ("R+" if self.scalable else "1") if k == 1 else f"{scale}O({k})|1"
            if k == 1:
                return "R*" if self.scalable else "±1"
            return f"{scale}O({k})"
        return "R*" if k == 1 else f"GL({k})"

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """A well-conditioned random element, float64 ``(k, k)``."""
        k = self.size
        c = float(np.exp(rng.uniform(-0.7, 0.7))) if self.scalable else 1.0
        if self.limit & Limit.SCALAR:
            return c * np.eye(k)
        if self.limit & Limit.PLANE:
            phi = rng.uniform(0, 2 * np.pi)
            return c * np.array([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]])
        if self.limit & Limit.ORTHOGONAL:
            if self.limit & Limit.FIX_ONES:
                basis = ones_complement(k)
                return c * (np.full((k, k), 1 / k) + basis @ random_orthogonal(k - 1, rng) @ basis.T)
            return c * random_orthogonal(k, rng)
        spread = np.exp(rng.uniform(-0.5, 0.5, k))
        return random_orthogonal(k, rng) * spread @ random_orthogonal(k, rng)

    def contains(self, matrix: np.ndarray, tolerance: float = 1e-8) -> bool:
        """Whether ``matrix`` belongs to the group, to a relative tolerance."""
        k = self.size
        if matrix.shape != (k, k) or not np.isfinite(matrix).all():
            return False
        gram = matrix.T @ matrix
        c2 = float(np.trace(gram)) / k
        if c2 <= 0:
            return False
        if self.limit & Limit.RIGID and abs(c2 - 1) > tolerance:
            return False
        c = np.sqrt(c2)
        close = tolerance * max(1.0, c)
        if self.limit & Limit.SCALAR:
            return bool(np.abs(matrix - c * np.eye(k)).max() <= close)
        if self.limit & (Limit.ORTHOGONAL | Limit.PLANE) and np.abs(gram - c2 * np.eye(k)).max() > close * c:
            return False
        if self.limit & Limit.PLANE and np.linalg.det(matrix) < 0:
            return False
        if self.limit & Limit.FIX_ONES and np.abs(matrix.sum(1) - c).max() > close * np.sqrt(k):
            return False
        return (k == 1 and bool(matrix[0, 0] != 0)) or bool(np.linalg.cond(matrix) < 1e12)


def random_orthogonal(k: int, rng: np.random.Generator) -> np.ndarray:
    """A Haar-random orthogonal matrix ``(k, k)`` (QR of a Gaussian matrix with the signs of R fixed)."""
    q, r = np.linalg.qr(rng.standard_normal((k, k)))
    return q * np.sign(np.diagonal(r))


def ones_complement(k: int) -> np.ndarray:
    """An orthonormal basis ``(k, k-1)`` of the vectors whose entries sum to zero (Helmert's)."""
    basis = np.zeros((k, k - 1))
    for j in range(1, k):
        basis[:j, j - 1] = 1
        basis[j, j - 1] = -j
        basis[:, j - 1] /= np.sqrt(j * (j + 1))
    return basis
