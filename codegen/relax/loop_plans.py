"""How a loop nest is to be run: which axis fills vector registers, which are tiled, which are cut for threads.

* ``loops``: plain loops, the last axis innermost. LLVM vectorises them if nothing is summed.
* ``columns``: a reduction whose result is contiguous along a spatial axis: that axis fills the registers, and a second
  spatial axis along which some operand does not change is tiled, so that each vector read is used several times. Matrix
  products, convolutions, sums over rows.
* ``rows``: a reduction that is contiguous along a reduced axis: partial results per lane, combined at the end. Sums
  along rows, products with a transposed matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.sym import Analyzer

from qcompile.codegen.relax.nests import Axis, Nest, access, calls, loads, plain_indices, uses

_TRANSPOSE_BLOCK = 32
_INNER = 64
"""Static elements an innermost loop should have before the axes outside of it are handed to the outer loops."""
_LONG = 8192


@dataclass
class Plan:
    """How to run one nest.

    Attributes:
        kind: ``loops``, ``columns`` or ``rows``.
        vector: the axis that fills registers (None for ``loops``).
        lanes: elements of a register.
        tiles: further axes computed several points at a time, with that number.
        outer: (axis, step) of the loops outside, which may run in parallel; the nest does ``step`` points at a time.
    """

    kind: str
    vector: Axis | None = None
    lanes: int = 1
    tiles: list[tuple[Axis, int]] = field(default_factory=list)
    outer: list[tuple[Axis, int]] = field(default_factory=list)

    @property
    def leading(self) -> int:
        """How many of the outer loops, from the first, take one point at a time."""
        count = 0
        for _, step in self.outer:
            if step != 1:
                break
            count += 1
        return count


@dataclass(frozen=True)
class Combination:
    """A reduction ``target = combine(target, term)`` whose order does not matter but for rounding.

    Attributes:
        term: what is combined at each point.
        is_sum: starts from 0 in every partial result; a maximum or minimum may start everywhere from its start value.
        combine: works on scalars and vectors.
    """

    term: Any
    is_sum: bool
    combine: Callable[[Any, Any], Any]


def combination(nest: Nest) -> Combination | None:
    """How a nest reduces, if that is by a sum, maximum or minimum (also the kinds that let a NaN win)."""
    store = nest.store
    if store is None:
        return None

    def is_target(node: Any) -> bool:
        return isinstance(node, TensorLoad) and node.source.same_as(store.buffer)

    def term_of(a: Any, b: Any) -> Any:
        a, b = (a, b) if is_target(b) else (b, a)
        return a if is_target(b) and not any(is_target(load) for load in loads(a)) else None

    value = store.value
    for kind, apply in ((tirx.Add, lambda a, b: a + b), (tirx.Max, tirx.max), (tirx.Min, tirx.min)):
        if isinstance(value, kind):
            term = term_of(value.a, value.b)
            return None if term is None else Combination(term, kind is tirx.Add, apply)
    if isinstance(value, tirx.Select) and is_target(value.true_value) and isinstance(value.condition, tirx.Or):
        compare, nan = value.condition.a, value.condition.b
        term = term_of(value.true_value, value.false_value)
        same = (
            isinstance(compare, tirx.GT | tirx.LT)
            and is_target(compare.a)
            and tvm_ffi.structural_equal(compare.b, term)
        )
        asks_nan = isinstance(nan, Call) and nan.op.name == "tirx.isnan" and is_target(nan.args[0])
        if term is not None and same and asks_nan:
            more = tirx.GT if isinstance(compare, tirx.GT) else tirx.LT
            return Combination(term, False, lambda a, b: tirx.Select(tirx.Or(more(a, b), tirx.NE(a, a)), a, b))
    return None


def make_plan(nest: Nest, lanes: int, registers: int) -> Plan:
    """Choose how to run ``nest`` on a machine with ``registers`` vector registers of ``lanes`` float32 elements."""
    analyzer = Analyzer()
    store = nest.store
    if not nest.reduced or store is None or not _fits_registers(nest) or _branches(store.value):
        return Plan("loops", outer=_outer_of_loops(nest, analyzer))
    reads = [load for load in loads(store.value) if not load.source.same_as(store.buffer)]
    last = plain_indices([store.indices[-1]], nest.spatial) if len(store.indices) else None
    column = last[0] if last else None
    if column is not None and column.static is not None and column.static < 4:
        column = None
    steps = [access(load, column.var, analyzer) for load in reads] if column else []
    row = _row_axis(nest, reads, analyzer) if combination(nest) else None
    if column and None not in steps:
        return _columns(nest, column, reads, analyzer, lanes, registers)
    if row:
        return _rows(nest, row, reads, lanes)
    if column and any(step is not None for step in steps):
        return _columns(nest, column, reads, analyzer, lanes, registers)
    return Plan("loops", outer=_outer_of_loops(nest, analyzer))


def _fits_registers(nest: Nest) -> bool:
    """Whether all elements are of types that vector instructions handle; the narrow floats are emulated."""
    parts = [part for part in (nest.body, nest.final) if part is not None]
    used = {str(b.dtype) for part in parts for b in (part.buffer, *(load.source for load in loads(part)))}
    return not any(dtype == "bool" or ("float" in dtype and dtype not in ("float32", "float64")) for dtype in used)


def _branches(value: Any) -> bool:
    return any(name == "if_then_else" for name in calls(value))


def _row_axis(nest: Nest, reads: list[Any], analyzer: Analyzer) -> Axis | None:
    for axis in reversed(nest.reduced):
        if axis.static is not None and axis.static < 4:
            continue
        steps = [access(load, axis.var, analyzer) for load in reads]
        if None not in steps and 1 in steps:
            return axis
    return None


def _fitting(lanes: int, axis: Axis) -> int:
    """The largest power of two that is at most ``lanes`` and the axis' extent."""
    return lanes if axis.static is None else min(lanes, 1 << (axis.static.bit_length() - 1))


def _reused(nest: Nest, inner: Axis, reads: list[Any]) -> list[Axis]:
    """Spatial axes along which an operand that changes with ``inner`` stays the same."""
    moving = [load for load in reads if any(uses(index, inner.var) for index in load.indices)]
    return [
        axis
        for axis in nest.spatial
        if axis is not inner
        and (axis.static is None or axis.static > 1)
        and any(not any(uses(index, axis.var) for index in load.indices) for load in moving)
    ]


def _columns(nest: Nest, vector: Axis, reads: list[Any], analyzer: Analyzer, lanes: int, registers: int) -> Plan:
    lanes = _fitting(lanes, vector)
    reused = _reused(nest, vector, reads)
    tile = reused[-1] if reused else None
    rows = 8 if registers >= 32 else 4
    outer = [(a, 1) for a in nest.spatial if a is not vector and a is not tile]
    tiles = [(vector, 2 if tile else 4)]
    if tile:
        tiles.append((tile, rows if tile.static is None else min(rows, tile.static)))
        outer.append((tile, rows * 4))
    return Plan("columns", vector, lanes, tiles, [*outer, (vector, lanes * 16)])


def _rows(nest: Nest, vector: Axis, reads: list[Any], lanes: int) -> Plan:
    reused = _reused(nest, vector, reads)[-2:]
    sizes = [4] if len(reused) == 1 else [2, 4]
    tiles = [(axis, n if axis.static is None else min(n, axis.static)) for axis, n in zip(reused, sizes)]
    outer = [(a, 1) for a in nest.spatial if a not in reused] + [(axis, n * 8) for axis, n in tiles]
    return Plan("rows", vector, _fitting(lanes, vector), tiles, outer)


def _outer_of_loops(nest: Nest, analyzer: Analyzer) -> list[tuple[Axis, int]]:
    spatial = nest.spatial
    if not spatial:
        return []
    if not nest.reduced and (crossed := _crossing(nest, analyzer)):
        return [(a, _TRANSPOSE_BLOCK if a in crossed else 1) for a in spatial]
    # The innermost loops together should be long; an axis of unknown length counts as long.
    inner, points = len(spatial), 1
    while inner > 0 and points < _INNER:
        inner -= 1
        static = spatial[inner].static
        points *= _LONG if static is None else static
    first = spatial[inner]
    outer = [(a, 1) for a in spatial[:inner]]
    if first.static is None or first.static > _LONG or not outer:
        behind = 1
        for a in spatial[inner + 1 :]:
            behind *= a.static or 1
        outer.append((first, max(1, _LONG // max(behind, 1))))
    return outer


def _crossing(nest: Nest, analyzer: Analyzer) -> list[Axis]:
    """The two axes of a transposition: one contiguous in what is written, the other in what is read."""
    store = nest.store
    if store is None or not len(store.indices):
        return []
    last = plain_indices([store.indices[-1]], nest.spatial)
    if not last or last[0] is None:
        return []
    written = last[0]
    for load in loads(store.value):
        if access(load, written.var, analyzer) is not None:
            continue
        for axis in nest.spatial:
            long = all(a.static is None or a.static >= 8 for a in (axis, written))
            if axis is not written and long and access(load, axis.var, analyzer) == 1:
                return [axis, written]
    return []
