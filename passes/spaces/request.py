"""Put a wish for one space into an element, with all that must move along.

A diagonal on one space of a family forces diagonals on others (``d_out = d_gate^k d_up``). Of all completions the one
of least norm in log-scale is taken: what is not forced to move stays.
"""

from __future__ import annotations

import numpy as np

from qcompile.errors import RecipeError
from qcompile.passes.spaces.analysis import Spaces
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.groups import BlockGroup, Limit
from qcompile.passes.spaces.space import Space


def admits_diagonal(space: Space) -> bool:
    """Whether every positive diagonal may act on the space."""
    return space.scalable or (space.mixes and space.limit == Limit.NONE)


def scale(spaces: Spaces, element: Element, space: Space, factor: np.ndarray) -> None:
    """Multiply channel j of ``space`` by ``factor[j] > 0``.

    Raises:
        RecipeError: the space does not admit these factors.
    """
    factor = np.asarray(factor, np.float64)
    if factor.shape != (space.size,) or not (factor > 0).all() or not np.isfinite(factor).all():
        raise RecipeError(f"space #{space.index}: a scale needs {space.size} positive finite factors")
    solution = spaces.solution
    if not admits_diagonal(space):
        raise RecipeError(f"space #{space.index} ({space.group}) does not admit scales")
    if space.scalable:
        _scale_family(spaces, element, space, np.log(factor))
        return
    for cell in np.unique(solution.cell_of[space.classes]):
        members = solution.cells[int(cell)]
        place = np.searchsorted(space.classes, members)
        old = element.blocks.get(int(cell), np.eye(len(members)))
        element.blocks[int(cell)] = factor[place][:, None] * old


def _scale_family(spaces: Spaces, element: Element, space: Space, logs: np.ndarray) -> None:
    solution = spaces.solution
    family = solution.families[space.family]
    columns = list(space.columns)
    wanted = np.zeros((len(family.classes), len(columns)))
    place = {column: k for k, column in enumerate(columns)}
    at = np.array([place[c] for c in solution.column_of[space.classes].tolist()])
    wanted[solution.row_of[space.classes], at] = logs
    basis = family.logs[columns]
    free = wanted @ np.linalg.pinv(basis).T
    if np.abs(free @ basis.T - wanted).max() > 1e-9 * max(1.0, np.abs(wanted).max()):
        raise RecipeError(f"space #{space.index} ({space.group}): some of its scales are tied to each other")
    element.log[family.classes] += free @ family.logs.T


def mix(spaces: Spaces, element: Element, space: Space, cell: int, matrix: np.ndarray) -> None:
    """Multiply the channels of one cell (a number from ``space.cells``) by ``matrix``, after what the element does.

    Raises:
        RecipeError: the matrix does not belong to the cell's group.
    """
    members = space.classes[space.cells == cell]
    group = BlockGroup(len(members), space.limit)
    if space.leader is not None or not group.contains(matrix, 1e-6):
        raise RecipeError(f"space #{space.index}: the matrix given for block {cell} is not in {space.group}")
    key = int(spaces.solution.cell_of[members[0]])
    order = np.searchsorted(members, spaces.solution.cells[key])
    matrix = np.asarray(matrix, np.float64)[np.ix_(order, order)]
    element.blocks[key] = matrix @ element.blocks.get(key, np.eye(len(members)))


def permute(spaces: Spaces, element: Element, space: Space, source: np.ndarray) -> None:
    """Permute the family of ``space``: bundle r (see `families.py`) receives the content of bundle ``source[r]``.

    Bundle r of a space of one column is its channel r; all spaces of the family move along.

    Raises:
        RecipeError: ``source`` is not a permutation, or moves channels that may not trade places.
    """
    family = spaces.solution.families[space.family]
    source, count = np.asarray(source), len(family.classes)
    if not np.array_equal(np.sort(source), np.arange(count)):
        raise RecipeError(f"space #{space.index}: not a permutation of {count} channels")
    if (family.alike != family.alike[source]).any():
        raise RecipeError(f"space #{space.index} ({space.group}): these channels may not trade places")
    element.source[family.classes] = element.source[family.classes[source]]
