"""Exact null spaces of small systems over the rationals and over GF(2).

The log-diagonals of spaces that meet in products obey ``sum_j a_ij log d_j = 0`` with small rational ``a``; their signs
obey the same equations modulo 2. A basis of the solutions is what may be chosen freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def null_space(rows: Sequence[dict[int, float]], unknowns: int) -> np.ndarray:
    """Basis, ``(unknowns, free)`` float64, of ``{v: sum_j row[j] v_j = 0 for all rows}`` by Gauss-Jordan elimination.

    Every free unknown is the leading entry of one basis vector; entries are exact rationals rounded once.
    """
    pivots: dict[int, dict[int, Fraction]] = {}
    for row in rows:
        r = {j: Fraction(a).limit_denominator(1 << 20) for j, a in row.items() if a}
        for j in [j for j in r if j in pivots]:
            _subtract(r, pivots[j], r[j])
        if not r:
            continue
        # Eliminating the highest unknown keeps the earliest ones, which are closest to the weights, free.
        p = max(r)
        lead = r[p]
        r = {j: a / lead for j, a in r.items()}
        for other in pivots.values():
            if p in other:
                _subtract(other, r, other[p])
        pivots[p] = r
    free = [j for j in range(unknowns) if j not in pivots]
    basis = np.zeros((unknowns, len(free)))
    for k, j in enumerate(free):
        basis[j, k] = 1
    column = {j: k for k, j in enumerate(free)}
    for p, r in pivots.items():
        for j, a in r.items():
            if j != p:
                basis[p, column[j]] = -float(a)
    return basis


def _subtract(row: dict[int, Fraction], pivot: dict[int, Fraction], factor: Fraction) -> None:
    for j, a in pivot.items():
        value = row.get(j, Fraction(0)) - factor * a
        if value:
            row[j] = value
        else:
            row.pop(j, None)


def null_space_mod2(rows: Sequence[Sequence[int]], unknowns: int) -> np.ndarray:
    """Basis, ``(unknowns, free)`` int8, of the solutions over GF(2); a row lists its unknowns, repeats cancel."""
    pivots: dict[int, set[int]] = {}
    for row in rows:
        r: set[int] = set()
        for j in row:
            r ^= {j}
        for j in [j for j in r if j in pivots]:
            r ^= pivots[j]
        if not r:
            continue
        p = max(r)
        for q, other in pivots.items():
            if p in other:
                pivots[q] = other ^ r
        pivots[p] = r
    free = [j for j in range(unknowns) if j not in pivots]
    basis = np.zeros((unknowns, len(free)), np.int8)
    column = {j: k for k, j in enumerate(free)}
    for j, k in column.items():
        basis[j, k] = 1
    for p, r in pivots.items():
        for j in r - {p}:
            basis[p, column[j]] = 1
    return basis
