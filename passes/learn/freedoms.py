"""What can be learned about an element: matrices of cells and scales of channels, as torch parameters.

    Rotation   A = R                 R orthogonal, on the Stiefel manifold; with the ones vector fixed where the group says so
    Scales     A = diag(exp(s))      any positive diagonal
    Linear     A = U diag(exp(s)) V  invertible by construction, for cells that admit GL(k)
    Dominant   A = diag(exp(s)) (I + M o E)  near-diagonal; the mask M opens from the diagonal outwards (AffineQuant)

A `Freedom` writes its part of an `Element` twice: as torch tensors that carry gradients (`learned`), and as float64
numpy arrays (`final`) through the same checks that every other ask passes (`spaces.request`). Parts of one cell multiply
in the order in which the freedoms are listed, the last one acting last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qcompile.passes.learn.stiefel import nearest_orthogonal
from qcompile.passes.spaces import Element, Space, Spaces
from qcompile.passes.spaces.groups import BlockGroup, Limit, ones_complement
from qcompile.passes.spaces.request import mix, scale

Tensor = torch.Tensor


@dataclass
class Parameters:
    """Tensors of one freedom, by how they move.

    Attributes:
        orthogonal: on the Stiefel manifold, ``(..., n, n)``.
        free: in a vector space.
    """

    orthogonal: list[Tensor] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)

    def all(self) -> list[Tensor]:
        """Every tensor."""
        return [*self.orthogonal, *self.free]


class Freedom(ABC):
    """A learned part of an element, on one space.

    Attributes:
        steady: whether every step does the same computations, so that one may be recorded and replayed.
    """

    steady = True

    def __init__(self, spaces: Spaces, space: Space) -> None:
        self.spaces, self.space = spaces, space
        self.parameters = Parameters()

    @abstractmethod
    def learned(self, element: Element) -> None:
        """Add this part to ``element`` as differentiable tensors."""

    @abstractmethod
    def final(self, spaces: Spaces, element: Element) -> None:
        """Add this part to ``element`` in float64 numpy."""

    def progress(self, fraction: float) -> None:
        """Called with the finished fraction of the training before every step; most do not care."""
        return None

    @cached_property
    def _cells(self) -> list[tuple[int, np.ndarray]]:
        """For every cell: its key in the solution and the place of its members in the key's order."""
        found = []
        for cell in range(int(self.space.cells.max()) + 1):
            members = self.space.classes[self.space.cells == cell]
            key = int(self.spaces.solution.cell_of[members[0]])
            found.append((key, np.searchsorted(members, self.spaces.solution.cells[key])))
        return found

    @cached_property
    def _reorder(self) -> Tensor | None:
        """``(cells, k)`` places of `_cells`; None if all are in order already."""
        orders = np.stack([order for _, order in self._cells])
        if (orders == np.arange(orders.shape[1])).all():
            return None
        return torch.as_tensor(orders, device=self.parameters.all()[0].device)

    def _multiply(self, element: Element, matrices: Tensor, duals: Tensor) -> None:
        """Put ``(cells, k, k)`` matrices A, of which A^-T is known, in front of what the element does to the cells."""
        for part, known in ((element.blocks, matrices), (element.duals, duals)):
            if self._reorder is not None:
                at = torch.arange(len(known), device=known.device)[:, None, None]
                known = known[at, self._reorder[:, :, None], self._reorder[:, None, :]]
            for (key, _), matrix in zip(self._cells, known):
                part[key] = matrix @ part[key] if key in part else matrix


def _parameter(array: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(array, dtype=like.dtype, device=like.device).clone().requires_grad_()


class Rotation(Freedom):
    """An orthogonal matrix per cell of a space that mixes.

    Args:
        start: ``(cells, k, k)``, the matrices to begin with; all cells have one size.
        like: dtype and device to learn with.
    """

    def __init__(self, spaces: Spaces, space: Space, start: np.ndarray, like: Tensor) -> None:
        super().__init__(spaces, space)
        size = start.shape[-1]
        self.basis: np.ndarray | None = None
        if space.limit & Limit.FIX_ONES:
            self.basis = ones_complement(size)
            start = self.basis.T @ start @ self.basis
            self._basis = torch.as_tensor(self.basis, dtype=like.dtype, device=like.device)
        self.matrix = _parameter(start, like)
        self.parameters = Parameters(orthogonal=[self.matrix])

    def learned(self, element: Element) -> None:
        whole = self._whole(self.matrix)
        self._multiply(element, whole, whole)

    def final(self, spaces: Spaces, element: Element) -> None:
        for cell, matrix in enumerate(self._whole(nearest_orthogonal(self.matrix)).numpy()):
            mix(spaces, element, self.space, cell, matrix)

    def _whole(self, matrix: Tensor) -> Tensor:
        if self.basis is None:
            return matrix
        basis = self._basis.to(matrix)
        return 1 / len(basis) + basis @ matrix @ basis.T


class Scales(Freedom):
    """A positive factor per channel of a space that admits scales; spaces tied to it move along."""

    def __init__(self, spaces: Spaces, space: Space, start: np.ndarray, like: Tensor) -> None:
        """``start``: ``(size,)`` positive factors to begin with."""
        super().__init__(spaces, space)
        self.log = _parameter(np.log(start), like)
        self.parameters = Parameters(free=[self.log])
        self.order = torch.as_tensor(np.argsort(space.cells, kind="stable"), device=like.device)
        if space.scalable:
            self._family(like)

    def _family(self, like: Tensor) -> None:
        """The completion of least norm, as `request.scale` chooses it, as a matrix from columns to columns."""
        solution = self.spaces.solution
        family = solution.families[self.space.family]
        columns = list(self.space.columns)
        completion = np.linalg.pinv(family.logs[columns]).T @ family.logs.T
        place = {column: k for k, column in enumerate(columns)}
        at = np.array([place[c] for c in solution.column_of[self.space.classes].tolist()])
        rows = solution.row_of[self.space.classes]
        self.completion = torch.as_tensor(completion, dtype=like.dtype, device=like.device)
        self.place = torch.as_tensor(rows * len(columns) + at, device=like.device)
        self.shape = (len(family.classes), len(columns))
        self.classes = torch.as_tensor(family.classes.reshape(-1), device=like.device)

    def learned(self, element: Element) -> None:
        if not self.space.scalable:
            cells = int(self.space.cells.max()) + 1
            log = self.log[self.order].reshape(cells, -1)
            self._multiply(element, torch.diag_embed(torch.exp(log)), torch.diag_embed(torch.exp(-log)))
            return
        wanted = self.log.new_zeros(self.shape[0] * self.shape[1]).index_put((self.place,), self.log)
        change = (wanted.reshape(self.shape) @ self.completion).reshape(-1)
        before = element.log
        log = before if isinstance(before, torch.Tensor) else self.log.new_zeros(len(before))
        element.log = log.index_add(0, self.classes, change)

    def final(self, spaces: Spaces, element: Element) -> None:
        scale(spaces, element, self.space, np.exp(self.log.detach().cpu().double().numpy()))


class Linear(Freedom):
    """An invertible matrix per cell of a space that admits GL(k), by its singular value decomposition."""

    def __init__(self, spaces: Spaces, space: Space, start: np.ndarray, like: Tensor) -> None:
        """``start``: ``(cells, k, k)`` invertible matrices to begin with."""
        super().__init__(spaces, space)
        u, s, v = np.linalg.svd(start)
        self.left, self.right, self.log = _parameter(u, like), _parameter(v, like), _parameter(np.log(s), like)
        self.parameters = Parameters(orthogonal=[self.left, self.right], free=[self.log])

    def learned(self, element: Element) -> None:
        factor = torch.exp(self.log)[:, None]
        self._multiply(element, self.left * factor @ self.right, self.left / factor @ self.right)

    def final(self, spaces: Spaces, element: Element) -> None:
        factor = torch.exp(self.log.detach().cpu().double())[:, None]
        matrices = nearest_orthogonal(self.left) * factor @ nearest_orthogonal(self.right)
        for cell, matrix in enumerate(matrices.numpy()):
            mix(spaces, element, self.space, cell, matrix)


class Dominant(Freedom):
    """A strictly diagonally dominant matrix per cell of a space that admits GL(k).

    Entries at distance d from the diagonal are held at zero until the training has reached the fraction d / k, and the
    off-diagonal part of each row is kept below ``share`` of its diagonal, so the matrix never comes near a singular one.
    """

    steady = False

    def __init__(self, spaces: Spaces, space: Space, start: np.ndarray, like: Tensor, share: float = 0.9) -> None:
        """``start``: ``(size,)`` positive diagonal to begin with, in the order of the space's cells."""
        super().__init__(spaces, space)
        cells = int(space.cells.max()) + 1
        order = np.argsort(space.cells, kind="stable")
        self.log = _parameter(np.log(start[order]).reshape(cells, -1), like)
        size = self.log.shape[1]
        self.rest = _parameter(np.zeros((cells, size, size)), like)
        self.share = share
        index = torch.arange(size, device=like.device)
        self.distance = (index[:, None] - index[None]).abs()
        self.reach = 1
        self.parameters = Parameters(free=[self.log, self.rest])

    def progress(self, fraction: float) -> None:
        self.reach = 1 + int(fraction * self.distance.shape[0])

    def learned(self, element: Element) -> None:
        matrices = self._matrices(self.log, self.rest)
        self._multiply(element, matrices, torch.linalg.inv(matrices).mT)

    def final(self, spaces: Spaces, element: Element) -> None:
        matrices = self._matrices(self.log.detach().cpu().double(), self.rest.detach().cpu().double())
        for cell, matrix in enumerate(matrices.numpy()):
            mix(spaces, element, self.space, cell, matrix)

    def _matrices(self, log: Tensor, rest: Tensor) -> Tensor:
        distance = self.distance.to(rest.device)
        rest = torch.where((distance > 0) & (distance <= self.reach), rest, 0.0)
        rest = rest * torch.clamp(self.share / rest.abs().sum(-1, keepdim=True).clamp_min(1e-12), max=1.0)
        identity = torch.eye(rest.shape[-1], dtype=rest.dtype, device=rest.device)
        return torch.exp(log)[..., None] * (identity + rest)


def equal_cells(space: Space) -> int:
    """Size of the cells of a space if they all have one, else 0."""
    sizes = np.unique(np.bincount(space.cells))
    return int(sizes[0]) if len(sizes) == 1 else 0


def admits_linear(space: Space) -> bool:
    """Whether every invertible matrix may act on the cells of the space."""
    return space.mixes and BlockGroup(2, space.limit).limit == Limit.NONE
