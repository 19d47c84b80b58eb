"""From constraints to the group of the whole model.

1. *Classes*: coordinates joined by ``same`` and ``dual``. Each coordinate is doubled into itself and its contragredient,
   ``same`` joins (a, b) and (a*, b*), ``dual`` joins (a, b*) and (a*, b); a class that meets its own contragredient
   obeys M = M^-T, so it is orthogonal: this is how a tied embedding comes out.
2. *Cells*: classes that every use lets mix. Each use hashes its block key into the classes it touches; equal sums of
   hashes are equal views by all uses. Restrictions of all uses are united (`groups.meet`).
3. *Scalings* ``y = g x``: either both sides are diagonal, or g is peeled into the side that nothing but linear operators
   touches (y' = G' A_x G^-1 y). Peeling is assumed first and withdrawn where the assumption fails, until nothing changes.
4. *Bundles* of classes that share one index, *families* of equal bundles, their diagonals, signs and permutations:
   see `families.py`.

Everything is vectorised over coordinates: a transformer of 32 layers has millions of them but only a few families.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from qcompile.passes.spaces.groups import BlockGroup, Limit, normal
from qcompile.passes.spaces.relations import Constraints, Scaled


@dataclass
class Family:
    """Bundles of the same make-up.

    Attributes:
        classes: ``(n, columns)``, the class of each bundle in each column.
        logs: ``(columns, free)``, basis of the log-diagonals of one bundle.
        signs: ``(columns, free)``, basis over GF(2) of the signs of one bundle.
        orbit: ``(n,)``, bundles with equal entries may be permuted; -1 where nothing may.
        alike: ``(n,)``, the same including channels that mix, whose matrices contain the permutations.
    """

    classes: np.ndarray
    logs: np.ndarray
    signs: np.ndarray
    orbit: np.ndarray
    alike: np.ndarray


@dataclass(frozen=True)
class Peel:
    """A scaling whose gamma may be moved into its neighbours.

    Attributes:
        scaling: the fact.
        follower: classes whose action is determined by the leader's.
        leader: aligned classes of the other side.
        forward: True if the follower is the output: A_f = G' A_l G^-1; otherwise A_f = G'^-1 A_l G.
    """

    scaling: Scaled
    follower: np.ndarray
    leader: np.ndarray
    forward: bool


@dataclass
class Solution:
    """The solved system; see the module text for the words.

    Attributes:
        constraints: the system.
        class_of: class of each coordinate.
        parity: +1 where the coordinate acts as its class, -1 where contragrediently.
        cell_of: cell of each class.
        limit_of: restrictions of each class.
        cells: the classes of each cell with more than one channel, in index order.
        peels: scalings that may be peeled, by their number.
        leader: for each class that follows another through a peeled scaling, the scaling's number; else -1.
        signature: hash of the set of uses of each class.
        families: bundles of the same make-up.
        family_of, row_of, column_of: place of each class in its family.
        unit_orbits: ``(units, classes per unit)`` arrays; whole units (heads, groups) of one array may be permuted.
    """

    constraints: Constraints
    class_of: np.ndarray
    parity: np.ndarray
    cell_of: np.ndarray
    limit_of: np.ndarray
    cells: dict[int, np.ndarray]
    peels: dict[int, Peel]
    leader: np.ndarray
    signature: np.ndarray
    families: list[Family] = field(default_factory=list)
    family_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    row_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    column_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unit_orbits: list[np.ndarray] = field(default_factory=list)

    def block(self, cell: int) -> BlockGroup:
        """The group of one cell."""
        members = self.cells[cell]
        return BlockGroup(len(members), Limit(int(self.limit_of[members[0]])))


def solve(constraints: Constraints) -> Solution:
    """Solve the system. Cost is linear in the coordinates touched by uses."""
    from qcompile.passes.spaces.families import add_families

    views = Views(constraints)
    peeled: list[bool | None] = [True] * len(constraints.scalings)
    while True:
        views.refine(peeled)
        if not _withdraw(views, peeled):
            break
    leader = np.full(views.count, -1)
    peels = {}
    for i, scaling in enumerate(constraints.scalings):
        if peeled[i] is not None:
            x, y = views.class_of[scaling.x], views.class_of[scaling.y]
            peels[i] = Peel(scaling, y, x, True) if peeled[i] else Peel(scaling, x, y, False)
            leader[peels[i].follower] = i
    limit = np.array([int(normal(Limit(v))) for v in range(64)])[views.limit]
    solution = Solution(
        constraints,
        views.class_of,
        views.parity,
        views.cell,
        limit,
        _cells(views, leader),
        peels,
        leader,
        views.signature,
    )
    add_families(solution, views)
    return solution


def components(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Connected components of ``0 .. count - 1`` under the given pairs."""
    if not pairs:
        return np.arange(count)
    a = np.concatenate([p for p, _ in pairs])
    b = np.concatenate([q for _, q in pairs])
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def hashed(key: np.ndarray | int, salt: int) -> np.ndarray:
    """64-bit mixing of integer keys (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(key).astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def rank(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number equal values; returns the numbers and how often each occurs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return inverse, counts


class Views:
    """What all uses say about each class.

    Attributes:
        class_of, parity, count: the classes.
        signature: hash of the set of uses and roles.
        unit, color: hashes of unit and color keys.
        limit: union of restrictions.
        cell, size: cell of each class and its number of channels (after `refine`).
    """

    def __init__(self, c: Constraints) -> None:
        self.c = c
        self._join()
        self.signature, self.unit, self.color, self._mix = (np.zeros(self.count, np.uint64) for _ in range(4))
        self._limit = np.where(self.self_dual, int(Limit.ORTHOGONAL | Limit.RIGID), 0)
        for number, use in enumerate(c.uses):
            classes = self.class_of[use.coordinates]
            np.add.at(self.signature, classes, hashed(number, 1))
            for target, keys, offset in ((self._mix, use.mix, 1), (self.unit, use.unit, 2), (self.color, use.color, 3)):
                if keys is not None:
                    np.add.at(target, classes, hashed(keys, number * 8 + offset))
            if use.limit:
                np.bitwise_or.at(self._limit, classes, int(use.limit))
        base = len(c.uses)
        for i, product in enumerate(c.products):
            for j, array in enumerate((product.out, *product.terms)):
                classes = self.class_of[array]
                np.add.at(self.signature, classes, hashed(base + i, 11 + j))
                np.add.at(self._mix, classes, hashed(np.arange(len(array)), (base + i) * 8 + 4 + j % 4))
        self._base = base + len(c.products)
        for i, scaling in enumerate(c.scalings):
            for j, array in enumerate((scaling.y, scaling.x, scaling.gamma)):
                if array is not None:
                    np.add.at(self.signature, self.class_of[array], hashed(self._base + i, 21 + j))
            if scaling.gamma is not None:
                # A constant diagonal is never mixed.
                g = self.class_of[scaling.gamma]
                np.add.at(self._mix, g, hashed(g, (self._base + i) * 8 + 4))
        self.refine([None] * len(c.scalings))

    def _join(self) -> None:
        c, n = self.c, self.c.count
        pairs = []
        for a, b, dual in c.edges:
            pairs.append((a, b + n if dual else b))
            pairs.append((a + n, b if dual else b + n))
        component = components(2 * n, pairs)
        up, down = component[:n], component[n:]
        # A class is oriented like its first coordinate that is not the summed axis of a weight: activations are +1.
        order = np.arange(n)
        for birth in c.births:
            if birth.reader:
                order[birth.start : birth.start + birth.count] += n
        _, self.class_of = np.unique(np.minimum(up, down), return_inverse=True)
        self.count = int(self.class_of.max()) + 1 if n else 0
        first = np.full(self.count, 4 * n)
        np.minimum.at(first, self.class_of, order)
        positive = np.where(first < n, up[first % n], down[first % n]) if n else up
        self.parity = np.where(up == positive[self.class_of], 1, -1).astype(np.int8)
        self.self_dual = np.zeros(self.count, bool)
        self.self_dual[self.class_of[up == down]] = True

    def refine(self, peeled: list[bool | None]) -> None:
        """Compute cells, given which scalings are peeled: True into the output, False into the input, None not."""
        c, mix = self.c, self._mix.copy()
        for i, scaling in enumerate(c.scalings):
            if peeled[i] is None:
                # Both sides are diagonal.
                for offset, array in ((1, scaling.x), (2, scaling.y)):
                    keys = hashed(np.arange(len(array)), (self._base + i) * 8 + offset)
                    np.add.at(mix, self.class_of[array], keys)
        self._rank(mix)
        while True:
            # The leader may mix only what the follower may; the follower may lead in turn.
            finer, before = mix.copy(), int(self.cell.max()) if self.count else 0
            for i, scaling in enumerate(c.scalings):
                if peeled[i] is not None:
                    x, y = self.class_of[scaling.x], self.class_of[scaling.y]
                    leader, follower = (x, y) if peeled[i] else (y, x)
                    np.add.at(finer, leader, hashed(self.cell[follower], (self._base + i) * 8 + 3))
            self._rank(finer)
            if not self.count or int(self.cell.max()) == before:
                break
        self.limit = self._limit.copy()
        self._forbid_partial_scales()

    def _rank(self, mix: np.ndarray) -> None:
        self.cell, sizes = rank(hashed(self.signature, 1) + hashed(mix, 2) + hashed(self.unit, 3))
        self.size = sizes[self.cell]

    def _forbid_partial_scales(self) -> None:
        """A common factor of an operator's block survives only if the final cell is the whole block."""
        for use in self.c.uses:
            if not use.limit & Limit.COMMON or use.limit & (Limit.RIGID | Limit.PLANE):
                # Planes cut in two keep their common factor through an equation (`families.split_planes`).
                continue
            classes = self.class_of[use.coordinates]
            if use.mix is None:
                whole = np.full(len(classes), len(np.unique(classes)))
            else:
                pairs = np.unique(np.stack([use.mix, classes]), axis=1)
                keys, counts = np.unique(pairs[0], return_counts=True)
                whole = counts[np.searchsorted(keys, use.mix)]
            self.limit[classes[self.size[classes] != whole]] |= int(Limit.RIGID)


def _withdraw(views: Views, peeled: list[bool | None]) -> bool:
    """Check every assumed peeling; returns whether one had to be changed.

    A follower's action is dictated by its leader, so it must bear any matrix (no restriction on a cell of several
    channels) and have one leader only; a chain of leaders must end.
    """
    c, class_of = views.c, views.class_of
    changed = False
    leaders: dict[int, list[int]] = {}
    by_gamma: dict[int, list[int]] = {}
    graph = nx.DiGraph()
    for i, scaling in enumerate(c.scalings):
        if scaling.gamma is not None:
            for g in np.unique(views.signature[class_of[scaling.gamma]]):
                by_gamma.setdefault(int(g), []).append(i)
        if peeled[i] is None:
            continue
        x, y = class_of[scaling.x], class_of[scaling.y]
        leader, follower = (x, y) if peeled[i] else (y, x)
        if not _one_to_one(x, y):
            # Copies of a channel on one side only: no matrix of one determines that of the other.
            peeled[i], changed = None, True
            continue
        if (views.limit[follower] != 0).any() or not (views.size[follower] > 1).any():
            # The output cannot follow; the input may, if it is not normalised and nothing restricts it.
            peeled[i] = False if peeled[i] and not scaling.normalised and scaling.gamma is not None else None
            changed = True
            continue
        for k in np.unique(views.signature[follower]):
            leaders.setdefault(int(k), []).append(i)
            for m in np.unique(views.signature[leader]):
                graph.add_edge(int(m), int(k), scaling=i)

    def give_up(numbers: list[int]) -> None:
        nonlocal changed
        for i in numbers:
            if peeled[i] is not None:
                peeled[i], changed = None, True

    for competing in leaders.values():
        identities = {
            (class_of[s.x].tobytes(), class_of[s.y].tobytes(), c.identity_of(s.gamma))
            for s in (c.scalings[i] for i in competing)
        }
        if len(identities) > 1:
            give_up(competing)
    for sharing in by_gamma.values():
        # A constant shared by two scalings is rewritten once: all are peeled into the same side, or none.
        if len({peeled[i] for i in sharing}) > 1:
            give_up(sharing)
    for component in nx.strongly_connected_components(graph):
        give_up([i for *_, i in graph.subgraph(component).edges(data="scaling")])
    return changed


def _one_to_one(x: np.ndarray, y: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([x, y]), axis=1).T)
    return pairs == len(np.unique(x)) == len(np.unique(y))


def _cells(views: Views, leader: np.ndarray) -> dict[int, np.ndarray]:
    mixing = np.flatnonzero((views.size > 1) & (leader < 0))
    order = mixing[np.argsort(views.cell[mixing], kind="stable")]
    if not len(order):
        return {}
    keys, starts = np.unique(views.cell[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:])))
