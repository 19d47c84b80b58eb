"""A program as an ONNX model of integer operators: the reference that stock ONNX Runtime executes.

Streams are int64 tensors ``(batch, tokens, channels)``; constants are stored in their narrow types. Inputs and outputs are
those of the imported model: floats, quantized by ``QuantizeLinear`` on the way in and multiplied by their scale on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Imported, Port
from qcompile.codegen.fixed.nodes import (
    Add,
    Affine,
    Concat,
    Depthwise,
    Geometry,
    Lookup,
    MatMul,
    MatVec,
    MaxPool,
    Multiply,
    Node,
    Normalize,
    Prepend,
    Select,
    Softmax,
    TokenSum,
    Transpose,
    Window,
)
from qcompile.codegen.fixed.nodes.attention import ROOT_TWO
from qcompile.codegen.fixed.nodes.normalize import F, R, Z
from qcompile.formats.fixed import IntType, Requantize

DOMAIN = "qcompile"
OPSET = 23

ROUNDING_SHIFT = """
<domain: "qcompile", opset_import: ["" : 23]>
RoundingShift (product, divisor) => (y)
{
    one = Constant <value_int: int = 1> ()
    two = Constant <value_int: int = 2> ()
    half = Div (divisor, two)
    rest = Mod (product, divisor)
    exact = Sub (product, rest)
    quotient = Div (exact, divisor)
    above = Greater (rest, half)
    tie = Equal (rest, half)
    parity = Mod (quotient, two)
    odd = Equal (parity, one)
    uneven = And (tie, odd)
    up = Or (above, uneven)
    step = Cast <to: int = 7> (up)
    y = Add (quotient, step)
}
"""
"""``round_half_even(product / divisor)`` for an even, positive divisor; int64."""


class Emitter:
    """Nodes and initializers of the graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def constant(self, array: Any, name: str, *, narrow: bool = True) -> ir.Value:
        """An integer constant as int64; stored in its narrowest machine type."""
        array = np.asarray(array, np.int64)
        kind = IntType.covering(int(array.min()), int(array.max())).dtype if narrow and array.size > 1 else "int64"
        stored = ir.tensor(array.astype(kind), name=f"{name}.{len(self.initializers)}")
        value = ir.Value(
            name=stored.name,
            shape=ir.Shape(list(stored.shape.numpy())),
            type=ir.TensorType(stored.dtype),
            const_value=stored,
        )
        self.initializers.append(value)
        return value if kind == "int64" else self.op("Cast", [value], to=ir.DataType.INT64)

    def op(
        self, kind: str, inputs: Sequence[ir.Value | None], *, domain: str = "", name: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output."""
        attributes = {k: int(v) if isinstance(v, ir.DataType) else v for k, v in attributes.items()}
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, name=f"{name or kind}_{len(self.nodes)}")
        node.outputs[0].name = name or f"value.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def shape(self, *extents: int) -> ir.Value:
        """A shape for Reshape."""
        return self.constant(np.array(extents), "shape", narrow=False)

    def rounding_shift(self, product: ir.Value, shift: int, where: str) -> ir.Value:
        """``round_half_even(product / 2^shift)``."""
        if not shift:
            return product
        return self.op("RoundingShift", [product, self.constant(1 << shift, f"{where}.divisor")], domain=DOMAIN)

    def requantize(self, accumulator: ir.Value, step: Requantize | None, where: str) -> ir.Value:
        """`Requantize` per channel."""
        if step is None:
            return accumulator
        if not step.is_shift:
            accumulator = self.op("Mul", [accumulator, self.constant(step.multiplier, f"{where}.multiplier")])
        shifted = self.rounding_shift(accumulator, step.shift, where)
        bounds = [self.constant(v, f"{where}.bound", narrow=False) for v in (step.low, step.high)]
        return self.op("Clip", [shifted, *bounds])

    def taps(self, x: ir.Value, g: Geometry, outside: int, where: str) -> ir.Value:
        """``(batch, windows, taps, channels)``; one token of ``outside`` is appended for taps out of the image."""
        if g.padded:
            pads = self.constant([0, 0, 0, 0, 1, 0], f"{where}.pads", narrow=False)
            x = self.op("Pad", [x, pads, self.constant(outside, f"{where}.outside")], mode="constant")
        tokens = np.where(g.tokens < 0, g.height * g.width, g.tokens)
        return self.op("Gather", [x, self.constant(tokens, f"{where}.tokens")], axis=1)


@singledispatch
def emit(node: Node, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    """The operators of one node."""
    raise NotImplementedError(type(node))


@emit.register
def _matvec(node: MatVec, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    product = e.op("MatMul", [inputs[0], e.constant(node.weight, f"{node.name}.weight")])
    total = e.op("Add", [product, e.constant(node.bias, f"{node.name}.bias")])
    return e.requantize(total, node.requantize, node.name)


@emit.register
def _window(node: Window, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    return e.op("Reshape", [e.taps(inputs[0], node.geometry, 0, node.name), e.shape(0, *node.output.shape)])


@emit.register
def _depthwise(node: Depthwise, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    taps = e.taps(inputs[0], node.geometry, 0, node.name)
    product = e.op("Mul", [taps, e.constant(node.weight, f"{node.name}.weight")])
    total = e.op("ReduceSum", [product, e.constant([2], f"{node.name}.axis", narrow=False)], keepdims=0)
    total = e.op("Add", [total, e.constant(node.bias, f"{node.name}.bias")])
    return e.requantize(total, node.requantize, node.name)


@emit.register
def _maxpool(node: MaxPool, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    taps = e.taps(inputs[0], node.geometry, int(node.inputs[0].low.min()), node.name)
    return e.op("ReduceMax", [taps, e.constant([2], f"{node.name}.axis", narrow=False)], keepdims=0)


@emit.register
def _affine(node: Affine, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    total = e.op("Mul", [inputs[0], e.constant(node.step.multiplier, f"{node.name}.multiplier")])
    if node.offset.any():
        total = e.op("Add", [total, e.constant(node.offset, f"{node.name}.offset")])
    return e.requantize(total, node.rounding, node.name)


@emit.register
def _lookup(node: Lookup, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    index = e.op("Sub", [inputs[0], e.constant(node.inputs[0].type.low, f"{node.name}.low")])
    return e.op("Gather", [e.constant(node.table, f"{node.name}.table"), index])


@emit.register
def _add(node: Add, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    parts = [e.op("Mul", [x, e.constant(m, f"{node.name}.scale")]) for x, m in zip(inputs, node.multipliers)]
    return e.requantize(e.op("Add", parts), node.rounding, node.name)


@emit.register
def _multiply(node: Multiply, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    return e.requantize(e.op("Mul", inputs), node.step, node.name)


@emit.register
def _concat(node: Concat, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    return e.op("Concat", inputs, axis=2)


@emit.register
def _prepend(node: Prepend, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    first = e.constant([0], f"{node.name}.first", narrow=False)
    one = e.constant([1], f"{node.name}.one", narrow=False)
    axis = e.constant([1], f"{node.name}.axis", narrow=False)
    token = e.op("Slice", [inputs[0], first, one, axis])  # gives the rows the batch size
    zero = e.op("Mul", [token, e.constant(0, f"{node.name}.zero")])
    rows = e.op("Add", [zero, e.constant(node.rows[None], f"{node.name}.rows")])
    return e.op("Concat", [rows, inputs[0]], axis=1)


@emit.register
def _select(node: Select, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    bounds = [
        e.constant(values, f"{node.name}.range", narrow=False)
        for values in zip(node.tokens, node.channels, strict=True)
    ]
    return e.op("Slice", [inputs[0], *bounds, e.constant([1, 2], f"{node.name}.axes", narrow=False)])


@emit.register
def _transpose(node: Transpose, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    return e.op("Transpose", inputs, perm=[0, 2, 1])


@emit.register
def _token_sum(node: TokenSum, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    total = e.op("ReduceSum", [inputs[0], e.constant([1], f"{node.name}.axis", narrow=False)], keepdims=1)
    return e.requantize(total, node.requantize, node.name)


@emit.register
def _matmul(node: MatMul, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    a, b = inputs
    if node.exponent is not None:
        powers = 1 << (node.exponent - np.arange(node.exponent + 1))
        a = e.op("Gather", [e.constant(powers, f"{node.name}.powers"), a])
    a, b = (
        e.op("Reshape", [x, e.shape(0, s.tokens, node.heads, -1)]) for x, s in zip((a, b), node.inputs, strict=True)
    )
    a = e.op("Transpose", [a], perm=[0, 2, 1, 3])
    b = e.op("Transpose", [b], perm=[0, 2, 3, 1] if node.transposed else [0, 2, 1, 3])
    total = e.op("Transpose", [e.op("MatMul", [a, b])], perm=[0, 2, 1, 3])
    return e.requantize(e.op("Reshape", [total, e.shape(0, *node.output.shape)]), node.requantize, node.name)


@emit.register
def _softmax(node: Softmax, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    last = e.constant([-1], f"{node.name}.axis", narrow=False)
    x = e.op("Reshape", [inputs[0], e.shape(0, node.inputs[0].tokens, node.heads, node.length)])
    distance = e.op("Sub", [e.op("ReduceMax", [x, last], keepdims=1), x])
    exponential = e.op("Gather", [e.constant(node.table, f"{node.name}.table"), distance])
    total = e.op("ReduceSum", [exponential, last], keepdims=1)
    total = e.op("Mul", [total, e.constant(1 << 15, f"{node.name}.one")])
    total = e.op("Unsqueeze", [total, last])
    doubled = ROOT_TWO << np.arange((1 << node.bits) - 1)
    grown = e.op("Mul", [e.op("Unsqueeze", [exponential, last]), e.constant(doubled, f"{node.name}.doublings")])
    below = e.op("Cast", [e.op("Less", [grown, total])], to=ir.DataType.INT64)
    return e.op("Reshape", [e.op("ReduceSum", [below, last], keepdims=0), e.shape(0, *node.output.shape)])


@emit.register
def _normalize(node: Normalize, e: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    x, last = inputs[0], e.constant([-1], f"{node.name}.axis", narrow=False)
    channels = e.constant(node.inputs[0].channels, f"{node.name}.channels")
    variance = e.op("Mul", [e.op("ReduceSum", [e.op("Mul", [x, x]), last], keepdims=1), channels])
    deviation = e.op("Mul", [x, channels])
    if node.centred:
        total = e.op("ReduceSum", [x, last], keepdims=1)
        variance = e.op("Sub", [variance, e.op("Mul", [total, total])])
        deviation = e.op("Sub", [deviation, total])
    variance = e.op("Add", [variance, e.constant(node.epsilon, f"{node.name}.epsilon")])
    powers = e.constant(1 << (2 * np.arange(node.largest_k + 1)), f"{node.name}.powers")
    reached = e.op("Cast", [e.op("GreaterOrEqual", [variance, powers])], to=ir.DataType.INT64)
    half_log = e.op("Sub", [e.op("ReduceSum", [reached, last], keepdims=1), e.constant(1, f"{node.name}.one")])
    scaled = e.op("Mul", [variance, e.constant(1 << F, f"{node.name}.fraction")])
    index = e.op("Div", [scaled, e.op("Gather", [powers, half_log])])
    index = e.op("Sub", [index, e.constant(1 << F, f"{node.name}.first")])
    root = e.op("Gather", [e.constant(node.constants["roots"], f"{node.name}.roots"), index])
    divisors = e.constant(1 << (R - Z + np.arange(node.largest_k + 1)), f"{node.name}.divisors")
    divisor = e.op("Gather", [divisors, half_log])
    return e.op("RoundingShift", [e.op("Mul", [deviation, root]), divisor], domain=DOMAIN)


def onnx_model(imported: Imported, opset: int = OPSET) -> ir.Model:
    """The whole program between float inputs and outputs."""
    e = Emitter()
    program = imported.program
    streams: dict[str, ir.Value] = {}
    graph_inputs, graph_outputs = [], []
    for port in imported.inputs:
        value = ir.Value(name=port.name, shape=ir.Shape(["batch", *port.shape]), type=ir.TensorType(ir.DataType.FLOAT))
        graph_inputs.append(value)
        streams[port.stream] = _enter(
            e, port, value, program.streams[port.stream].type, program.streams[port.stream].shape
        )
    for node in program.nodes:
        views = []
        for stream in node.inputs:
            value = streams[stream.name]
            if stream.shape != program.streams[stream.name].shape:
                value = e.op("Reshape", [value, e.shape(0, *stream.shape)])
            views.append(value)
        result = emit(node, e, views)
        result.name = node.name
        streams[node.name] = result
    for port in imported.outputs:
        value = _leave(e, port, streams[port.stream])
        value.name = port.name
        value.shape, value.type = ir.Shape(["batch", *port.shape]), ir.TensorType(ir.DataType.FLOAT)
        graph_outputs.append(value)
    used = {v for n in e.nodes for v in n.inputs}
    graph = ir.Graph(
        graph_inputs,
        graph_outputs,
        nodes=e.nodes,
        initializers=[v for v in e.initializers if v in used],
        opset_imports={"": opset, DOMAIN: 1},
        name=program.name,
    )
    function = ir.serde.deserialize_function(onnx.parser.parse_function(ROUNDING_SHIFT))
    return ir.Model(graph, ir_version=10, producer_name="qcompile", functions=[function])


def _enter(e: Emitter, port: Port, value: ir.Value, kind: IntType, shape: tuple[int, int]) -> ir.Value:
    dtype = {"int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8, "int16": ir.DataType.INT16}[kind.dtype]
    scale = _float(e, port.scale, f"{port.name}.scale")
    zero = ir.tensor(np.zeros((), dtype.numpy()), name=f"{port.name}.zero_point")
    zero_value = ir.Value(name=zero.name, shape=ir.Shape([]), type=ir.TensorType(dtype), const_value=zero)
    e.initializers.append(zero_value)
    codes = e.op("Cast", [e.op("QuantizeLinear", [value, scale, zero_value])], to=ir.DataType.INT64)
    if kind.bits != 8 * dtype.itemsize:
        bounds = [e.constant(v, f"{port.name}.bound", narrow=False) for v in (kind.low, kind.high)]
        codes = e.op("Clip", [codes, *bounds])
    if port.index.ndim == 3 and (port.index.transpose(1, 2, 0).reshape(-1) == np.arange(port.index.size)).all():
        codes = e.op("Transpose", [codes], perm=[0, 2, 3, 1])
    else:
        codes = _reordered(e, codes, np.argsort(port.index.reshape(-1)), port.name)
    return e.op("Reshape", [codes, e.shape(0, *shape)], name=port.stream + ".codes")


def _leave(e: Emitter, port: Port, stream: ir.Value) -> ir.Value:
    codes = _reordered(e, stream, port.index.reshape(-1), port.name)
    codes = e.op("Reshape", [codes, e.shape(0, *port.shape)])
    return e.op("Mul", [e.op("Cast", [codes], to=ir.DataType.FLOAT), _float(e, port.scale, f"{port.name}.scale")])


def _reordered(e: Emitter, value: ir.Value, order: np.ndarray, name: str) -> ir.Value:
    """``(batch, order.size)`` in the given order."""
    flat = e.op("Reshape", [value, e.shape(0, -1)])
    if (order == np.arange(len(order))).all():
        return flat
    return e.op("Gather", [flat, e.constant(order, f"{name}.order")], axis=1)


def _float(e: Emitter, number: float, name: str) -> ir.Value:
    tensor = ir.tensor(np.float32(number), name=name)
    value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    e.initializers.append(value)
    return value
