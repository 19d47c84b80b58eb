"""One pass over the graph: every operator's rule sees the index maps of its inputs, states its constraints, and gives
the index maps of its outputs.

A value has a *layout*: a tuple of index maps over different axes, one per independently transformed factor. Activations
usually have one (their channels); a weight ``(K, N)`` has two. A value without maps is not transformed at all.

The channels of a constant may be transformed freely, because it can be rewritten; so coordinates are born at constants.
Everything that cannot be rewritten (graph inputs and outputs, operators without a rule) pins the coordinates it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, constant, module_path
from qcompile.passes.spaces.groups import FIXED, GL, POSITIVE, Limit
from qcompile.passes.spaces.index_map import Dim, IndexMap
from qcompile.passes.spaces.prepare import copies_of
from qcompile.passes.spaces.relations import Constraints
from qcompile.passes.spaces.stacks import Choice, choice_of, follow, summed_axes

Layout = tuple[IndexMap, ...]
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


class Walk:
    """State of the pass.

    Attributes:
        constraints: the facts collected so far.
        layouts: index maps of activations.
        constants: index maps of constants that a rule has claimed.
        constant_values: values that depend on constants only.
        promoted: vectors that would stand in for numbers, with the nodes and inputs that would read them.
        choices: values behind a stack of matrices, and what chooses between them.
        opaque: constants that a node reads without a rule that says what becomes of their channels.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.constraints = Constraints(copies=copies_of(model))
        self.layouts: dict[ir.Value, Layout] = {}
        self.constants: dict[ir.Value, Layout] = {}
        self.promoted: list[tuple[ir.Value, ir.Node, int]] = []
        self.choices: dict[ir.Value, Choice] = {}
        self.opaque: set[ir.Value] = set()
        self.constant_values: set[ir.Value] = set(model.graph.initializers.values()) - set(model.graph.inputs)

    def run(self) -> None:
        """Visit all nodes in graph order, then pin what leaves the graph."""
        from qcompile.passes.spaces.rules import RULES

        for node in self.model.graph:
            if node.inputs and all(v is None or v in self.constant_values for v in node.inputs):
                self.constant_values.update(node.outputs)
            view = NodeView(self, node)
            key = (node.domain if node.domain != "ai.onnx" else "", node.op_type)
            rule = RULES.get(key)
            if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
                self._pin_captured(view)
            elif rule is None:
                view.pin_inputs(f"no rule for operator {node.domain or 'ai.onnx'}::{node.op_type}")
            elif rule.always or any(v is not None and self.layout(v) for v in node.inputs):
                self._follow_choices(view, rule.pointwise)
                rule.apply(view)
            self.opaque |= {v for v in node.inputs if v in self.constant_values and not self.layout(v)}
        for value in self.model.graph.outputs:
            for index_map in self.layout(value):
                self.constraints.pin("graph", "output", "output", index_map.flat, f"graph output {value.name!r}")

    def _follow_choices(self, view: NodeView, pointwise: bool) -> None:
        """Results are chosen as the inputs are; if an operator moves the positions, all matrices share their channels."""
        chosen = {i: self.choices[v] for i, v in enumerate(view.node.inputs) if v in self.choices and self.layout(v)}
        if not chosen:
            return
        choice = follow(view.node, chosen, pointwise)
        if choice is None:
            for i in chosen:
                for index_map in view.maps(i):
                    self.constraints.tie(index_map.table)
        else:
            self.choices.update(dict.fromkeys(view.node.outputs, choice))

    def layout(self, value: ir.Value) -> Layout:
        """Index maps of a value, empty if it is not transformed."""
        return self.layouts.get(value) or self.constants.get(value) or ()

    def _pin_captured(self, view: NodeView) -> None:
        """A node with sub-graphs also reads the outer values that its bodies capture."""
        reason = f"operator {view.node.op_type} has a sub-graph"
        view.pin_inputs(reason)
        for attr in view.node.attributes.values():
            graphs = attr.value if attr.type == ir.AttributeType.GRAPHS else [attr.value]
            for graph in graphs if isinstance(graphs, (list, tuple)) else [graphs]:
                if not isinstance(graph, ir.Graph):
                    continue
                for inner in graph.all_nodes():
                    for value in inner.inputs:
                        if value is not None:
                            for index_map in self.layout(value):
                                view.pin(index_map.table, "captured", reason)
                            if value in self.constant_values and not self.layout(value):
                                self.opaque.add(value)


class NodeView:
    """What a rule sees of one node."""

    def __init__(self, walk: Walk, node: ir.Node) -> None:
        self.walk, self.node = walk, node
        self.c = walk.constraints
        self.op = node.op_type
        self.name = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
        self.where = module_path(node)

    # -- inputs and outputs ----------------------------------------------------------------------------------------

    def has(self, i: int) -> bool:
        """Whether input ``i`` is present."""
        return i < len(self.node.inputs) and self.node.inputs[i] is not None

    def value(self, i: int) -> ir.Value:
        """Input ``i``, which must be present."""
        value = self.node.inputs[i]
        assert value is not None
        return value

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return attribute(self.node, name, default)

    def array(self, i: int) -> np.ndarray | None:
        """The value of a constant input, loaded; use it for small integers and scalars only."""
        return constant(self.node.inputs[i]) if self.has(i) else None

    def is_constant(self, i: int) -> bool:
        """Whether input ``i`` depends on constants only."""
        return self.has(i) and self.value(i) in self.walk.constant_values

    def is_float(self, i: int) -> bool:
        """Whether input ``i`` is a floating point tensor (unknown types count as float)."""
        dtype = self.value(i).dtype
        return dtype is None or dtype in _FLOATS

    def shape(self, i: int) -> tuple[Dim, ...] | None:
        """Sizes of input ``i``; None if not even the rank is known."""
        return dims(self.value(i))

    def out_shape(self, j: int = 0) -> tuple[Dim, ...] | None:
        """Sizes of output ``j``."""
        return dims(self.node.outputs[j])

    def maps(self, i: int) -> Layout:
        """Index maps of input ``i``."""
        return self.walk.layout(self.value(i)) if self.has(i) else ()

    def set(self, maps: Sequence[IndexMap], j: int = 0) -> None:
        """Give output ``j`` its index maps. A map that varies nowhere could only scale the whole tensor: it is pinned."""
        for m in maps:
            if not m.axes:
                self.pin(m.table, "output", "all its channels share one basis")
        if j < len(self.node.outputs):
            self.walk.layouts[self.node.outputs[j]] = tuple(m for m in maps if m.axes)

    # -- constants -------------------------------------------------------------------------------------------------

    def claim(self, i: int, axes: Sequence[int], *, reader: bool = False, movable: bool = True) -> IndexMap | None:
        """Index map of constant input ``i`` along ``axes``; its first user decides how it is split into factors.

        Along several axes the last one is mixed within each index of the others (expert or head weights), which may
        trade places as a whole if ``movable``. Returns None if the constant is already split in another way.
        """
        value, shape = self.value(i), self.shape(i)
        assert shape is not None
        wanted = tuple(a % len(shape) for a in axes)
        varying = {a for a in wanted if shape[a] != 1}
        existing = self.walk.layout(value)
        for index_map in existing:
            if set(index_map.axes) == varying:
                return index_map
        touched = {a for m in existing for a in m.axes}
        if wanted[-1] in touched or not all(isinstance(shape[a], int) for a in wanted):
            return None
        if value not in self.walk.constant_values:
            return None
        sizes = [shape[a] if a in wanted else 1 for a in range(len(shape))]
        count = int(np.prod(sizes))  # type: ignore[arg-type]
        coordinates = self.c.fresh(count, value.name or self.name, wanted, reader=reader)
        rows = np.arange(count) // max(1, int(shape[wanted[-1]])) if len(wanted) > 1 else None  # type: ignore[arg-type]
        self.c.use(self.name, "constant", "axis", coordinates, GL, mix=rows, unit=rows if movable else None)
        index_map = IndexMap(coordinates.reshape(sizes))
        if not varying:
            self.pin(coordinates, "constant", "a single channel")
        if (producer := value.producer()) is not None:
            self.pin(coordinates, "constant", f"{value.name!r} is computed from constants by {producer.op_type}")
        elif value in self.walk.opaque:
            self.pin(coordinates, "constant", f"{value.name!r} is also read by an operator that must see it as it is")
        self.walk.constants[value] = (*self.walk.constants.get(value, ()), index_map)
        return index_map

    def choose(self, i: int, index: ir.Value, positions: Sequence[Dim]) -> None:
        """Constant input ``i`` is a stack along its first axis, from which ``index`` picks a matrix at every position.

        Each matrix gets a basis of its own on each of its axes; the first output has those of the matrix picked.
        """
        shape = self.shape(i)
        assert shape is not None
        maps, summed = [], summed_axes(self.node.outputs[0])
        for axis in range(1, len(shape)):
            reader = axis - len(shape) in summed
            if shape[axis] != 1 and (stack := self.claim(i, [0, axis], reader=reader, movable=False)) is not None:
                if not np.array_equal(np.diff(stack.flat), np.ones(stack.size - 1)):
                    self.pin(
                        stack.table, "stack", "its matrices were laid out in another order before they are indexed"
                    )
                    continue
                # The index names matrices by their places, so they keep them.
                places = np.broadcast_to(
                    np.arange(len(stack.table)).reshape(-1, *(1,) * (len(shape) - 1)), stack.table.shape
                )
                self.use(stack.table, "stack", mix=places, color=places)
                self.c.stacks.add(stack.table)
                maps.append(IndexMap(stack.table[0].reshape((1,) * len(positions) + stack.table.shape[1:])))
        self.walk.choices[self.node.outputs[0]] = choice_of(index, positions, len(shape) - 1)
        self.set(maps)

    def promote(self, i: int, like: IndexMap) -> IndexMap:
        """Treat the number at input ``i`` as a vector with one entry per channel of ``like``.

        ``x + 1`` becomes ``x + (1, ..., 1)``, which can be scaled. The vector is written into the model only if the
        analysis finds that something may act on it.
        """
        number = self.value(i)
        shape = [like.table.shape[a] for a in range(like.rank)]
        fill = constant(number)
        assert fill is not None and fill.size == 1
        name = f"{number.name}.{self.name}"
        vector = ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(number.dtype or ir.DataType.FLOAT),
            const_value=ir.tensor(np.full(shape, fill.reshape(-1)[0]), name=name),
        )
        coordinates = self.c.fresh(like.size, name, like.axes).reshape(shape)
        self.use(coordinates, "number", POSITIVE, single=True)
        self.walk.promoted.append((vector, self.node, i))
        self.walk.constants[vector] = (IndexMap(coordinates),)
        return IndexMap(coordinates)

    def fresh_like(self, index_map: IndexMap, role: str = "output") -> IndexMap:
        """New coordinates for output channels arranged as in ``index_map``, which do not mix."""
        name = self.node.outputs[0].name or self.name
        return IndexMap(self.c.fresh_like(index_map.table, name, index_map.axes))

    # -- constraints -----------------------------------------------------------------------------------------------

    def use(self, table: np.ndarray, role: str, limit: Limit = GL, **keys: Any) -> None:
        """Record this node's view of some coordinates; see `Constraints.use`."""
        self.c.use(self.name, self.op, role, table, limit, **keys)

    def fixed(self, maps: Sequence[IndexMap], role: str, reason: str = "") -> None:
        """Permutations only."""
        for index_map in maps:
            self.use(index_map.table, role, FIXED, single=True, reason=reason)

    def pin(self, table: np.ndarray, role: str, reason: str) -> None:
        """Identity only."""
        self.c.pin(self.name, self.op, role, table, reason)

    def pin_inputs(self, reason: str) -> None:
        """Identity only on all channels of all inputs; outputs get none."""
        for i in range(len(self.node.inputs)):
            if self.has(i):
                for index_map in self.maps(i):
                    self.pin(index_map.table, f"input {i}", reason)

    def units_of(self, index_map: IndexMap, axes: Sequence[int]) -> IndexMap:
        """New coordinates for the indices along ``axes`` (heads, groups): only their order can change.

        Within each of them ``index_map`` may be mixed; their units move together with the new coordinates.
        """
        shape = [index_map.table.shape[a] if a in axes else 1 for a in range(index_map.rank)]
        name = self.node.outputs[0].name or self.name
        coordinates = self.c.fresh(int(np.prod(shape)), name, tuple(axes), constant=False)
        units = IndexMap(coordinates.reshape(shape))
        self.use(units.table, "units", FIXED, single=True)
        self.move_with(index_map, units)
        return units

    def move_with(self, index_map: IndexMap, units: IndexMap) -> None:
        """Channels of ``index_map`` mix only within the index of ``units`` they belong to, and move with it."""
        shape = index_map.table.shape
        blocks = np.broadcast_to(np.arange(units.size).reshape(units.table.shape), shape)
        self.use(index_map.table, "per unit", GL, mix=blocks, unit=blocks)
        self.c.unit_link(index_map.table, np.broadcast_to(units.table, shape))

    def is_zero(self, i: int) -> bool:
        """Whether input ``i`` is known to be all zeros."""
        return _is_zero(self.value(i), 8)

    def is_uniform(self, i: int) -> bool:
        """Whether input ``i`` is a constant vector of equal entries."""
        shape = self.shape(i)
        if not self.has(i) or not self.is_constant(i) or shape is None or sum(d != 1 for d in shape) > 1:
            return False
        array = self.array(i)
        return array is not None and bool((array == array.reshape(-1)[:1]).all())

    def tie(self, index_map: IndexMap, axes: Sequence[int]) -> IndexMap:
        """Give all positions along ``axes`` one basis, so that the map no longer varies there."""
        table = index_map.table
        for axis in axes:
            if table.shape[axis] != 1:
                first = np.take(table, [0], axis)
                self.c.same(np.broadcast_to(first, table.shape), table)
                table = first
        return IndexMap(table)


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """Sizes of a value: int, symbol name, or None where unknown."""
    shape = value.shape
    if shape is None and value.const_value is not None:
        shape = value.const_value.shape  # type: ignore[assignment]
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def _is_zero(value: ir.Value | None, depth: int) -> bool:
    if value is None or depth == 0:
        return False
    node = value.producer()
    if node is None:
        if value.const_value is None or value.is_graph_input() or value.const_value.size > 1 << 12:
            return False
        return not np.any(value.const_value.numpy())
    if node.op_type == "ConstantOfShape":
        fill = attribute(node, "value")
        return fill is None or not np.any(fill.numpy())  # type: ignore[attr-defined]
    if node.op_type == "Mul":
        return any(_is_zero(v, depth - 1) for v in node.inputs)
    if node.op_type in ("Expand", "Cast", "Reshape", "Identity", "Unsqueeze"):
        return _is_zero(node.inputs[0], depth - 1)
    return False
