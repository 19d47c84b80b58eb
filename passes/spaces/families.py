"""Bundles, families, diagonals, signs and permutations.

A *bundle* is a set of classes that share one index: operands of a product, both sides of a scaling, the channel of a
depthwise filter and its result. It is permuted as one. Bundles of the same make-up form a *family*; its columns are
aligned classes, so the systems ``sum_j a_j log d_j = 0`` (and the same modulo 2 for signs) need to be solved for one
bundle only.

A *unit* is what some operator treats as one index of a higher level (a head, a group of channels). Units of the same
make-up may trade places as a whole; bundles inside a unit may trade places if no use tells them apart.
"""

from __future__ import annotations

import numpy as np

from qcompile.passes.spaces.groups import BlockGroup, Limit
from qcompile.passes.spaces.linear import null_space, null_space_mod2
from qcompile.passes.spaces.relations import Constraints
from qcompile.passes.spaces.solve import Family, Solution, Views, components, hashed, rank


def add_families(s: Solution, views: Views) -> None:
    """Complete a solution that has classes, cells and peelings."""
    if not views.count:
        return
    single = (views.size == 1) | (s.leader >= 0)
    bundle_of = components(views.count, _index_links(s, views))
    # What a class is, up to its index: the uses that touch it, its restrictions, the size of its block.
    make = hashed(views.signature, 41) + hashed(s.limit_of, 31) + hashed(np.where(single, 1, views.size), 32)
    _build(s, bundle_of, make)
    _Equations(s, bundle_of, views, single).solve()
    _orbits(s, views, bundle_of, make, single)


def _index_links(s: Solution, views: Views) -> list[tuple[np.ndarray, np.ndarray]]:
    c, class_of = s.constraints, s.class_of
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
    pairs += split_planes(c, class_of, views)
    return pairs


def split_planes(c: Constraints, class_of: np.ndarray, views: Views) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of channels of a PLANE use that another use separates: they keep one common factor."""
    found = []
    for use in c.uses:
        if use.limit & Limit.PLANE and use.mix is not None:
            classes = class_of[use.coordinates]
            order = np.argsort(use.mix, kind="stable")
            first, second = classes[order[0::2]], classes[order[1::2]]
            split = (views.cell[first] != views.cell[second]) & (first != second)
            if split.any():
                found.append((first[split], second[split]))
    return found


def _build(s: Solution, bundle_of: np.ndarray, make: np.ndarray) -> None:
    """Sort classes into families: rows are bundles, columns are classes of equal make."""
    count = len(bundle_of)
    makeup = np.zeros(int(bundle_of.max()) + 1, np.uint64)
    np.add.at(makeup, bundle_of, hashed(make, 33))
    family_of_bundle, _ = rank(makeup)
    order = np.lexsort((np.arange(count), make, bundle_of, family_of_bundle[bundle_of]))
    sorted_family = family_of_bundle[bundle_of[order]]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_family) > 0])
    s.family_of, s.row_of, s.column_of = (np.zeros(count, np.int64) for _ in range(3))
    for number, members in enumerate(np.split(order, starts[1:])):
        rows = int((np.diff(bundle_of[members]) != 0).sum()) + 1
        table = members.reshape(rows, -1)
        columns = table.shape[1]
        s.family_of[members] = number
        s.row_of[members] = np.repeat(np.arange(rows), columns)
        s.column_of[members] = np.tile(np.arange(columns), rows)
        empty = np.zeros((columns, 0))
        s.families.append(Family(table, empty, empty.astype(np.int8), np.full(rows, -1), np.arange(rows)))


def _orbits(s: Solution, views: Views, bundle_of: np.ndarray, make: np.ndarray, single: np.ndarray) -> None:
    """Which bundles, and which units of bundles, may trade places."""
    c, bundles = s.constraints, int(bundle_of.max()) + 1
    mixes = np.zeros(bundles, bool)
    mixes[bundle_of[~single & ((s.limit_of & int(Limit.SCALAR)) == 0)]] = True
    family = np.zeros(bundles, np.int64)
    row = np.zeros(bundles, np.int64)
    family[bundle_of], row[bundle_of] = s.family_of, s.row_of
    color = np.zeros(bundles, np.uint64)
    np.add.at(color, bundle_of, hashed(hashed(views.color, 51) + make, 35))
    color = rank(color + hashed(family, 52))[0]
    # Units: bundles that some operator sees as one index of a higher level, with everything linked to them.
    pairs, node = [], bundles
    has_unit = np.zeros(bundles, bool)
    for use in c.uses:
        if use.unit is not None:
            members = bundle_of[s.class_of[use.coordinates]]
            keys, _ = rank(use.unit)
            pairs.append((members, node + keys))
            node += int(keys.max()) + 1
            has_unit[members] = True
    pairs += [(bundle_of[s.class_of[a]], bundle_of[s.class_of[b]]) for a, b in c.unit_links]
    unit = components(node, pairs)[:bundles]
    _, sizes = rank(unit)
    alone = sizes[rank(unit)[0]] == 1
    # Bundles inside one unit: equal color, equal membership in all units, equal cells.
    place = np.zeros(bundles, np.uint64)
    np.add.at(place, bundle_of, hashed(hashed(views.unit, 53) + make, 34))
    shared = ~single
    np.add.at(place, bundle_of[shared], hashed(views.cell[shared], 36))
    for number, (a, b) in enumerate(c.unit_links):
        # A bundle that stands for a unit does not move without the unit's channels, nor they without it.
        one, other = bundle_of[s.class_of[a]], bundle_of[s.class_of[b]]
        np.add.at(place, one, hashed(other, number * 2 + 100))
        np.add.at(place, other, hashed(one, number * 2 + 101))
    place = np.where(alone, hashed(0, 37), place + hashed(unit, 38)) + hashed(color, 39)
    orbit, counts = rank(place)
    free = (counts[orbit] > 1) & ~mixes
    for number, f in enumerate(s.families):
        mine = np.flatnonzero(family == number)
        f.orbit[row[mine]] = np.where(free[mine], orbit[mine], -1)
        f.alike[row[mine]] = orbit[mine]
    _unit_orbits(s, views, bundle_of, unit, alone, color, family, row, single)


def _unit_orbits(
    s: Solution,
    views: Views,
    bundle_of: np.ndarray,
    unit: np.ndarray,
    alone: np.ndarray,
    color: np.ndarray,
    family: np.ndarray,
    row: np.ndarray,
    single: np.ndarray,
) -> None:
    inside = np.flatnonzero(~alone)
    if not len(inside):
        return
    # A block of channels that spans several units cannot move with one of them.
    spanning = _spanning(views, bundle_of, unit, single)
    order = inside[np.lexsort((inside, color[inside], unit[inside]))]
    starts = np.flatnonzero(np.r_[True, np.diff(unit[order]) != 0])
    shapes: dict[bytes, list[np.ndarray]] = {}
    for members in np.split(order, starts[1:]):
        if spanning[unit[members[0]]]:
            continue
        tables = [s.families[f].classes[r] for f, r in zip(family[members], row[members])]
        classes = np.concatenate(tables)
        pattern = _first_occurrence(np.where(single[classes], -1, views.cell[classes]))
        shapes.setdefault(color[members].tobytes() + pattern.tobytes(), []).append(classes)
    s.unit_orbits = [np.stack(units) for units in shapes.values() if len(units) > 1]


def _first_occurrence(keys: np.ndarray) -> np.ndarray:
    """Number keys in the order in which they first occur."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _spanning(views: Views, bundle_of: np.ndarray, unit: np.ndarray, single: np.ndarray) -> np.ndarray:
    """For each unit, whether a cell of it also lies in another."""
    result = np.zeros(int(unit.max()) + 1, bool)
    shared = np.flatnonzero(~single)
    if len(shared):
        pairs = np.unique(np.stack([views.cell[shared], unit[bundle_of[shared]]]), axis=1)
        cells, counts = np.unique(pairs[0], return_counts=True)
        many = cells[counts > 1]
        result[pairs[1][np.isin(pairs[0], many)]] = True
    return result


class _Equations:
    """The log-diagonal and sign systems of one representative bundle (row 0) per family."""

    def __init__(self, s: Solution, bundle_of: np.ndarray, views: Views, single: np.ndarray) -> None:
        self.s, self.bundle_of, self.views, self.single = s, bundle_of, views, single

    def solve(self) -> None:
        """Fill in ``logs`` and ``signs`` of every family."""
        s, c = self.s, self.s.constraints
        logs: list[list[dict[int, float]]] = [[] for _ in s.families]
        signs: list[list[list[int]]] = [[] for _ in s.families]
        for family, log_rows, sign_rows in zip(s.families, logs, signs):
            for column, klass in enumerate(family.classes[0]):
                limit = Limit(int(s.limit_of[klass]))
                following = s.leader[klass] >= 0
                group = BlockGroup(1, limit)
                if not following and (not self.single[klass] or not group.scalable):
                    log_rows.append({column: 1.0})
                unsigned = not self.single[klass] or not (group.signed or self._tied_sign(klass))
                if not following and unsigned:
                    sign_rows.append([column])
        for product in c.products:
            self._add(product.out, product.terms, product.powers, product.parity, logs, signs)
        for scaling in c.scalings:
            # The same whether peeled or not: a peeled side acts as D_f D_l^-1 A_l G^-1 (see `element.py`).
            gamma = () if scaling.gamma is None else (scaling.gamma,)
            size = 0.0 if scaling.normalised else 1.0
            powers = (size, *((1.0,) * len(gamma)))
            self._add(scaling.y, (scaling.x, *gamma), powers, (1,) * len(powers), logs, signs)
        for first, second in split_planes(c, s.class_of, self.views):
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
            family = s.family_of[out[i]]
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
