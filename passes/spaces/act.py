"""How an element acts on tensors.

    weights  W' = A_out W A_in^-1        vectors  v' = A v

Permutations act first, then the diagonals of channels that do not mix, then the matrices of those that do. What
follows a mixed space through a peeled scaling is mixed as well, by ``D_f D_l^-1 A_l G^-1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from qcompile.passes.spaces.element import Array, Element
from qcompile.passes.spaces.index_map import IndexMap


@dataclass(frozen=True)
class MixedCell:
    """Channels that an element mixes.

    Attributes:
        classes: in matrix order.
        matrix: ``A``; positions of parity +1 act as ``x' = A x[source]``.
        dual: ``A^-T``, for parity -1.
    """

    classes: np.ndarray
    matrix: Array
    dual: Array


@dataclass(frozen=True)
class Plan:
    """How an element acts along one axis, whatever its numbers are.

    Attributes:
        classes: of each position.
        exponent, sign: ``(n,)``, of the diagonal at positions that only scale (0 and 1 elsewhere); None if none does.
        mixed: number of a cell, its positions in matrix order, and whether they act contragrediently.
        whole: whether the mixed positions, one cell after the other, are all positions in order.
    """

    classes: Array
    exponent: Array | None
    sign: Array | None
    mixed: tuple[tuple[int, Array | slice, bool], ...]
    whole: bool


@dataclass
class Plans:
    """What elements that differ in their numbers only have in common, kept from one to the next.

    Attributes:
        axes: plans by the coordinates along an axis.
        follows: classes that follow a cell, the cell's own, and G, by number of the scaling and of the cell.
        fixed: arrays that are the same for all of them, on the device, by what they are.
    """

    axes: dict[bytes, Plan] = field(default_factory=dict)
    follows: dict[tuple[int, int], tuple[np.ndarray, Array, Array, Array]] = field(default_factory=dict)
    fixed: dict[str | bytes, Array] = field(default_factory=dict)


class Actor:
    """Applies an element to tensors, in numpy or (for a learned element) in torch."""

    def __init__(
        self,
        element: Element,
        gamma: Callable[[np.ndarray], np.ndarray],
        plans: Plans | None = None,
    ) -> None:
        """Prepare to act.

        Args:
            element: what acts.
            gamma: returns the current values of the constants at the given coordinates.
            plans: to share between elements that differ in their numbers only.
        """
        self.element, self.solution = element, element.solution
        self.plans = Plans() if plans is None else plans
        count = len(element.source)
        self.moved = element.source != np.arange(count)
        learned = [a for a in (element.log, *element.blocks.values()) if _is_torch(a)]
        self.xp: Any = _torch() if learned else np
        self._like: Any = learned[0] if learned else None
        self.log = self._array(element.log) if _is_torch(element.log) else self._fixed("log", element.log)
        self.sign = self._fixed("sign", element.sign)
        # Everything of a learned diagonal counts as moving, even where it is 1 now.
        self.scaled = np.full(count, True) if _is_torch(element.log) else (element.log != 0) | (element.sign != 1)
        self.cells: list[MixedCell] = []
        self.cell_of = np.full(count, -1)
        for cell, matrix in element.blocks.items():
            dual = element.duals.get(cell)
            self._add(self.solution.cells[cell], self._array(matrix), None if dual is None else self._array(dual))
        progress = True
        while progress:
            progress = False
            for number, peel in self.solution.peels.items():
                if ((self.cell_of[peel.leader] >= 0) & (self.cell_of[peel.follower] < 0)).any():
                    self._follow(number, gamma)
                    progress = True

    def _add(self, classes: np.ndarray, matrix: Array, dual: Array | None = None) -> None:
        self.cell_of[classes] = len(self.cells)
        self.cells.append(MixedCell(classes, matrix, self.xp.linalg.inv(matrix).T if dual is None else dual))

    def _array(self, values: Array) -> Array:
        """``values`` as an array of the kind this actor computes with."""
        if self._like is None:
            return np.asarray(values, np.float64)
        return self.xp.as_tensor(values, dtype=self._like.dtype, device=self._like.device)

    def _fixed(self, key: str | bytes, values: np.ndarray) -> Array:
        """The same for numbers that do not change while an element is learned: copied to the device once."""
        if self._like is None:
            return self._array(values)
        if key not in self.plans.fixed:
            kept = values if values.dtype == bool else np.asarray(values, np.float64)
            dtype = None if kept.dtype == bool else self._like.dtype
            self.plans.fixed[key] = self.xp.as_tensor(kept, dtype=dtype, device=self._like.device)
        return self.plans.fixed[key]

    def _index(self, positions: np.ndarray) -> Array | slice:
        """Positions as an index; a slice if they are consecutive."""
        if len(positions) and np.array_equal(positions, np.arange(len(positions)) + positions[0]):
            return slice(int(positions[0]), int(positions[0]) + len(positions))
        return positions if self._like is None else self.xp.as_tensor(positions, device=self._like.device)

    def diagonal(self, classes: Array) -> Array:
        """Signed scale of classes."""
        return self.sign[classes] * self.xp.exp(self.log[classes])

    def _follow(self, number: int, gamma: Callable[[np.ndarray], np.ndarray]) -> None:
        """``A_f = D_f D_l^-1 A_l G^-1`` (or ``.. G``), G read where the content comes from."""
        peel = self.solution.peels[number]
        for index in np.unique(self.cell_of[peel.leader]):
            if index < 0:
                continue
            leader = self.cells[index]
            if (number, int(index)) not in self.plans.follows:
                self.plans.follows[number, int(index)] = self._follower(number, leader, gamma)
            classes, follower, leading, g = self.plans.follows[number, int(index)]
            if (self.cell_of[classes] >= 0).all():
                continue
            matrix, dual = leader.matrix, leader.dual
            if peel.scaling.normalised:
                size = scale_of(matrix)
                matrix, dual = matrix / size, dual * size
            own = (self.diagonal(follower) / self.diagonal(leading))[:, None]
            self._add(classes, own * matrix / g, dual * g / own)

    def _follower(
        self, number: int, leader: MixedCell, gamma: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, Array, Array, Array]:
        """Classes that follow a cell, they and the cell's as indices, and G (inverse if the leader follows forward)."""
        peel = self.solution.peels[number]
        old = np.ones(len(peel.follower)) if peel.scaling.gamma is None else gamma(peel.scaling.gamma)
        # G is a property of the class, so repeated entries agree.
        by_class = dict(zip(peel.follower.tolist(), old.tolist()))
        partner = dict(zip(peel.leader.tolist(), peel.follower.tolist()))
        if not all(k in partner for k in leader.classes.tolist()):
            raise AssertionError(f"scaling {peel.scaling.node!r} sees a part of a cell only")
        classes = np.array([partner[k] for k in leader.classes.tolist()])
        g = np.array([by_class.get(k, 1.0) for k in self.element.source[classes].tolist()])
        return classes, self._index(classes), self._index(leader.classes), self._array(g if peel.forward else 1 / g)

    def touches(self, index_map: IndexMap) -> bool:
        """Whether the element changes anything along this map."""
        c = self.solution.class_of[index_map.flat]
        return bool(self.moved[c].any() or self.scaled[c].any() or (self.cell_of[c] >= 0).any())

    def transform(self, array: Array, maps: Sequence[IndexMap], overwritten: np.ndarray | None = None) -> Array:
        """Return ``array`` with all its channels transformed; ``overwritten`` entries of a vector count as 1 before.

        Permutations come first. Maps that share an axis (heads or groups of both sides of a weight) permute it
        together, so what one of them has moved is not moved again by the next.
        """
        if overwritten is not None:
            mask = overwritten.reshape(tuple(array.shape))
            mask = mask if self.xp is np else self._fixed(mask.tobytes() + bytes(str(mask.shape), "ascii"), mask)
            array = self.xp.where(mask, self.xp.ones_like(array), array)
        maps = [m for m in maps if self.touches(m)]
        where = [m.table for m in maps]
        for i, m in enumerate(maps):
            wanted = self.element.source[self.solution.class_of[m.flat]]
            held = self.solution.class_of[where[i].reshape(-1)]
            if np.array_equal(wanted, held):
                continue
            source = source_rows(held, wanted, self.solution.parity[m.flat])
            array = self._along(array, m, itemgetter(source))
            for j in range(len(maps)):
                shared = [a for a in maps[j].axes if a in m.axes]
                if j != i and shared:
                    where[j] = _move_shared(where[j], m, source, shared)
        for m in maps:
            array = self._along(array, m, partial(self._mix, coordinates=m.flat))
        return array

    def _along(self, array: Array, m: IndexMap, function: Callable[[Array], Array]) -> Array:
        """Apply a function of ``(channels, rest)`` along the axes of a map."""
        axes = m.axes
        front = self.xp.moveaxis(array, axes, tuple(range(len(axes))))
        rows = function(front.reshape(m.size, -1))
        return self.xp.moveaxis(rows.reshape(tuple(front.shape)), tuple(range(len(axes))), axes)

    def _plan(self, coordinates: np.ndarray) -> Plan:
        key = coordinates.tobytes()
        if key in self.plans.axes:
            return self.plans.axes[key]
        classes, parity = self.solution.class_of[coordinates], self.solution.parity[coordinates]
        single = self.cell_of[classes] < 0
        active = single & self.scaled[classes]
        exponent = self._array(np.where(active, parity, 0)) if active.any() else None
        sign = self._array(np.where(active, self.element.sign[classes], 1.0)) if active.any() else None
        copy = occurrence(classes, parity)
        mixed: list[tuple[int, np.ndarray, bool]] = []
        for index in np.unique(self.cell_of[classes[~single]]):
            cell = self.cells[index]
            inside = np.flatnonzero(self.cell_of[classes] == index)
            place = np.argsort(cell.classes)[np.searchsorted(np.sort(cell.classes), classes[inside])]
            order = inside[np.lexsort((place, copy[inside], parity[inside]))].reshape(-1, len(cell.classes))
            mixed += [(int(index), positions, bool(parity[positions[0]] < 0)) for positions in order]
        mixed.sort(key=lambda part: int(part[1][0]))
        whole = bool(mixed) and np.array_equal(np.concatenate([p for _, p, _ in mixed]), np.arange(len(classes)))
        self.plans.axes[key] = Plan(
            self._index(classes), exponent, sign, tuple((i, self._index(p), dual) for i, p, dual in mixed), whole
        )
        return self.plans.axes[key]

    def _mix(self, rows: Array, coordinates: np.ndarray) -> Array:
        """Diagonals and matrices along the first axis."""
        plan = self._plan(coordinates)
        matrices = [self.cells[i].dual if dual else self.cells[i].matrix for i, _, dual in plan.mixed]
        parts = [matrix @ rows[positions] for matrix, (_, positions, _) in zip(matrices, plan.mixed)]
        if plan.whole:
            return parts[0] if len(parts) == 1 else self.xp.concatenate(parts)
        result = rows
        if plan.exponent is not None:
            result = rows * (plan.sign * self.xp.exp(self.log[plan.classes] * plan.exponent))[:, None]
        if result is rows and parts:
            result = rows.copy() if self.xp is np else rows.clone()
        for part, (_, positions, _) in zip(parts, plan.mixed):
            result[positions] = part
        return result


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


def scale_of(matrix: Array) -> Array:
    """c of a matrix c Q with orthogonal Q."""
    return ((matrix * matrix).sum() / len(matrix)) ** 0.5


def _is_torch(array: Array) -> bool:
    return type(array).__module__.startswith("torch")


def _torch() -> Any:
    import torch

    return torch
