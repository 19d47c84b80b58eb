"""Writes loop nests as TIR: tiled, with accumulators in registers, the outer loops in parallel.

Lengths may be known only at run time. An axis is cut into whole tiles, then whole vectors, then single elements, each in
a loop of its own, so that no loop body has a condition in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.sym import Analyzer
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.relax.loop_plans import Plan, combination, make_plan
from qcompile.codegen.relax.nests import Axis, Function, Nest, calls, loads, replace_loads, stores, substitute
from qcompile.codegen.relax.vector_math import allows_vector_math, use_vector_math

_GRAIN = 65536
"""Elementary operations that are worth waking another thread for: some ten microseconds."""

Range = tuple[Any, Any]
"""Begin and length of the part of an axis that is being computed."""

Environment = dict[Any, Any]
"""What the axis variables stand for."""


def write(function: Function, lanes: int, registers: int, cores: int) -> tirx.PrimFunc:
    """The function with its nests written for a machine.

    Args:
        function: what `parse` read, simplified or not.
        lanes: float32 elements of a vector register.
        registers: number of vector registers.
        cores: threads that may be used.
    """
    writer = _Writer(function, cores)
    plans = {id(nest): make_plan(nest, lanes, registers) for nest in function.nests}
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("body")
        for buffer in function.locals:
            B.add_to_parent(tirx.AllocBuffer(buffer, {}))
        for group, shared in _groups(function, plans):
            writer.group([(nest, plans[id(nest)]) for nest in group], shared)
    return function.original.with_body(builder.get().body).with_attr(v.SCHEDULED, True)


def _groups(function: Function, plans: dict[int, Plan]) -> list[tuple[list[Nest], int]]:
    """Runs of nests that work row by row on the same rows, with the number of axes that name a row."""
    analyzer = Analyzer()
    groups: list[tuple[list[Nest], int]] = []
    for nest in function.nests:
        if groups:
            group, shared = groups[-1]
            limit = min([shared] * (len(group) > 1) + [_row_axes(plans[id(n)], n) for n in (*group, nest)])
            common = 0
            for a, b in zip(group[0].spatial[:limit], nest.spatial):
                if not analyzer.can_prove_equal(a.extent, b.extent):
                    break
                common += 1
            while common and not _independent([*group, nest], common):
                common -= 1
            if common:
                groups[-1] = ([*group, nest], common)
                continue
        groups.append(([nest], 0))
    return groups


def _row_axes(plan: Plan, nest: Nest) -> int:
    """How many leading axes of the nest may be fixed from outside."""
    if any(axis.reduce is False and axis is not plan.vector for axis, _ in plan.tiles):
        return 0  # tiling wants several rows at a time
    limit = (
        len(nest.spatial) if plan.kind == "rows" or (plan.kind == "loops" and nest.reduced) else len(nest.spatial) - 1
    )
    if plan.kind == "columns":
        limit = next(i for i, axis in enumerate(nest.spatial) if axis is plan.vector)
    return max(limit, 0)


def _independent(nests: list[Nest], rows: int) -> bool:
    """Whether what one nest writes in a row is read by the others in that row only."""
    for i, nest in enumerate(nests):
        for store in stores(nest):
            if not _at_row(store.indices, nest, rows):
                return False
            for other in nests[i + 1 :]:
                parts = [part for part in (other.body, other.init, other.final) if part is not None]
                for load in (load for part in parts for load in loads(part)):
                    if load.source.same_as(store.buffer) and not _at_row(load.indices, other, rows):
                        return False
    return True


def _at_row(indices: Any, nest: Nest, rows: int) -> bool:
    return len(indices) >= rows and all(i.same_as(a.var) for i, a in zip(list(indices)[:rows], nest.spatial))


def _number(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, tirx.IntImm) else None


def _wide(value: Any) -> Any:
    return (
        T.int64(value)
        if isinstance(value, int)
        else tirx.Cast("int64", value)
        if str(value.ty.dtype) != "int64"
        else value
    )


def _product(values: list[Any]) -> Any:
    result: Any = 1
    for value in values:
        a, b = _number(result), _number(value)
        result = a * b if a is not None and b is not None else _wide(result) * _wide(value)
    return result


def _pieces_of(extent: Any, step: int) -> Any:
    number = _number(extent)
    return -(-number // step) if number is not None else T.floordiv(_wide(extent) + (step - 1), T.int64(step))


def _cost(nest: Nest) -> int:
    """Rough operations per point."""
    heavy = sum(name in ("exp", "erf", "tanh", "sigmoid", "log", "pow") for name in calls(nest.body))
    return 1 + 10 * heavy


class _Writer:
    def __init__(self, function: Function, cores: int) -> None:
        self.function, self.cores = function, cores
        self.math = use_vector_math if allows_vector_math(function.original.body) else lambda node: node

    # Outer loops

    def group(self, nests: list[tuple[Nest, Plan]], rows: int) -> None:
        """Emit nests that share their first ``rows`` axes, or a single nest."""
        first, plan = nests[0]
        if len(nests) > 1:
            outer = [(axis, 1) for axis in first.spatial[:rows]]
        else:
            outer = plan.outer
        work = [
            _product([_cost(nest), *(a.extent for a in nest.axes if not any(a is b for b, _ in outer))])
            for nest, _ in nests
        ]
        per_piece = _product([sum(w if (w := _number(x)) is not None else _GRAIN // 16 for x in work)])
        if len(nests) == 1:
            per_piece = _product([work[0], *(min(step, axis.static or step) for axis, step in outer)])

        def inside(ranges: dict[int, Range]) -> None:
            for nest, own in nests:
                env: Environment = {}
                mine: dict[int, Range] = {}
                for i, (axis, step) in enumerate(outer):
                    begin, length = ranges[i]
                    target = nest.spatial[i] if len(nests) > 1 else axis
                    if step == 1:
                        env[target.var] = _as(begin, target.var)
                    else:
                        mine[id(target)] = (begin, length)
                self.nest(nest, own, env, mine)

        self._outer(outer, per_piece, inside)

    def _outer(self, outer: list[tuple[Axis, int]], work: Any, inside: Callable[[dict[int, Range]], None]) -> None:
        counts = [_pieces_of(axis.extent, step) for axis, step in outer]
        total = _product(counts)

        def piece(i: int, at: Any) -> Range:
            axis, step = outer[i]
            if step == 1:
                return at, 1
            begin = at * step
            if axis.static is not None and axis.static % step == 0:
                return begin, step
            return begin, v.let(T.min(T.int64(step), _wide(axis.extent) - begin))

        def nested(i: int, ranges: dict[int, Range]) -> None:
            if i == len(outer):
                inside(ranges)
            elif _number(counts[i]) == 1:
                axis, step = outer[i]
                nested(i + 1, ranges | {i: (T.int64(0), axis.extent if step > 1 else 1)})
            else:
                with T.serial(_wide(counts[i])) as at:
                    nested(i + 1, ranges | {i: piece(i, at)})

        fixed = _number(_product([total, work]))
        if self.cores <= 1 or _number(total) == 1 or (fixed is not None and fixed <= _GRAIN):
            nested(0, {})
            return
        grain = _number(work)
        share = max(1, _GRAIN // max(grain, 1)) if grain is not None else None
        share = (
            T.int64(share)
            if share is not None
            else T.max(T.int64(1), T.floordiv(T.int64(_GRAIN), T.max(work, T.int64(1))))
        )
        share = v.let(share)
        with T.If(_wide(total) <= share):
            with T.Then():
                nested(0, {})
            with (
                T.Else(),
                T.parallel(T.floordiv(_wide(total) + share - 1, share)) as chunk,
                T.serial(chunk * share, T.min(_wide(total), (chunk + 1) * share)) as flat,
            ):
                ranges: dict[int, Range] = {}
                rest = flat
                for i in reversed(range(len(outer))):
                    at = rest if i == 0 else v.let(T.floormod(rest, _wide(counts[i])))
                    rest = rest if i == 0 else v.let(T.floordiv(rest, _wide(counts[i])))
                    ranges[i] = piece(i, at)
                inside(ranges)

    # One nest

    def nest(self, nest: Nest, plan: Plan, env: Environment, ranges: dict[int, Range]) -> None:
        """Emit the part of a nest that ``env`` (fixed axes) and ``ranges`` (others, by id; whole if absent) name."""
        free = [a for a in nest.spatial if a.var not in env]
        if plan.kind == "loops":
            self._loops(free, env, ranges, lambda e: self._point(nest, e))
            return
        tiles = [(axis, n) for axis, n in plan.tiles if any(axis is a for a in free)]
        if plan.kind == "columns" and not any(axis is plan.vector for axis, _ in tiles):
            raise AssertionError("the vector axis was fixed from outside")
        others = [a for a in free if not any(a is axis for axis, _ in tiles)]
        emit = self._columns if plan.kind == "columns" else self._rows
        self._loops(others, env, ranges, lambda e: emit(nest, plan, tiles, e, ranges))

    def _loops(
        self, axes: list[Axis], env: Environment, ranges: dict[int, Range], inner: Callable[[Environment], None]
    ) -> None:
        if not axes:
            inner(env)
            return
        axis, *rest = axes
        begin, length = ranges.get(id(axis), (0, axis.extent))
        if _number(length) == 1:
            self._loops(rest, env | {axis.var: _as(begin, axis.var)}, ranges, inner)
            return
        with T.serial(_wide(length)) as i:
            self._loops(rest, env | {axis.var: _as(begin + i, axis.var)}, ranges, inner)

    def _emit(self, statement: Any, env: Environment) -> None:
        env = dict(env)
        for part in statement.seq if isinstance(statement, tirx.SeqStmt) else [statement]:
            if isinstance(part, tirx.Bind):
                # The same statements may be written more than once; a name is bound only once.
                env[part.var] = tirx.Var(part.var.name, part.var.ty)
                part = tirx.Bind(env[part.var], part.value)
            B.add_to_parent(self.math(substitute(part, env)))

    def _point(self, nest: Nest, env: Environment) -> None:
        if not nest.reduced:
            self._emit(nest.body, env)
            return
        store = nest.store
        if store is None:
            self._emit(nest.init, env)
            self._loops(nest.reduced, env, {}, lambda e: self._emit(nest.body, e))
            return
        acc = B.alloc_buffer((1,), str(store.buffer.dtype))
        v.store(acc, [0], self._value(nest.init.value, env), 1)
        self._loops(
            nest.reduced, env, {}, lambda e: v.store(acc, [0], self._value(store.value, e, store.buffer, acc[0]), 1)
        )
        self._finish(nest, env, acc[0])

    def _value(self, value: Any, env: Environment, target: Any = None, stand_in: Any = None) -> Any:
        """An expression at a point, with the element being reduced replaced by its register."""
        if target is not None:
            value = replace_loads(value, target, lambda _: stand_in)
        return self.math(substitute(value, env))

    def _finish(self, nest: Nest, env: Environment, result: Any) -> None:
        store = nest.store
        if nest.final is None:
            B.buffer_store(store.buffer, result, [substitute(i, env) for i in store.indices])
            return
        value = self._value(nest.final.value, env, store.buffer, result)
        B.buffer_store(nest.final.buffer, value, [substitute(i, env) for i in nest.final.indices])

    def _columns(self, nest: Nest, plan: Plan, tiles: list, env: Environment, ranges: dict[int, Range]) -> None:
        (vector, vectors), *rest = tiles
        store, lanes = nest.store, plan.lanes
        dtype = str(store.buffer.dtype)

        def block(v0: Any, points: int, t0: Any, rows: int) -> None:
            width = min(lanes, points)
            count = points // width
            acc = B.alloc_buffer((rows * count * width,), dtype)

            def each(env: Environment, do: Callable[[Environment, Any], None]) -> None:
                for r in range(rows):
                    for c in range(count):
                        here = env | ({rest[0][0].var: _as(t0 + r, rest[0][0].var)} if rest else {})
                        base = (r * count + c) * width
                        if width == 1:
                            do(here | {vector.var: _as(v0 + c, vector.var)}, base)
                        else:
                            with T.vectorized(T.int64(width)) as lane:
                                do(here | {vector.var: _as(v0 + c * width + lane, vector.var)}, base + lane)

            each(env, lambda e, at: B.buffer_store(acc, self._value(nest.init.value, e), [at]))
            self._loops(
                nest.reduced,
                env,
                {},
                lambda inner: each(
                    inner, lambda e, at: B.buffer_store(acc, self._value(store.value, e, store.buffer, acc[at]), [at])
                ),
            )
            each(env, lambda e, at: self._finish(nest, e, acc[at]))

        def across(v0: Any, points: int) -> None:
            if not rest:
                block(v0, points, 0, 1)
                return
            axis, rows = rest[0]
            begin, length = ranges.get(id(axis), (0, axis.extent))
            _cut(begin, length, [rows, 1], lambda t0, n: block(v0, points, t0, n))

        begin, length = ranges.get(id(vector), (0, vector.extent))
        # What is left over after whole vectors goes into shorter ones, all of them if their number is known.
        shorter = [lanes >> i for i in range(1, lanes.bit_length())] if _number(length) is not None else [lanes // 4, 1]
        _cut(begin, length, sorted({vectors * lanes, lanes, *(n for n in shorter if n), 1}, reverse=True), across)

    def _rows(self, nest: Nest, plan: Plan, tiles: list, env: Environment, ranges: dict[int, Range]) -> None:
        found = combination(nest)
        assert found is not None and plan.vector is not None
        store, lanes, vector = nest.store, plan.lanes, plan.vector
        dtype = str(store.buffer.dtype)
        others = [a for a in nest.reduced if a is not vector]
        term, combine, name = found.term, found.combine, v.let if found.is_sum else v.held

        def block(points: list[Environment]) -> None:
            unroll = max(1, 4 // len(points))
            acc = B.alloc_buffer((len(points) * unroll * lanes,), dtype)
            single = B.alloc_buffer((len(points),), dtype)
            for i, point in enumerate(points):
                start = self._value(nest.init.value, point)
                v.store(single, [i], start, 1)
                # A sum starts once, in `single`; a maximum may start in every lane.
                identity = v.const(0, lanes, dtype) if found.is_sum else v.splat(start, lanes)
                for u in range(unroll):
                    v.store(acc, [(i * unroll + u) * lanes], identity, lanes)

            def along(env: Environment) -> None:
                def step(k0: Any, size: int) -> None:
                    for i, point in enumerate(points):
                        if size == 1:
                            value = self._value(term, env | point | {vector.var: _as(k0, vector.var)})
                            v.store(single, [i], combine(single[i], value), 1)
                            continue
                        for u in range(size // lanes):
                            with T.vectorized(T.int64(lanes)) as lane:
                                k = _as(k0 + u * lanes + lane, vector.var)
                                at = (i * unroll + u) * lanes + lane
                                value = self._value(term, env | point | {vector.var: k})
                                B.buffer_store(acc, combine(acc[at], value), [at])

                _cut(0, vector.extent, sorted({unroll * lanes, lanes, 1}, reverse=True), step)

            self._loops(others, env, {}, along)
            for i, point in enumerate(points):
                parts = [v.let(v.load(acc, [(i * unroll + u) * lanes], lanes)) for u in range(unroll)]
                whole = parts[0]
                for part in parts[1:]:
                    whole = name(combine(whole, part))
                result = v.let(combine(v.reduce_lanes(whole, lanes, combine, name), single[i]))
                self._finish(nest, env | point, result)

        def tile(remaining: list, points: list[Environment]) -> None:
            if not remaining:
                block([env | point for point in points])
                return
            (axis, n), *inner = remaining
            begin, length = ranges.get(id(axis), (0, axis.extent))

            def at(start: Any, size: int) -> None:
                tile(inner, [p | {axis.var: _as(start + i, axis.var)} for p in points for i in range(size)])

            _cut(begin, length, [n, 1] if n > 1 else [1], at)

        tile(tiles, [{}])


def _as(value: Any, var: Any) -> Any:
    """A position in the type of the axis variable it stands for."""
    dtype = str(var.ty.dtype)
    if isinstance(value, int):
        return tirx.IntImm(dtype, value)
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def _cut(begin: Any, length: Any, sizes: list[int], body: Callable[[Any, int], None]) -> None:
    """Cover ``[begin, begin + length)`` with as many pieces of ``sizes[0]`` as fit, then of ``sizes[1]``, and so on."""
    start, rest = begin, length
    for size in sizes:
        number = _number(rest)
        if number == 0:
            return
        if number is not None:
            count: Any = number // size
            if count == 0:
                continue
            left: Any = number - count * size
        else:
            count = v.let(T.floordiv(_wide(rest), T.int64(size))) if size > 1 else rest
            left = _wide(rest) - count * size
        if count == 1:
            body(start, size)
        else:
            with T.serial(_wide(count)) as i:
                body(start + i * size, size)
        start = start + count * size
        rest = left if size > 1 else 0
