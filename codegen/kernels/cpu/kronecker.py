"""Kronecker products of a row in place, block by block: what learned transformations put in front of a linear operator.

    x @ (L (x) R) = vec(L^T X R)   with the block x read as a matrix X of rows(L) x rows(R)

Two small matrix products per block, ``rows(L) + rows(R)`` multiplications per element. Both matrices stay in the
first-level cache; a tile of four rows and two registers is summed up at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v

_ROWS, _REGISTERS = 4, 2
"""Rows and registers of a tile of sums."""


def mix_row(
    buffer: Any, at: Callable[[Any], list[Any]], width: int, lanes: int, left: Any, right: Any, sizes: tuple[int, int]
) -> None:
    """Emit ``row = row @ blockdiag(L (x) R, ...)``.

    Args:
        buffer: float32, holds the row.
        at: index of element ``s`` of the row.
        width: elements of the row, a multiple of the product of ``sizes``.
        lanes: float32 elements of a register.
        left, right: float32 buffers ``(a, a)`` and ``(b, b)``.
        sizes: ``(a, b)``.
    """
    a, b = sizes
    held = B.alloc_buffer((a * b,), "float32")
    with T.serial(width // (a * b)) as block:
        base = block * (a * b)
        _product(
            (a, b, b),
            lanes,
            lambda i, k: v.load(buffer, at(base + i * b + k), 1),
            lambda k, s, n: v.load(right, [k, s], n),
            lambda i, s, x, n: v.store(held, [i * b + s], x, n),
        )
        _product(
            (a, b, a),
            lanes,
            lambda i, k: v.load(left, [k, i], 1),
            lambda k, s, n: v.load(held, [k * b + s], n),
            lambda i, s, x, n: v.store(buffer, at(base + i * b + s), x, n),
        )


def _product(
    shape: tuple[int, int, int],
    lanes: int,
    x: Callable[[Any, Any], Any],
    y: Callable[[Any, int, int], Any],
    keep: Callable[[Any, int, Any, int], None],
) -> None:
    """``sum_k x(i, k) y(k, s)`` for all rows i and columns s of ``shape`` (rows, columns, depth)."""
    rows, columns, depth = shape
    parts = [(s, min(lanes, columns - s)) for s in range(0, columns, lanes)]
    tiles = [parts[i : i + _REGISTERS] for i in range(0, len(parts), _REGISTERS)]

    def tile(first: Any, count: int, columns: list[tuple[int, int]]) -> None:
        sums = B.alloc_buffer((count * len(columns) * lanes,), "float32")
        places = [(r, c, [(r * len(columns) + c) * lanes]) for r in range(count) for c in range(len(columns))]
        for _, c, place in places:
            v.store(sums, place, v.const(0, columns[c][1]), columns[c][1])
        with T.serial(depth) as k:
            right = [v.let(y(k, s, n)) for s, n in columns]
            left = [v.let(x(first + r, k)) for r in range(count)]
            for r, c, place in places:
                n = columns[c][1]
                v.store(sums, place, v.fma(v.splat(left[r], n), right[c], v.load(sums, place, n)), n)
        for r, c, place in places:
            s, n = columns[c]
            keep(first + r, s, v.load(sums, place, n), n)

    whole = rows // _ROWS
    for part in tiles:
        if whole:
            with T.serial(whole) as group:
                tile(group * _ROWS, _ROWS, part)
        if rows % _ROWS:
            tile(whole * _ROWS, rows % _ROWS, part)
