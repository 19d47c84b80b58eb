"""Emit the quantized model for ONNX Runtime, reading its weights from the kernels' packed bytes.

An artifact stores every weight once, in the order the kernels want. `model.onnx` refers to the same bytes as external
data and brings them back with standard operators (shift, mask, transpose); ONNX Runtime folds these into constants
when it loads the model. The last step is ``(codes - zero) * scale`` rather than DequantizeLinear, because ONNX Runtime
would fuse the latter with MatMul into a kernel that quantizes the activation a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.codegen.kernels.base import StoredCodes
from qcompile.codegen.kernels.cpu.experts import SHARED
from qcompile.codegen.kernels.cpu.levels import ENTRIES
from qcompile.formats import BitLayout
from qcompile.formats.superblock import SUPER


@dataclass(frozen=True)
class StoredWeight:
    """Where a quantized ``(K, N)`` weight lies in packed arrays.

    Attributes:
        codes: how the array ``weight`` holds its codes.
        names: of the packed arrays, by the packer's own names.
        start, stop: its columns, where several weights were merged or N was padded.
    """

    codes: StoredCodes
    names: Mapping[str, str]
    start: int
    stop: int

    def restore(self, emit: Emitter, node: ir.Node, array: Arrays) -> None:
        """Emit the weight in place of the node that dequantizes it."""
        _dequantize(emit, node, self, array)


@dataclass(frozen=True)
class StoredExperts(StoredWeight):
    """The same where each packed array but the table of levels has a first axis that counts experts."""

    def restore(self, emit: Emitter, node: ir.Node, array: Arrays) -> None:
        """Emit what picks packed bytes of experts and makes floats of these alone, and the products that read them."""
        products = list(dict.fromkeys(use.node for use in node.outputs[0].uses()))
        ids = products[0].inputs[2]
        assert ids is not None
        flat = emit("Reshape", ids, emit.constant(np.array([-1], np.int64)))

        def picked(name: str) -> tuple[ir.Value, list[int]]:
            whole = array(self.names[name])
            if name in SHARED:
                return whole, _dims(whole)
            return emit("Gather", whole, flat, axis=0), _dims(whole)[1:]

        weights = _matrix(emit, self, picked, 1)
        depth = int((self.codes.source >= 0).sum())
        for product in products:
            _expert_product(
                Emitter(emit.graph, product, f"{emit.prefix}.{product.name}", emit.constants), product, weights, depth
            )


View = tuple[ir.DataType, tuple[int, ...]]
"""Another dtype and shape for the bytes of a packed array."""


class Arrays(Protocol):
    """Packed arrays by name."""

    def __call__(self, name: str, view: View | None = None) -> ir.Value: ...


class Restorable(Protocol):
    """What `share_weights` is told of a weight."""

    def restore(self, emit: Emitter, node: ir.Node, array: Arrays) -> None:
        """See `StoredWeight.restore`."""


class Emitter:
    """Builds nodes before an anchor; every value gets a name under ``prefix``.

    ``constants`` may be shared by several emitters of one graph: equal constants are stored once.
    """

    def __init__(
        self, graph: ir.Graph, anchor: ir.Node, prefix: str, constants: dict[object, ir.Value] | None = None
    ) -> None:
        self.graph, self.anchor, self.prefix, self.count = graph, anchor, prefix, 0
        self.constants = {} if constants is None else constants

    def constant(self, array: np.ndarray) -> ir.Value:
        """A constant as an initializer."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key in self.constants:
            return self.constants[key]
        name = f"unpack.constant.{len(self.constants)}"
        value = ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        self.graph.register_initializer(value)
        self.constants[key] = value
        return value

    def __call__(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op, list(inputs), attributes=attributes, name=f"{self.prefix}.n{self.count}")
        node.outputs[0].name = f"{self.prefix}.v{self.count}"
        self.count += 1
        self.graph.insert_before(self.anchor, [node])
        return node.outputs[0]


def unpack(emit: Emitter, packed: ir.Value, layout: BitLayout, padded: tuple[int, int], lead: int = 0) -> ir.Value:
    """Emit the inverse of ``layout.pack``: a uint8 ``(K', N')`` value from the packed bytes.

    With ``lead`` 1 the first axis of both counts matrices.
    """
    sizes = layout.factors(*padded)
    names = layout.order.split()
    same = [0] * lead  # what ONNX's Reshape leaves as it is
    size = padded[0] * padded[1] * layout.bits // 8  # said, not left open: no matrix at all may have been picked
    flat = emit("Reshape", packed, emit.constant(np.array([*same, size, 1], np.int64)))
    fields = names[-1] == "b" and 8 % layout.bits == 0
    if fields:
        width, present = layout.bits, [n for n in names if n != "b"]
    else:
        width, present = 1, names
    if width < 8:
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        flat = emit("BitShift", flat, emit.constant(shifts), direction="RIGHT")
        flat = emit("BitwiseAnd", flat, emit.constant(np.array((1 << width) - 1, np.uint8)))
    split = emit("Reshape", flat, emit.constant(np.array([*same, *(sizes[n] for n in present)], np.int64)))
    axes = [f"k{i}" for i in range(len(layout.k))] + [f"n{i}" for i in range(len(layout.n))]
    target = axes if fields else [*axes, "b"]
    ordered = emit("Transpose", split, perm=[*range(lead), *(lead + present.index(a) for a in target)])
    if not fields:
        weights = (1 << np.arange(layout.bits)).astype(np.int32)
        wide = emit("Mul", emit("Cast", ordered, to=int(ir.DataType.INT32)), emit.constant(weights))
        last = emit.constant(np.array([-1], np.int64))
        ordered = emit("Cast", emit("ReduceSum", wide, last, keepdims=0), to=int(ir.DataType.UINT8))
    return emit("Reshape", ordered, emit.constant(np.array([*same, *padded], np.int64)))


def share_weights(
    model: ir.Model,
    stored: Mapping[str, Restorable],
    external: Callable[[str], ir.ExternalTensor],
    names: Collection[str],
) -> ir.Model:
    """Return a copy of the quantized ``model`` whose weights are read from packed arrays.

    Args:
        model: the quantized stage.
        stored: where a weight lies, by the name of its code initializer.
        external: the packed array of a name as an external tensor.
        names: arrays that hold initializers of the same name unchanged (embedding tables).
    """
    emitted = model.clone()
    graph = emitted.graph
    shared: dict[tuple[str, View | None], ir.Value] = {}
    constants: dict[object, ir.Value] = {}

    def array(name: str, view: View | None = None) -> ir.Value:
        if (name, view) not in shared:
            tensor = external(name)
            called = f"packed.{name}"
            if view is not None:
                called += f".{view[0].name.lower()}"
                tensor = ir.ExternalTensor(
                    tensor.location, tensor.offset, tensor.length, view[0], shape=ir.Shape(view[1]), name=called,
                    base_dir=tensor.base_dir,
                )  # fmt: skip
            value = ir.Value(name=called, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            graph.register_initializer(value)
            shared[name, view] = value
        return shared[name, view]

    for name, value in graph.initializers.items():
        if name in names:
            value.const_value = external(name)
    for index, node in enumerate(list(graph)):
        if not node.op_type.startswith("Dequantize") or node.inputs[0] is None:
            continue
        picked = node.inputs[0].producer()
        codes = picked.inputs[0] if picked is not None and picked.op_type == "PickColumns" else node.inputs[0]
        if codes is not None and (place := stored.get(codes.name or "")) is not None:
            # Short names: spelled out, they would take more room than the graph itself.
            place.restore(Emitter(graph, node, f"u{index}", constants), node, array)
            _remove(graph, node)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    _strip_metadata(emitted)
    return emitted


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node nothing reads, and what computed its parameters: nested scales, and what picks experts."""
    before = dict.fromkeys(value.producer() for value in node.inputs if value is not None)
    graph.remove(node, safe=True)
    for source in before:
        if source is not None and source.op_type in ("Mul", "PickColumns") and not source.outputs[0].uses():
            _remove(graph, source)


def unchanged(model: ir.Model, params: Mapping[str, np.ndarray]) -> set[str]:
    """Names of initializers that are parameters of the program as they are."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if name in params
        and value.const_value is not None
        and value.const_value.dtype.numpy() == params[name].dtype
        and np.array_equal(value.const_value.numpy(), params[name])
    }


def _strip_metadata(model: ir.Model) -> None:
    """Drop what exporters note beside nodes and values (stack traces, scopes, shapes): it outweighs the graph."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if not value.is_graph_output():  # inferred again by whoever wants it
                    value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()


def _dequantize(emit: Emitter, node: ir.Node, place: StoredWeight, array: Arrays) -> None:
    """Emit the float matrix in place of the node."""
    result = _matrix(emit, place, lambda name: (array(place.names[name]), _dims(array(place.names[name]))), 0)
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_all_uses_with(node.outputs[0], result)


def _matrix(
    emit: Emitter, place: StoredWeight, array: Callable[[str], tuple[ir.Value, list[int]]], lead: int
) -> ir.Value:
    """Emit ``(codes - zero) * scale``, or what a table or planes make of codes.

    Args:
        emit: receives the nodes.
        place: where the codes lie.
        array: a packed array by the packer's name, and the shape of one matrix's.
        lead: 1 if all arrays but tables have a first axis that counts matrices, as the result then has.
    """
    stored, names = place.codes, place.names
    packed, dims = array("weight")
    k_padded = len(stored.source)
    n_padded = 8 * math.prod(dims) // (k_padded * stored.layout.bits)
    codes = unpack(emit, packed, stored.layout, (k_padded, n_padded), lead)
    position = np.flatnonzero(stored.source >= 0)
    position = position[np.argsort(stored.source[position], kind="stable")]
    k = len(position)
    if not np.array_equal(position, np.arange(k_padded)):
        codes = emit("Gather", codes, emit.constant(position.astype(np.int64)), axis=lead)

    def columns(value: ir.Value) -> ir.Value:
        """The weight's own columns of a value whose last axis is N'."""
        if (place.start, place.stop) == (0, n_padded):
            return value
        bounds = (np.array([b], np.int64) for b in (place.start, place.stop, -1))
        return emit("Slice", value, *(emit.constant(b) for b in bounds))

    def per_row(name: str, length: int = stored.group) -> ir.Value:
        """Parameters ``(panels, groups, ..., width)`` as float32 ``(K, ..., N)``."""
        value, (panels, groups, *planes, width) = array(name)
        order = [1, *range(2, 2 + len(planes)), 0, 2 + len(planes)]
        flat = emit("Cast", value, to=int(ir.DataType.FLOAT))
        flat = emit("Transpose", flat, perm=[*range(lead), *(lead + axis for axis in order)])
        shape = np.array([*[0] * lead, groups, *planes, panels * width], np.int64)
        flat = emit("Reshape", flat, emit.constant(shape))
        index = np.minimum(np.arange(k, dtype=np.int64) // (length or k), groups - 1)
        return emit("Gather", columns(flat), emit.constant(index), axis=lead)

    scale = columns(emit("Mul", array("scale")[0], emit.constant(np.array(stored.unit, np.float32))))
    if lead:
        scale = emit("Unsqueeze", scale, emit.constant(np.array([lead], np.int64)))
    codes = columns(codes)
    if "offset" in names:
        parts = _planes(emit, codes, stored.layout.bits, per_row("group_scale"), per_row("offset"), lead)
        return emit("Mul", parts, scale)
    if stored.twos_complement:
        # Inverting the sign bit adds its weight.
        codes = emit("BitwiseXor", codes, emit.constant(np.array(stored.bias, np.uint8)))
    real = emit("Cast", codes, to=int(ir.DataType.FLOAT))
    if stored.levels is not None or "table" in names:
        index = emit("Cast", codes, to=int(ir.DataType.INT32))
        known = stored.levels
        levels = _levels(emit, array("table")[0], stored) if known is None else emit.constant(known)
        real = emit("Gather", levels, index)
    zero = per_row("zero") if "zero" in names else emit.constant(np.array(stored.bias, np.float32))
    real = emit("Sub", real, zero)
    if "super_scale" in names:
        real = emit("Mul", real, emit("Mul", per_row("group_scale"), per_row("super_scale", SUPER)))
        if "block_offset" in names:
            shift = emit("Mul", per_row("block_offset"), per_row("super_offset", SUPER))
            real = emit("Sub", real, shift)
    elif "group_scale" in names:
        scale = emit("Mul", per_row("group_scale"), scale)
    return emit("Mul", real, scale)


def _expert_product(emit: Emitter, node: ir.Node, weights: ir.Value, depth: int) -> None:
    """Emit an ExpertMatMul by ``weights`` ``(ids, K, N)`` in its place."""
    x, _, ids = node.inputs
    assert x is not None and ids is not None
    n, repeat = int(node.attributes["n"].value), int(node.attributes["repeat"].value)
    single = emit.constant(np.array([-1, 1, depth], np.int64))
    rows = emit("Reshape", x, single)
    if repeat > 1:
        rows = emit("Expand", rows, emit.constant(np.array([1, repeat, 1], np.int64)))
        rows = emit("Reshape", rows, single)
    shape = emit("Concat", emit("Shape", ids), emit.constant(np.array([n], np.int64)), axis=0)
    y, old = emit("Reshape", emit("MatMul", rows, weights), shape), node.outputs[0]
    y.shape, y.type, name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    emit.graph.remove(node, safe=True)
    old.name, y.name = None, name


def _levels(emit: Emitter, table: ir.Value, stored: StoredCodes) -> ir.Value:
    """A table of levels as float32: one number each, or all low bytes before the high ones."""
    levels = emit("Cast", table, to=int(ir.DataType.FLOAT))
    entries = max(ENTRIES, 1 << stored.layout.bits)
    if _dims(table)[0] == entries:
        return levels
    parts = emit("Reshape", levels, emit.constant(np.array([2, entries], np.int64)))
    whole = emit("Mul", parts, emit.constant(np.array([[1], [256]], np.float32)))
    return emit("ReduceSum", whole, emit.constant(np.array([0], np.int64)), keepdims=0)


def _planes(emit: Emitter, codes: ir.Value, count: int, scales: ir.Value, offset: ir.Value, lead: int = 0) -> ir.Value:
    """Bit planes of codes ``(K, N)`` times their scales ``(K, P, N)``, added up, and the offset ``(K, N)``."""
    middle = emit.constant(np.array([1 + lead], np.int64))
    shifts = emit.constant(np.arange(count, dtype=np.uint8)[:, None])
    bits = emit("BitShift", emit("Unsqueeze", codes, middle), shifts, direction="RIGHT")
    bits = emit("BitwiseAnd", bits, emit.constant(np.array(1, np.uint8)))
    parts = emit("Mul", emit("Cast", bits, to=int(ir.DataType.FLOAT)), scales)
    return emit("Add", emit("ReduceSum", parts, middle, keepdims=0), offset)


def _dims(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())
