"""Index maps: which coordinate of the model each channel of a tensor is.

A *coordinate* is an integer that names one basis direction of some channel axis, wherever that direction shows up. An
index map ``m`` assigns to every position of a tensor the coordinate found there; axes along which the coordinate does
not change (batch, sequence, image positions) have length 1, as in numpy broadcasting::

    hidden state (batch, seq, 4096)          -> m.shape == (1, 1, 4096)
    after reshape to heads, transposed       -> m.shape == (1, 32, 1, 128)
    after repeat_kv from 8 to 32 heads       -> the same shape, every coordinate of 8 x 128 four times

Structural operators move coordinates and never change them, so their rule *is* the operator, applied to the map:
transpose, reshape, slice, gather, concat and expand compose, and fused or interleaved projections, splits and
repeated heads come out exact whatever order they are done in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Dim = int | str | None
"""A static size, the name of a symbolic size, or unknown."""


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Coordinates of a tensor's positions.

    Attributes:
        table: int64, one axis per tensor axis, length 1 where the coordinate does not depend on that axis.
    """

    table: np.ndarray

    @property
    def rank(self) -> int:
        """Number of tensor axes."""
        return self.table.ndim

    @property
    def size(self) -> int:
        """Number of (not necessarily different) coordinates."""
        return self.table.size

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the coordinate changes."""
        return tuple(a for a, n in enumerate(self.table.shape) if n != 1)

    @property
    def flat(self) -> np.ndarray:
        """Coordinates in row-major order."""
        return self.table.reshape(-1)

    def along(self, axis: int) -> bool:
        """Whether the coordinate changes along ``axis``."""
        return self.table.shape[axis % self.rank] != 1

    def transpose(self, perm: Sequence[int]) -> IndexMap:
        """Follow a Transpose."""
        return IndexMap(self.table.transpose(perm))

    def take(self, axis: int, indices: np.ndarray) -> IndexMap:
        """Follow a Slice, Split or constant Gather: keep ``indices`` along ``axis`` if the map varies there."""
        return IndexMap(np.take(self.table, indices, axis)) if self.along(axis) else self

    def pad_rank(self, rank: int) -> IndexMap:
        """Add leading axes of length 1, as broadcasting does."""
        return IndexMap(self.table.reshape((1,) * (rank - self.rank) + self.table.shape))

    def drop_axes(self, axes: Sequence[int]) -> IndexMap:
        """Remove axes of length 1 (Squeeze, reductions without kept dimensions)."""
        return IndexMap(np.squeeze(self.table, tuple(axes)))

    def insert_axes(self, axes: Sequence[int]) -> IndexMap:
        """Add axes of length 1 at the given positions of the result (Unsqueeze)."""
        return IndexMap(np.expand_dims(self.table, tuple(axes)))

    def reshape(self, old: Sequence[Dim], new: Sequence[Dim]) -> IndexMap | None:
        """Follow a Reshape from ``old`` to ``new`` sizes.

        Sizes are matched group by group (``(b, s, 32*128) -> (b, s, 32, 128)`` has the groups b, s and the rest).
        Returns None if the map varies inside a group that also contains a symbolic axis, where the result would
        not be a function of the position alone.
        """
        table, shape = self.table, []
        for left, right in match_groups(old, new):
            part = [self.table.shape[a] for a in left]
            if all(n == 1 for n in part):
                shape.append(((1,) * len(part), (1,) * len(right)))
                continue
            sizes = [old[a] for a in left]
            outer = [new[a] for a in right]
            known, wanted = [n for n in sizes if isinstance(n, int)], [n for n in outer if isinstance(n, int)]
            if len(known) != len(sizes) or len(wanted) != len(outer):
                return None
            shape.append((tuple(known), tuple(wanted)))
        full = [n for left, _ in shape for n in left]
        table = np.broadcast_to(table, full).reshape([n for _, right in shape for n in right])
        return IndexMap(table)

    def describe(self, base: int = 0) -> str:
        """The map of its varying axes in words: ``range(0, 4096)``, ``(32, 128) strides (128, 1)``, ``gather``."""
        table = np.squeeze(self.table) - base
        if table.ndim == 0:
            return f"[{int(table)}]"
        start = int(table.reshape(-1)[0])
        strides = [int(np.take(table, 1, a).reshape(-1)[0]) - start for a in range(table.ndim)]
        regular = start + sum(
            s * np.arange(n).reshape([-1 if a == b else 1 for b in range(table.ndim)])
            for a, (s, n) in enumerate(zip(strides, table.shape))
        )
        if not np.array_equal(regular, table):
            return f"gather {table.shape}"
        if table.ndim == 1:
            stop = start + strides[0] * table.shape[0]
            return f"range({start}, {stop})" if strides[0] == 1 else f"range({start}, {stop}, {strides[0]})"
        return f"{table.shape} from {start} strides {tuple(strides)}"


def concat(maps: Sequence[IndexMap], axis: int) -> IndexMap:
    """Direct sum of maps along ``axis``; other axes are broadcast against each other."""
    axis %= maps[0].rank
    shape = [max(m.table.shape[a] for m in maps) for a in range(maps[0].rank)]
    parts = []
    for m in maps:
        target = list(shape)
        target[axis] = m.table.shape[axis]
        parts.append(np.broadcast_to(m.table, target))
    return IndexMap(np.concatenate(parts, axis))


def match_groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Split the axes of a reshape into the finest matching groups of equal product.

    Symbolic sizes match by name. What cannot be matched from the left or from the right becomes one group.
    """
    head, i, j = _match_forward(list(old), list(new))
    tail, ri, rj = _match_forward(list(old[i:])[::-1], list(new[j:])[::-1])
    groups = head
    middle = (list(range(i, len(old) - ri)), list(range(j, len(new) - rj)))
    if middle[0] or middle[1]:
        groups.append(middle)
    for left, right in reversed(tail):
        groups.append(([len(old) - 1 - a for a in reversed(left)], [len(new) - 1 - a for a in reversed(right)]))
    return groups


def _match_forward(old: list[Dim], new: list[Dim]) -> tuple[list[tuple[list[int], list[int]]], int, int]:
    """Greedy groups from the left; returns them and how many axes of each side they cover."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if isinstance(old[i], str) or isinstance(new[j], str):
            if old[i] == new[j]:
                groups.append(([i], [j]))
                i, j = i + 1, j + 1
                continue
            # A size of 1 on either side does not change the product.
            if old[i] == 1:
                groups.append(([i], []))
                i += 1
                continue
            if new[j] == 1:
                groups.append(([], [j]))
                j += 1
                continue
            break
        a, b = i, j
        p, q = old[a], new[b]
        stuck = p is None or q is None
        while not stuck and p != q:
            if p < q:  # type: ignore[operator]
                a += 1
                stuck = a >= len(old) or not isinstance(old[a], int)
                p = p if stuck else p * old[a]  # type: ignore[operator]
            else:
                b += 1
                stuck = b >= len(new) or not isinstance(new[b], int)
                q = q if stuck else q * new[b]  # type: ignore[operator]
        if stuck:
            break
        groups.append((list(range(i, a + 1)), list(range(j, b + 1))))
        i, j = a + 1, b + 1
    # Trailing ones belong to nobody.
    while i < len(old) and j >= len(new) and old[i] == 1:
        groups.append(([i], []))
        i += 1
    while j < len(new) and i >= len(old) and new[j] == 1:
        groups.append(([], [j]))
        j += 1
    return groups, i, j
