"""An element of the group of a model.

    x'[c] = sum_{c' in cell(c)} M[c, c'] d[c'] x[s(c')]

with a permutation ``s`` of the classes, a diagonal ``d`` (sign and log-scale) and a matrix M per cell. A class that
follows another through a peeled scaling acts as ``D D_leader^-1 A_leader G^-1`` instead (`solve.Peel`).
Coordinates of parity -1 act contragrediently, with ``A^-T``. How an element acts on tensors is in `act.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.passes.spaces.solve import Solution

Array = Any
"""numpy array, or torch tensor while an element is being learned."""


@dataclass
class Element:
    """One element of the whole model's group; the identity when created by `identity`.

    Attributes:
        solution: the solved analysis it belongs to.
        log: log of the positive diagonal, per class.
        sign: +1 or -1 per class.
        source: the class whose content each class receives.
        blocks: matrices of cells, ``(k, k)`` float64, in the order of ``solution.cells[cell]``.
        duals: ``A^-T`` of blocks, where whoever made the block knows it; else it is computed.

    While an element is learned, ``log`` and the blocks are torch tensors; the rest is fixed.
    """

    solution: Solution
    log: Array
    sign: np.ndarray
    source: np.ndarray
    blocks: dict[int, Array] = field(default_factory=dict)
    duals: dict[int, Array] = field(default_factory=dict)

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
