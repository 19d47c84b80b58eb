"""An element of the group of a model, and how it acts on a tensor.

    x'[c] = sum_{c' in cell(c)} M[c, c'] d[c'] x[s(c')]

with a permutation ``s`` of the classes, a diagonal ``d`` (sign and log-scale) and a matrix M per cell. A class that
follows another through a peeled scaling acts as ``D D_leader^-1 A_leader G^-1`` instead (`solve.Peel`).
Coordinates of parity -1 act contragrediently, with ``A^-T``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.solve import Solution


@dataclass
class Element:
    """One element of the whole model's group; the identity when created by `identity`.

    Attributes:
        solution: the solved analysis it belongs to.
        log: log of the positive diagonal, per class.
        sign: +1 or -1 per class.
        source: the class whose content each class receives.
        blocks: matrices of cells, ``(k, k)`` float64, in the order of ``solution.cells[cell]``.
    """

    solution: Solution
    log: np.ndarray
    sign: np.ndarray
    source: np.ndarray
    blocks: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def identity(cls, solution: Solution) -> Element:
        """The element that changes nothing."""
        n = len(solution.cell_of)
        return cls(solution, np.zeros(n), np.ones(n), np.arange(n))

    @classmethod
    def random(cls, solution: Solution, rng: np.random.Generator) -> Element:
        """Every freedom of the model at once: matrices, diagonals, signs and permutations."""
        e = cls.identity(solution)
        for cell in solution.cells:
            group = solution.block(cell)
            if group.mixes or group.scalable:
                e.blocks[cell] = group.random(rng)
        for family in solution.families:
            n = len(family.classes)
            if family.logs.shape[1]:
                free = rng.uniform(-0.5, 0.5, (n, family.logs.shape[1]))
                # Keep products of many free scales within the range of a double.
                logs = free @ family.logs.T
                e.log[family.classes] = logs / max(1.0, np.abs(logs).max())
            if family.signs.shape[1]:
                bits = rng.integers(0, 2, (n, family.signs.shape[1])) @ family.signs.T.astype(np.int64)
                e.sign[family.classes] = 1 - 2 * (bits % 2)
            for orbit in np.unique(family.orbit[family.orbit >= 0]):
                rows = np.flatnonzero(family.orbit == orbit)
                e.source[family.classes[rows]] = family.classes[rng.permutation(rows)]
        for units in solution.unit_orbits:
            e.source[units] = e.source[units[rng.permutation(len(units))]]
        return e

    @property
    def diagonal(self) -> np.ndarray:
        """Signed scale per class."""
        return self.sign * np.exp(self.log)


@dataclass(frozen=True)
class MixedCell:
    """Channels that an element mixes.

    Attributes:
        classes: in matrix order.
        matrix: ``A``; positions of parity +1 act as ``x' = A x[source]``.
        dual: ``A^-T``, for parity -1.
    """

    classes: np.ndarray
    matrix: np.ndarray
    dual: np.ndarray


class Actor:
    """Applies an element to tensors."""

    def __init__(self, element: Element, gamma: Callable[[np.ndarray], np.ndarray]) -> None:
        """``gamma`` returns the current values of the constants at the given coordinates."""
        self.element, self.solution = element, element.solution
        count = len(element.source)
        self.moved = element.source != np.arange(count)
        self.diagonal = element.diagonal
        self.cells: list[MixedCell] = []
        self.cell_of = np.full(count, -1)
        for cell, matrix in element.blocks.items():
            self._add(self.solution.cells[cell], matrix)
        progress = True
        while progress:
            progress = False
            for number, peel in self.solution.peels.items():
                if ((self.cell_of[peel.leader] >= 0) & (self.cell_of[peel.follower] < 0)).any():
                    self._follow(number, gamma)
                    progress = True

    def _add(self, classes: np.ndarray, matrix: np.ndarray) -> None:
        self.cell_of[classes] = len(self.cells)
        self.cells.append(MixedCell(classes, matrix, np.linalg.inv(matrix).T))

    def _follow(self, number: int, gamma: Callable[[np.ndarray], np.ndarray]) -> None:
        """``A_f = D_f D_l^-1 A_l G^-1`` (or ``.. G``), G read where the content comes from."""
        peel = self.solution.peels[number]
        old = np.ones(len(peel.follower)) if peel.scaling.gamma is None else gamma(peel.scaling.gamma)
        # G is a property of the class, so repeated entries agree.
        by_class = dict(zip(peel.follower.tolist(), old.tolist()))
        partner = dict(zip(peel.leader.tolist(), peel.follower.tolist()))
        for index in np.unique(self.cell_of[peel.leader]):
            if index < 0:
                continue
            leader = self.cells[index]
            if not all(k in partner for k in leader.classes.tolist()):
                raise AssertionError(f"scaling {peel.scaling.node!r} sees a part of a cell only")
            classes = np.array([partner[k] for k in leader.classes.tolist()])
            if (self.cell_of[classes] >= 0).all():
                continue
            source = self.element.source[classes]
            g = np.array([by_class.get(k, 1.0) for k in source.tolist()])
            matrix = leader.matrix
            if peel.scaling.normalised:
                matrix = matrix / scale_of(matrix)
            own = self.diagonal[classes] / self.diagonal[leader.classes]
            matrix = own[:, None] * matrix * (1 / g if peel.forward else g)
            self._add(classes, matrix)

    def touches(self, index_map: IndexMap) -> bool:
        """Whether the element changes anything along this map."""
        c = self.solution.class_of[index_map.flat]
        return bool(self.moved[c].any() or (self.diagonal[c] != 1).any() or (self.cell_of[c] >= 0).any())

    def transform(self, array: np.ndarray, maps: Sequence[IndexMap]) -> np.ndarray:
        """Return ``array`` (float64) with all its channels transformed.

        Permutations come first. Maps that share an axis (heads or groups of both sides of a weight) permute it
        together, so what one of them has moved is not moved again by the next.
        """
        maps = [m for m in maps if self.touches(m)]
        where = [m.table for m in maps]
        for i, m in enumerate(maps):
            wanted = self.element.source[self.solution.class_of[m.flat]]
            held = self.solution.class_of[where[i].reshape(-1)]
            if np.array_equal(wanted, held):
                continue
            source = source_rows(held, wanted, self.solution.parity[m.flat])
            array = _along(array, m, lambda rows, source=source: rows[source])
            for j in range(len(maps)):
                shared = [a for a in maps[j].axes if a in m.axes]
                if j != i and shared:
                    where[j] = _move_shared(where[j], m, source, shared)
        for m in maps:
            array = _along(array, m, lambda rows, m=m: self._mix(rows, m.flat))
        return array

    def _mix(self, rows: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
        """Diagonals and matrices along the first axis."""
        classes, parity = self.solution.class_of[coordinates], self.solution.parity[coordinates]
        single = self.cell_of[classes] < 0
        factor = np.where(single, self.diagonal[classes], 1.0) ** parity
        result = rows * factor[:, None]
        if single.all():
            return result
        copy = occurrence(classes, parity)
        for index in np.unique(self.cell_of[classes[~single]]):
            cell = self.cells[index]
            inside = np.flatnonzero(self.cell_of[classes] == index)
            place = np.argsort(cell.classes)[np.searchsorted(np.sort(cell.classes), classes[inside])]
            order = inside[np.lexsort((place, copy[inside], parity[inside]))].reshape(-1, len(cell.classes))
            for positions in order:
                matrix = cell.matrix if parity[positions[0]] > 0 else cell.dual
                result[positions] = matrix @ rows[positions]
        return result


def _along(array: np.ndarray, m: IndexMap, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a function of ``(channels, rest)`` along the axes of a map."""
    axes = m.axes
    front = np.moveaxis(array, axes, range(len(axes)))
    rows = function(front.reshape(m.size, -1))
    return np.moveaxis(rows.reshape(front.shape), range(len(axes)), axes)


def _move_shared(table: np.ndarray, m: IndexMap, source: np.ndarray, shared: Sequence[int]) -> np.ndarray:
    """Move another map's table the way ``source`` (rows of ``m``) moves the axes that both have."""
    sizes = [m.table.shape[a] for a in m.axes]
    grid = np.stack(np.unravel_index(source, sizes)).reshape(len(sizes), *sizes)
    at = tuple(slice(None) if a in shared else 0 for a in m.axes)
    moved = [grid[k][at].reshape(-1) for k, a in enumerate(m.axes) if a in shared]
    axes = [a for a in m.axes if a in shared]
    front = np.moveaxis(table, axes, range(len(axes)))
    lead = front.shape[: len(axes)]
    rows = front.reshape(int(np.prod(lead)), -1)[np.ravel_multi_index(moved, lead)]
    return np.moveaxis(rows.reshape(front.shape), range(len(axes)), axes)


def occurrence(classes: np.ndarray, parity: np.ndarray) -> np.ndarray:
    """For each position, how many earlier positions have the same class and parity (which copy it is)."""
    key = classes * 2 + (parity > 0)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(key) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(key)])
    result = np.empty(len(key), np.int64)
    result[order] = np.arange(len(key)) - np.repeat(starts, lengths)
    return result


def source_rows(held: np.ndarray, wanted: np.ndarray, parity: np.ndarray) -> np.ndarray:
    """Row that holds the content each row wants: the same copy of the wanted class."""
    here = np.lexsort((occurrence(held, parity), parity, held))
    there = np.lexsort((occurrence(wanted, parity), parity, wanted))
    if not np.array_equal(held[here], wanted[there]):
        raise AssertionError("a permutation moves channels out of a tensor")
    result = np.empty(len(held), np.int64)
    result[there] = here
    return result


def scale_of(matrix: np.ndarray) -> float:
    """c of a matrix c Q with orthogonal Q."""
    return float(np.sqrt((matrix * matrix).sum() / len(matrix)))
