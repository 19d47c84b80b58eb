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


def unpack(emit: Emitter, packed: ir.Value, layout: BitLayout, padded: tuple[int, int]) -> ir.Value:
    """Emit the inverse of ``layout.pack``: a uint8 ``(K', N')`` value from the packed bytes."""
    sizes = layout.factors(*padded)
    names = layout.order.split()
    flat = emit("Reshape", packed, emit.constant(np.array([-1, 1], np.int64)))
    fields = names[-1] == "b" and 8 % layout.bits == 0
    if fields:
        width, present = layout.bits, [n for n in names if n != "b"]
    else:
        width, present = 1, names
    if width < 8:
        shifts = np.arange(0, 8, width, dtype=np.uint8)[None]
        flat = emit("BitShift", flat, emit.constant(shifts), direction="RIGHT")
        flat = emit("BitwiseAnd", flat, emit.constant(np.array((1 << width) - 1, np.uint8)))
    split = emit("Reshape", flat, emit.constant(np.array([sizes[n] for n in present], np.int64)))
    axes = [f"k{i}" for i in range(len(layout.k))] + [f"n{i}" for i in range(len(layout.n))]
    target = axes if fields else [*axes, "b"]
    ordered = emit("Transpose", split, perm=[present.index(a) for a in target])
    if not fields:
        weights = (1 << np.arange(layout.bits)).astype(np.int32)
        wide = emit("Mul", emit("Cast", ordered, to=int(ir.DataType.INT32)), emit.constant(weights))
        last = emit.constant(np.array([-1], np.int64))
        ordered = emit("Cast", emit("ReduceSum", wide, last, keepdims=0), to=int(ir.DataType.UINT8))
    return emit("Reshape", ordered, emit.constant(np.array(padded, np.int64)))


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
        if (place := stored.get(node.inputs[0].name or "")) is not None:
            # Short names: spelled out, they would take more room than the graph itself.
            place.restore(Emitter(graph, node, f"u{index}", constants), node, array)
            before = [value.producer() for value in node.inputs if value is not None]
            graph.remove(node, safe=True)
            for product in before:  # of nested scales
                if product is not None and not product.outputs[0].uses():
                    graph.remove(product, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    _strip_metadata(emitted)
    return emitted


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
    """Emit ``(codes - zero) * scale``, or what a table or planes make of codes, in place of the node."""
    stored, names = place.codes, place.names
    packed = array(names["weight"])
    k_padded = len(stored.source)
    n_padded = 8 * math.prod(_dims(packed)) // (k_padded * stored.layout.bits)
    codes = unpack(emit, packed, stored.layout, (k_padded, n_padded))
    position = np.flatnonzero(stored.source >= 0)
    position = position[np.argsort(stored.source[position], kind="stable")]
    k = len(position)
    if not np.array_equal(position, np.arange(k_padded)):
        codes = emit("Gather", codes, emit.constant(position.astype(np.int64)), axis=0)

    def columns(value: ir.Value) -> ir.Value:
        """The weight's own columns of a value whose last axis is N'."""
        if (place.start, place.stop) == (0, n_padded):
            return value
        bounds = (np.array([b], np.int64) for b in (place.start, place.stop, -1))
        return emit("Slice", value, *(emit.constant(b) for b in bounds))

    def per_row(name: str, length: int = stored.group) -> ir.Value:
        """Parameters ``(panels, groups, ..., width)`` as float32 ``(K, ..., N)``."""
        value = array(name)
        panels, groups, *planes, width = _dims(value)
        order = [1, *range(2, 2 + len(planes)), 0, 2 + len(planes)]
        flat = emit("Transpose", emit("Cast", value, to=int(ir.DataType.FLOAT)), perm=order)
        flat = emit("Reshape", flat, emit.constant(np.array([groups, *planes, panels * width], np.int64)))
        index = np.minimum(np.arange(k, dtype=np.int64) // (length or k), groups - 1)
        return emit("Gather", columns(flat), emit.constant(index), axis=0)

    scale = columns(emit("Mul", array(names["scale"]), emit.constant(np.array(stored.unit, np.float32))))
    codes = columns(codes)
    if "offset" in names:
        result = emit(
            "Mul",
            _planes(emit, codes, stored.layout.bits, per_row(names["group_scale"]), per_row(names["offset"])),
            scale,
        )
    else:
        if stored.twos_complement:
            # Inverting the sign bit adds its weight.
            codes = emit("BitwiseXor", codes, emit.constant(np.array(stored.bias, np.uint8)))
        real = emit("Cast", codes, to=int(ir.DataType.FLOAT))
        if stored.levels is not None or "table" in names:
            index = emit("Cast", codes, to=int(ir.DataType.INT32))
            known = stored.levels
            levels = _levels(emit, array(names["table"]), stored) if known is None else emit.constant(known)
            real = emit("Gather", levels, index)
        zero = per_row(names["zero"]) if "zero" in names else emit.constant(np.array(stored.bias, np.float32))
        real = emit("Sub", real, zero)
        if "super_scale" in names:
            real = emit("Mul", real, emit("Mul", per_row(names["group_scale"]), per_row(names["super_scale"], SUPER)))
            if "block_offset" in names:
                shift = emit("Mul", per_row(names["block_offset"]), per_row(names["super_offset"], SUPER))
                real = emit("Sub", real, shift)
        elif "group_scale" in names:
            scale = emit("Mul", per_row(names["group_scale"]), scale)
        result = emit("Mul", real, scale)
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_all_uses_with(node.outputs[0], result)


def _levels(emit: Emitter, table: ir.Value, stored: StoredCodes) -> ir.Value:
    """A table of levels as float32: one number each, or all low bytes before the high ones."""
    levels = emit("Cast", table, to=int(ir.DataType.FLOAT))
    entries = max(ENTRIES, 1 << stored.layout.bits)
    if _dims(table)[0] == entries:
        return levels
    parts = emit("Reshape", levels, emit.constant(np.array([2, entries], np.int64)))
    whole = emit("Mul", parts, emit.constant(np.array([[1], [256]], np.float32)))
    return emit("ReduceSum", whole, emit.constant(np.array([0], np.int64)), keepdims=0)


def _planes(emit: Emitter, codes: ir.Value, count: int, scales: ir.Value, offset: ir.Value) -> ir.Value:
    """Bit planes of codes ``(K, N)`` times their scales ``(K, P, N)``, added up, and the offset ``(K, N)``."""
    middle = emit.constant(np.array([1], np.int64))
    shifts = emit.constant(np.arange(count, dtype=np.uint8)[:, None])
    bits = emit("BitShift", emit("Unsqueeze", codes, middle), shifts, direction="RIGHT")
    bits = emit("BitwiseAnd", bits, emit.constant(np.array(1, np.uint8)))
    parts = emit("Mul", emit("Cast", bits, to=int(ir.DataType.FLOAT)), scales)
    return emit("Add", emit("ReduceSum", parts, middle, keepdims=0), offset)


def _dims(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())
