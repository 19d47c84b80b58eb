"""From constraints to the group of the whole model.

1. *Classes*: coordinates joined by ``same`` and ``dual``. Each coordinate is doubled into itself and its contragredient,
   ``same`` joins (a, b) and (a*, b*), ``dual`` joins (a, b*) and (a*, b); a class that meets its own contragredient
   obeys M = M^-T, so it is orthogonal: this is how a tied embedding comes out.
2. *Cells*: classes that every use lets mix. Each use hashes its block key into the classes it touches; equal sums of
   hashes are equal views by all uses. Restrictions of all uses are united (`groups.meet`).
3. *Scalings* ``y = g x``: either both sides are diagonal, or g is peeled into the side that nothing but linear operators
   touches (y' = G' A_x G^-1 y). Peeling is assumed first and withdrawn where the assumption fails, until nothing changes.
4. *Bundles*: classes that share one index (product operands, both sides of a scaling, depthwise channels) and therefore
   one permutation; bundles of the same make-up form a *family*, whose columns are the spaces.
5. *Diagonals and signs*: one linear system per family (`linear.py`), the same for each of its bundles.

Everything is vectorised over coordinates: a transformer of 32 layers has millions of them but only a few families.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from qcompile.passes.spaces.groups import BlockGroup, Limit, normal
from qcompile.passes.spaces.linear import null_space, null_space_mod2
from qcompile.passes.spaces.relations import Constraints, Scaled, Use


@dataclass
class Family:
    """Bundles of the same make-up.

    Attributes:
        classes: ``(n, columns)``, the class of each bundle in each column.
        logs: ``(columns, free)``, basis of the log-diagonals of one bundle.
        signs: ``(columns, free)``, basis over GF(2) of the signs of one bundle.
        orbit: ``(n,)``, bundles with equal entries may be permuted; -1 where nothing may.
    """

    classes: np.ndarray
    logs: np.ndarray
    signs: np.ndarray
    orbit: np.ndarray


@dataclass
class Solution:
    """The solved system; see the module text for the words.

    Attributes:
        class_of: class of each coordinate.
        parity: +1 where the coordinate acts as its class, -1 where contragrediently.
        cell_of: cell of each class.
        limit_of: restrictions of each class.
        cells: the classes of each cell with more than one channel, in index order.
        leader: for each class that follows another through a peeled scaling, the scaling's index; else -1.
        bundle_of: bundle of each class.
        family_of: family of each bundle.
        column_of: column of each class in its family.
        row_of: row of each class in its family.
        signature: hash of the set of uses of each class.
    """

    constraints: Constraints
    class_of: np.ndarray
    parity: np.ndarray
    cell_of: np.ndarray
    limit_of: np.ndarray
    cells: dict[int, np.ndarray]
    peels: dict[int, Peel]
    leader: np.ndarray
    family_of_class: np.ndarray
    column_of: np.ndarray
    row_of: np.ndarray
    signature: np.ndarray
    families: list[Family] = field(default_factory=list)

    def block(self, cell: int) -> BlockGroup:
        """The group of one cell."""
        members = self.cells[cell]
        return BlockGroup(len(members), Limit(int(self.limit_of[members[0]])))


@dataclass(frozen=True)
class Peel:
    """A scaling whose gamma may be moved into its neighbours.

    Attributes:
        follower: classes whose action is determined by the leader's.
        leader: aligned classes of the other side.
        gamma: aligned coordinates of the constant, or None.
        forward: True if the follower is the output: A_f = G' A_l G^-1; otherwise A_f = G'^-1 A_l G.
    """

    scaling: Scaled
    follower: np.ndarray
    leader: np.ndarray
    forward: bool


def solve(constraints: Constraints) -> Solution:
    """Solve the system. Cost is linear in the coordinates touched by uses."""
    class_of, parity, self_dual, count = _classes(constraints)
    peeled: dict[int, bool | None] = {}
    for i, scaling in enumerate(constraints.scalings):
        peeled[i] = True
    while True:
        view = _view(constraints, class_of, self_dual, count, peeled)
        changed = _withdraw(constraints, class_of, view, peeled)
        if not changed:
            break
    return _finish(constraints, class_of, parity, count, view, peeled)


# -- classes ---------------------------------------------------------------------------------------------------------


def _components(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    if not pairs:
        return np.arange(count)
    a = np.concatenate([p for p, _ in pairs])
    b = np.concatenate([q for _, q in pairs])
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _classes(c: Constraints) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    n = c.count
    pairs = []
    for a, b, dual in c.edges:
        pairs.append((a, b + n if dual else b))
        pairs.append((a + n, b if dual else b + n))
    component = _components(2 * n, pairs)
    up, down = component[:n], component[n:]
    pair = np.minimum(up, down).astype(np.int64)
    # A class is oriented like its first coordinate that is not the summed axis of a weight: activations read +1.
    order = np.arange(n)
    for birth in c.births:
        if birth.reader:
            order[birth.start : birth.start + birth.count] += n
    _, class_of = np.unique(pair, return_inverse=True)
    count = int(class_of.max()) + 1 if n else 0
    first = np.full(count, 4 * n)
    np.minimum.at(first, class_of, order)
    positive = up[first % n] if n else up
    parity = np.where(up == positive[class_of], 1, -1).astype(np.int8)
    self_dual = np.zeros(count, bool)
    self_dual[class_of[up == down]] = True
    return class_of, parity, self_dual, count


# -- views: what all uses say about each class -----------------------------------------------------------------------

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _hash(key: np.ndarray | int, salt: int) -> np.ndarray:
    """64-bit mixing of integer keys (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(key).astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _rank(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return inverse, counts


@dataclass
class _View:
    signature: np.ndarray
    unit: np.ndarray
    color: np.ndarray
    limit: np.ndarray
    cell: np.ndarray
    size: np.ndarray


def _touch(target: np.ndarray, index: np.ndarray, value: np.ndarray | np.uint64) -> None:
    np.add.at(target, index, value)


def _view(
    c: Constraints, class_of: np.ndarray, self_dual: np.ndarray, count: int, peeled: dict[int, bool | None]
) -> _View:
    signature, mix, unit, color = (np.zeros(count, np.uint64) for _ in range(4))
    limit = np.where(self_dual, int(Limit.ORTHOGONAL | Limit.RIGID), 0)

    def apply(number: int, use: Use, classes: np.ndarray) -> None:
        salt = number * 8
        _touch(signature, classes, _hash(number, 1))
        for target, keys, offset in ((mix, use.mix, 1), (unit, use.unit, 2), (color, use.color, 3)):
            if keys is not None:
                _touch(target, classes, _hash(keys, salt + offset))
        if use.limit:
            np.bitwise_or.at(limit, classes, int(use.limit))

    for number, use in enumerate(c.uses):
        apply(number, use, class_of[use.coordinates])
    base = len(c.uses)
    for i, product in enumerate(c.products):
        arrays = (product.out, *product.terms)
        for j, array in enumerate(arrays):
            classes = class_of[array]
            _touch(signature, classes, _hash(base + i, 11 + j))
            _touch(mix, classes, _hash(np.arange(len(array)), (base + i) * 8 + 4 + j % 4))
    base += len(c.products)
    # Scalings are seen last: a diagonal one separates the channels of both sides, a peeled one those of the leader
    # as the follower's own uses do.
    for i, scaling in enumerate(c.scalings):
        arrays = [scaling.y, scaling.x] if scaling.gamma is None else [scaling.y, scaling.x, scaling.gamma]
        for j, array in enumerate(arrays):
            _touch(signature, class_of[array], _hash(base + i, 21 + j))
    frozen_cell, _ = _rank(_hash(0, 5) + signature * np.uint64(3) + mix * np.uint64(5) + unit * np.uint64(7))
    for i, scaling in enumerate(c.scalings):
        x, y = class_of[scaling.x], class_of[scaling.y]
        if peeled[i] is None:
            key = np.arange(len(x))
            _touch(mix, x, _hash(key, (base + i) * 8 + 1))
            _touch(mix, y, _hash(key, (base + i) * 8 + 2))
        else:
            leader, follower = (x, y) if peeled[i] else (y, x)
            _touch(mix, leader, _hash(frozen_cell[follower], (base + i) * 8 + 3))
        if scaling.gamma is not None:
            g = class_of[scaling.gamma]
            _touch(mix, g, _hash(g, (base + i) * 8 + 4))
    cell, sizes = _rank(_hash(0, 5) + signature * np.uint64(3) + mix * np.uint64(5) + unit * np.uint64(7))
    size = sizes[cell]
    _forbid_partial_scales(c, class_of, cell, size, limit)
    return _View(signature, unit, color, limit, cell, size)


def _forbid_partial_scales(
    c: Constraints, class_of: np.ndarray, cell: np.ndarray, size: np.ndarray, limit: np.ndarray
) -> None:
    """A common factor of an operator's block survives only if the final cell is the whole block."""
    for use in c.uses:
        if not use.limit & Limit.COMMON or use.limit & Limit.RIGID:
            continue
        classes = class_of[use.coordinates]
        if use.mix is None:
            whole = np.full(len(classes), len(np.unique(classes)))
        else:
            pairs = np.unique(np.stack([use.mix, classes]), axis=1)
            keys, counts = np.unique(pairs[0], return_counts=True)
            whole = counts[np.searchsorted(keys, use.mix)]
        partial = classes[size[classes] != whole]
        limit[partial] |= int(Limit.RIGID)


def _withdraw(c: Constraints, class_of: np.ndarray, view: _View, peeled: dict[int, bool | None]) -> bool:
    """Check every assumed peeling; returns whether one had to be changed.

    A follower's action is dictated by its leader, so it must bear any matrix (no restriction on a cell of several
    channels) and have one leader only; a chain of leaders must end.
    """
    changed = False
    leaders: dict[int, list[int]] = {}
    graph = nx.DiGraph()
    for i, scaling in enumerate(c.scalings):
        if peeled[i] is None:
            continue
        x, y = class_of[scaling.x], class_of[scaling.y]
        follower = y if peeled[i] else x
        free = (view.limit[follower] == 0).all() and (view.size[follower] > 1).any()
        if not free:
            # The output cannot follow; the input may, if it is not normalised and nothing restricts it.
            peeled[i] = False if peeled[i] and not scaling.normalised and scaling.gamma is not None else None
            changed = True
            continue
        for k in np.unique(view.signature[follower]):
            leaders.setdefault(int(k), []).append(i)
            for m in np.unique(view.signature[x if peeled[i] else y]):
                graph.add_edge(int(m), int(k), scaling=i)
    for competing in leaders.values():
        distinct = {
            (class_of[s.x].tobytes(), class_of[s.y].tobytes(), c.identity_of(s.gamma))
            for s in (c.scalings[i] for i in competing)
        }
        if len(distinct) > 1:
            for i in competing:
                if peeled[i] is not None:
                    peeled[i], changed = None, True
    # A constant shared by two scalings is rewritten once: both must be peeled into the same side, or none.
    by_gamma: dict[int, list[int]] = {}
    for i, scaling in enumerate(c.scalings):
        if scaling.gamma is not None:
            for g in np.unique(view.signature[class_of[scaling.gamma]]):
                by_gamma.setdefault(int(g), []).append(i)
    for sharing in by_gamma.values():
        states = {peeled[i] for i in sharing}
        if len(states) > 1:
            for i in sharing:
                if peeled[i] is not None:
                    peeled[i], changed = None, True
    for component in nx.strongly_connected_components(graph):
        for a, b, i in graph.subgraph(component).edges(data="scaling"):
            if peeled[i] is not None:
                peeled[i], changed = None, True
    return changed


# -- bundles, families, diagonals ------------------------------------------------------------------------------------


def _finish(
    c: Constraints,
    class_of: np.ndarray,
    parity: np.ndarray,
    count: int,
    view: _View,
    peeled: dict[int, bool | None],
) -> Solution:
    peels, leader = {}, np.full(count, -1)
    for i, scaling in enumerate(c.scalings):
        if peeled[i] is None:
            continue
        x, y = class_of[scaling.x], class_of[scaling.y]
        peel = Peel(scaling, y, x, True) if peeled[i] else Peel(scaling, x, y, False)
        peels[i] = peel
        leader[peel.follower] = i
    limit = np.array([int(normal(Limit(v))) for v in range(64)])[view.limit]
    single = (view.size == 1) | (leader >= 0)
    bundle_of = _bundles(c, class_of, count, view, limit)
    solution = Solution(
        c,
        class_of,
        parity,
        view.cell,
        limit,
        _cells(view, leader),
        peels,
        leader,
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        view.signature,
    )
    _families(solution, bundle_of, view, single)
    return solution


def _bundles(c: Constraints, class_of: np.ndarray, count: int, view: _View, limit: np.ndarray) -> np.ndarray:
    pairs = []
    for product in c.products:
        out = class_of[product.out]
        pairs += [(out, class_of[t]) for t in product.terms]
    for scaling in c.scalings:
        y = class_of[scaling.y]
        pairs.append((y, class_of[scaling.x]))
        if scaling.gamma is not None:
            pairs.append((y, class_of[scaling.gamma]))
    pairs += [(class_of[a], class_of[b]) for a, b in c.links]
    pairs += [(first, second) for first, second, _ in _split_planes(c, class_of, view)]
    return _components(count, pairs)


def _split_planes(c: Constraints, class_of: np.ndarray, view: _View) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Pairs of channels of a PLANE use that another use separates: they keep one common factor."""
    found = []
    for number, use in enumerate(c.uses):
        if use.limit & Limit.PLANE and use.mix is not None:
            classes = class_of[use.coordinates]
            order = np.argsort(use.mix, kind="stable")
            first, second = classes[order[0::2]], classes[order[1::2]]
            split = (view.cell[first] != view.cell[second]) & (first != second)
            if split.any():
                found.append((first[split], second[split], number))
    return found


def _cells(view: _View, leader: np.ndarray) -> dict[int, np.ndarray]:
    mixing = np.flatnonzero((view.size > 1) & (leader < 0))
    order = mixing[np.argsort(view.cell[mixing], kind="stable")]
    keys, starts = np.unique(view.cell[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:]))) if len(order) else {}


def _families(s: Solution, bundle_of: np.ndarray, view: _View, single: np.ndarray) -> None:
    c, count = s.constraints, len(bundle_of)
    if not count:
        return
    make = view.signature * np.uint64(3) + _hash(s.limit_of, 31) + _hash(np.where(single, 1, view.size), 32)
    bundles = int(bundle_of.max()) + 1
    makeup = np.zeros(bundles, np.uint64)
    _touch(makeup, bundle_of, _hash(make, 33))
    # Bundles that share inner cells and units may trade places if no use tells them apart.
    place = np.zeros(bundles, np.uint64)
    _touch(place, bundle_of, _hash(view.unit + make, 34))
    _touch(place, bundle_of, _hash(view.color + make, 35))
    shared = ~single
    _touch(place, bundle_of[shared], _hash(view.cell[shared], 36))
    family_of, _ = _rank(makeup)
    order = np.lexsort((np.arange(count), make, bundle_of, family_of[bundle_of]))
    family_sorted = family_of[bundle_of[order]]
    starts = np.flatnonzero(np.r_[True, np.diff(family_sorted) > 0])
    equations = _Equations(s, bundle_of, view, single)
    mixes = np.zeros(bundles, bool)
    can_mix = shared & ((s.limit_of & int(Limit.SCALAR)) == 0)
    mixes[bundle_of[can_mix]] = True
    for number, members in enumerate(np.split(order, starts[1:])):
        ids = bundle_of[members]
        n = len(np.unique(ids))
        table = members.reshape(n, -1)
        s.family_of_class[members] = number
        s.row_of[members] = np.repeat(np.arange(n), table.shape[1])
        s.column_of[members] = np.tile(np.arange(table.shape[1]), n)
        orbit, sizes = _rank(place[ids.reshape(n, -1)[:, 0]])
        orbit = np.where((sizes[orbit] > 1) & ~mixes[ids.reshape(n, -1)[:, 0]], orbit, -1)
        s.families.append(Family(table, np.zeros((table.shape[1], 0)), np.zeros((table.shape[1], 0), np.int8), orbit))
    equations.solve()


class _Equations:
    """The log-diagonal and sign systems of one representative bundle (row 0) per family."""

    def __init__(self, s: Solution, bundle_of: np.ndarray, view: _View, single: np.ndarray) -> None:
        self.s, self.bundle_of, self.view, self.single = s, bundle_of, view, single

    def solve(self) -> None:
        """Fill in ``logs`` and ``signs`` of every family."""
        s, c = self.s, self.s.constraints
        logs: list[list[dict[int, float]]] = [[] for _ in s.families]
        signs: list[list[list[int]]] = [[] for _ in s.families]
        for family, table, log_rows, sign_rows in zip(s.families, (f.classes for f in s.families), logs, signs):
            for column, klass in enumerate(table[0]):
                limit = Limit(int(s.limit_of[klass]))
                following = s.leader[klass] >= 0
                group = BlockGroup(1, limit)
                if not following and (not self.single[klass] or not group.scalable):
                    log_rows.append({column: 1.0})
                if not following and (not self.single[klass] or not group.signed):
                    if not self._tied_sign(klass):
                        sign_rows.append([column])
        for product in c.products:
            self._add(product.out, product.terms, product.powers, product.parity, logs, signs)
        for scaling in c.scalings:
            # The same whether peeled or not: a peeled side acts as D_f D_l^-1 A_l G^-1 (see `element.py`).
            gamma = () if scaling.gamma is None else (scaling.gamma,)
            size = 0.0 if scaling.normalised else 1.0
            powers = (size, *((1.0,) * len(gamma)))
            self._add(scaling.y, (scaling.x, *gamma), powers, (1,) * len(powers), logs, signs)
        for first, second, _ in _split_planes(c, s.class_of, self.view):
            self._rows(first, (second,), (1.0,), (1,), np.ones(len(first)), [np.ones(len(first))], logs, signs)
        for family, log_rows, sign_rows in zip(s.families, logs, signs):
            columns = family.classes.shape[1]
            family.logs = null_space(log_rows, columns)
            family.signs = null_space_mod2(sign_rows, columns)

    def _tied_sign(self, klass: int) -> bool:
        """A single channel cut out of a plane may change sign together with its partner."""
        limit = Limit(int(self.s.limit_of[klass]))
        return bool(self.single[klass] and limit & Limit.PLANE and not limit & (Limit.SCALAR | Limit.FIX_ONES))

    def _add(self, out, terms, powers, parities, logs, signs) -> None:
        s = self.s
        self._rows(
            s.class_of[out],
            tuple(s.class_of[t] for t in terms),
            powers,
            parities,
            s.parity[out].astype(float),
            [s.parity[t].astype(float) for t in terms],
            logs,
            signs,
        )

    def _rows(self, out, terms, powers, parities, out_parity, term_parity, logs, signs) -> None:
        s = self.s
        for i in np.flatnonzero(s.row_of[out] == 0):
            family = s.family_of_class[out[i]]
            row: dict[int, float] = {}
            odd = [int(s.column_of[out[i]])]
            for klass, sign, power, parity in [
                (out[i], out_parity[i], -1.0, 0),
                *((t[i], p[i], k, q) for t, p, k, q in zip(terms, term_parity, powers, parities)),
            ]:
                column = int(s.column_of[klass])
                row[column] = row.get(column, 0.0) + sign * power
                if parity:
                    odd.append(column)
            logs[family].append(row)
            signs[family].append(odd)
