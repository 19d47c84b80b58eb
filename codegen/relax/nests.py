"""Loop nests: what a legalized TIR function computes, as a list of assignments over axes.

    for every point of the spatial axes: target[...] = init, then for every point of the reduction axes: target[...] = value

Relax's legalization writes each operator as one or a few such nests, fusion concatenates them. `parse` reads them back,
`simplify` merges what need not go through memory: element-wise producers into their readers, and element-wise
consumers into the end of the reduction they read. A function that is not of this form is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.sym import Analyzer

_LARGE = 400
"""Expressions beyond this many nodes are not grown further by inlining."""

_EXPENSIVE = (
    "exp",
    "erf",
    "tanh",
    "sigmoid",
    "log",
    "pow",
    "sin",
    "cos",
    "tan",
    "sqrt",
    "rsqrt",
    "atan",
    "floor",
    "fmod",
)


class NotANest(Exception):
    """The function is not a sequence of simple loop nests; the message says what it has instead."""


@dataclass(eq=False)
class Axis:
    """One loop: ``var`` runs over ``[0, extent)``."""

    var: Any
    extent: Any
    reduce: bool = False

    @property
    def static(self) -> int | None:
        """The extent if it is a number."""
        return int(self.extent) if isinstance(self.extent, tirx.IntImm) else None


@dataclass(eq=False)
class Nest:
    """One assignment over axes.

    Attributes:
        axes: from the slowest to the fastest, in the order the legalization chose.
        body: the statement at each point: a BufferStore, or several statements (`store` is None then).
        init: the statement that starts a reduction, else None.
        final: for a reduction followed by an element-wise consumer: the consumer's store, reading the finished
            element of the reduction. The reduction's own buffer is then not written.
    """

    name: str
    axes: list[Axis]
    body: Any
    init: Any = None
    final: Any = None

    @property
    def store(self) -> Any:
        """The body if it is one BufferStore, else None."""
        return self.body if isinstance(self.body, tirx.BufferStore) else None

    @property
    def output(self) -> Any:
        """The store that is visible to others, or None for a body of several statements."""
        return self.final if self.final is not None else self.store

    @property
    def spatial(self) -> list[Axis]:
        """The axes of the result."""
        return [a for a in self.axes if not a.reduce]

    @property
    def reduced(self) -> list[Axis]:
        """The axes summed (or otherwise combined) over."""
        return [a for a in self.axes if a.reduce]


@dataclass
class Function:
    """The nests of one PrimFunc in order, and the buffers that live inside it."""

    original: tirx.PrimFunc
    nests: list[Nest] = field(default_factory=list)
    locals: list[Any] = field(default_factory=list)


def substitute(node: Any, variables: dict[Any, Any]) -> Any:
    """Replace variables in an expression or statement."""
    return tvm_ffi.structural_map(node, (tirx.Var, lambda var: variables.get(var, var)), order="post")


def loads(node: Any) -> list[Any]:
    """Every read of a buffer in an expression or statement."""
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (TensorLoad, lambda load: found.append(load)))
    return found


def stores(nest: Nest) -> list[Any]:
    """Every write of a nest that others can see."""
    if nest.final is not None:
        return [nest.final]
    found: list[Any] = []
    tvm_ffi.structural_walk(nest.body, (tirx.BufferStore, lambda store: found.append(store)))
    return found


def size(node: Any) -> int:
    """Number of nodes."""
    count = 0

    def visit(_: Any) -> None:
        nonlocal count
        count += 1

    tvm_ffi.structural_walk(node, (tirx.Expr, visit))
    return count


def calls(node: Any) -> Iterator[str]:
    """Names of the operators called, without their dialect."""
    found: list[str] = []
    tvm_ffi.structural_walk(
        node, (Call, lambda call: found.append(str(getattr(call.op, "name", "")).rpartition(".")[2]))
    )
    yield from found


def uses(node: Any, var: Any) -> bool:
    """Whether ``var`` occurs."""
    found = False

    def visit(other: Any) -> None:
        nonlocal found
        found = found or other.same_as(var)

    tvm_ffi.structural_walk(node, (tirx.Var, visit))
    return found


def replace_loads(node: Any, buffer: Any, make: Callable[[list[Any]], Any]) -> Any:
    """Replace every read of ``buffer`` by ``make(indices)``."""

    def visit(load: Any) -> Any:
        return make(list(load.indices)) if load.source.same_as(buffer) else load

    return tvm_ffi.structural_map(node, (TensorLoad, visit), order="post")


def stride(index: Any, var: Any, analyzer: Analyzer) -> int | None:
    """By how much ``index`` grows when ``var`` grows by one; None if that is not a constant."""
    if not uses(index, var):
        return 0
    step = analyzer.simplify(substitute(index, {var: var + 1}) - index)
    return int(step) if isinstance(step, tirx.IntImm) else None


def access(load: Any, var: Any, analyzer: Analyzer) -> int | None:
    """How far apart in memory consecutive points of an axis read: 0, 1, or None for anything else."""
    if not len(load.indices):
        return 0
    *outer, last = load.indices
    if any(stride(index, var, analyzer) != 0 for index in outer):
        return None
    step = stride(last, var, analyzer)
    return step if step in (0, 1) else None


def parse(function: tirx.PrimFunc) -> Function:
    """Read the nests of a function.

    Raises:
        NotANest: it has another form.
    """
    root = function.body
    if not isinstance(root, SBlockRealize):
        raise NotANest("the body has no root block")
    block = root.block
    result = Function(function, locals=list(block.alloc_buffers))
    statements = list(block.body.seq) if isinstance(block.body, tirx.SeqStmt) else [block.body]
    for statement in statements:
        result.nests.append(_parse_nest(statement))
    return result


def _parse_nest(statement: Any) -> Nest:
    loops: dict[Any, Any] = {}
    while isinstance(statement, tirx.For):
        if statement.kind != tirx.ForKind.SERIAL or statement.annotations:
            raise NotANest("a loop is already scheduled")
        if not isinstance(statement.min, tirx.IntImm) or int(statement.min) != 0:
            raise NotANest("a loop does not start at 0")
        loops[statement.loop_var] = statement.extent
        statement = statement.body
    if not isinstance(statement, SBlockRealize):
        raise NotANest(f"a {type(statement).__name__} stands where a block was expected")
    block: SBlock = statement.block
    if not (isinstance(statement.predicate, tirx.IntImm) and int(statement.predicate) == 1):
        raise NotANest(f"block {block.name_hint} has a predicate")
    if block.alloc_buffers or block.match_buffers:
        raise NotANest(f"block {block.name_hint} has buffers of its own")
    axes, bound = [], set()
    for axis, value in zip(block.iter_vars, statement.iter_values):
        if value in loops and value not in bound:
            bound.add(value)
        elif not (isinstance(value, tirx.IntImm) and int(value) == 0):
            raise NotANest(f"an axis of block {block.name_hint} is not one loop")
        if axis.iter_type not in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce):
            raise NotANest(f"block {block.name_hint} has an axis that is neither spatial nor a reduction")
        axes.append(Axis(axis.var, axis.dom.extent, axis.iter_type == tirx.IterVar.CommReduce))
    if len(bound) != len(loops):
        raise NotANest(f"block {block.name_hint} does not use all loops around it")
    _check_body(block.body, block.name_hint)
    return Nest(block.name_hint, axes, block.body, block.init)


def _check_body(body: Any, name: str) -> None:
    def refuse(statement: Any) -> None:
        raise NotANest(f"block {name} contains a {type(statement).__name__}")

    nested = (tirx.For, tirx.While, tirx.IfThenElse, SBlockRealize, tirx.AllocBuffer, tirx.AttrStmt, tirx.Evaluate)
    tvm_ffi.structural_walk(body, (nested, refuse))


def simplify(function: Function) -> None:
    """Merge nests through which data need not pass, in place."""
    for nest in list(function.nests):
        _inline(function, nest)
    for nest in list(function.nests):
        _absorb(function, nest)


def plain_indices(indices: list[Any], axes: list[Axis]) -> list[Axis | None] | None:
    """The axes an access is indexed by, position by position (None for a constant 0), if it has that form."""
    found: list[Axis | None] = []
    for index in indices:
        axis = next((a for a in axes if index.same_as(a.var)), None)
        if axis is None and not (isinstance(index, tirx.IntImm) and int(index) == 0):
            return None
        if axis is not None and axis in found:
            return None
        found.append(axis)
    return found


def _covers(found: list[Axis | None] | None, axes: list[Axis]) -> bool:
    """Whether every axis of more than one point is among those found."""
    return found is not None and all(a in found or a.static == 1 for a in axes)


def _readers(function: Function, buffer: Any, but: Nest) -> list[tuple[Nest, list[Any]]]:
    found = []
    for nest in function.nests:
        parts = [part for part in (nest.body, nest.init, nest.final) if part is not None]
        here = [load for part in parts for load in loads(part) if load.source.same_as(buffer)]
        if here and nest is not but:
            found.append((nest, here))
    return found


def _is_local(function: Function, buffer: Any) -> bool:
    return any(b.same_as(buffer) for b in function.locals)


def _drop(function: Function, nest: Nest, buffer: Any) -> None:
    function.nests.remove(nest)
    function.locals = [b for b in function.locals if not b.same_as(buffer)]


def _zero(var: Any) -> Any:
    return tirx.IntImm(str(var.ty.dtype), 0)


def _inline(function: Function, nest: Nest) -> None:
    """Compute an element-wise nest where it is read, if that saves more memory traffic than it repeats work."""
    store = nest.store
    if store is None or nest.reduced or not _is_local(function, store.buffer):
        return
    positions = plain_indices(list(store.indices), nest.axes)
    readers = _readers(function, store.buffer, nest)
    if positions is None or not _covers(positions, nest.axes):
        return
    value, constant = store.value, not loads(store.value)
    if _is_costly(value) and sum(len(here) for _, here in readers) > 1:
        return
    for reader, here in readers:
        if reader.store is None or (reader.init is not None and loads(reader.init)):
            return
        if size(reader.body) + len(here) * size(value) > _LARGE:
            return
        if reader.reduced and not constant and not _cheap_in_reduction(reader, here, value):
            return

    def make(indices: list[Any]) -> Any:
        at = {axis.var: index for axis, index in zip(positions, indices) if axis is not None}
        return substitute(value, {a.var: _zero(a.var) for a in nest.axes} | at)

    for reader, _ in readers:
        reader.body = replace_loads(reader.body, store.buffer, make)
    _drop(function, nest, store.buffer)


def _is_costly(value: Any) -> bool:
    costly = any(name in _EXPENSIVE for name in calls(value))

    def visit(node: Any) -> None:
        nonlocal costly
        costly = costly or str(node.ty.dtype).startswith("float")

    tvm_ffi.structural_walk(value, (tirx.Div, visit))
    return costly


def _cheap_in_reduction(reader: Nest, here: list[Any], value: Any) -> bool:
    """Whether a reduction may compute ``value`` on the fly: it is a mere read, or each element is read about once."""
    if any(name == "if_then_else" for name in calls(value)):
        return False  # branches would keep the reduction from being vectorised
    if isinstance(value, TensorLoad):
        return True
    long = [a for a in reader.axes if a.static is None or a.static > 4]
    return len(here) == 1 and all(any(uses(index, a.var) for index in here[0].indices) for a in long)


def _absorb(function: Function, nest: Nest) -> None:
    """Let a reduction finish with the element-wise nest that is the only reader of its result."""
    store = nest.store
    if store is None or not nest.reduced or nest.final is not None or not _is_local(function, store.buffer):
        return
    produced = plain_indices(list(store.indices), nest.spatial)
    readers = _readers(function, store.buffer, nest)
    if not _covers(produced, nest.spatial) or len(readers) != 1:
        return
    assert produced is not None
    consumer, here = readers[0]
    if (
        consumer.store is None
        or consumer.reduced
        or any(load.source.same_as(store.buffer) for load in loads(nest.init))
    ):
        return
    consumed = plain_indices(list(here[0].indices), consumer.axes)
    if not _covers(consumed, consumer.axes):
        return
    assert consumed is not None
    analyzer = Analyzer()
    if any(plain_indices(list(load.indices), consumer.axes) != consumed for load in here):
        return
    mapping = {a.var: _zero(a.var) for a in consumer.axes}
    for ours, theirs in zip(produced, consumed):
        if ours is None or theirs is None:
            if any(axis is not None and axis.static != 1 for axis in (ours, theirs)):
                return
            continue
        if not analyzer.can_prove_equal(ours.extent, theirs.extent):
            return
        mapping[theirs.var] = ours.var
    # The consumer moves up to the reduction: what else it reads must exist by then.
    before = function.nests[: function.nests.index(nest)]
    ready = [written.buffer for other in before for written in stores(other)]
    for load in loads(consumer.body):
        inside = _is_local(function, load.source) and not load.source.same_as(store.buffer)
        if inside and not any(load.source.same_as(buffer) for buffer in ready):
            return
    nest.final = substitute(consumer.body, mapping)
    function.nests.remove(consumer)
    function.locals = [b for b in function.locals if not b.same_as(store.buffer)]
