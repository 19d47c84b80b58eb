"""Quantizers of QONNX and Brevitas, said in ONNX's own operators.

QONNX (Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (2022)) adds two operators to ONNX:

    Quant(x, scale, zero_point, bit_width)    scale * (clip(round(x / scale + zero_point), low, high) - zero_point)
    BipolarQuant(x, scale)                    scale if x >= 0 else -scale

with ``low`` and ``high`` from the width, ``signed`` and ``narrow``. Of a constant they become integers and their
``DequantizeLinear``; of an activation ``Clip``, ``QuantizeLinear`` and ``DequantizeLinear``, and `Bipolar`. Constants of more than 8
bits (biases) stay float numbers on their grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.domain import DOMAIN, add_functions, register_function
from qcompile.passes.graph import add_initializer, attribute, constant, remove_unused_initializers, replace

DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")

ROUNDINGS = {
    "ROUND": np.rint,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ROUND_TO_ZERO": np.trunc,
    "HALF_EVEN": np.rint,
    "DOWN": np.trunc,
}
"""QONNX's rounding modes."""

BIPOLAR = """
<domain: "qcompile", opset_import: ["" : 23]>
Bipolar (x, scale) => (y)
{
    zero = Constant <value_float: float = 0.0> ()
    up = GreaterOrEqual (x, zero)
    down = Neg (scale)
    y = Where (up, scale, down)
}
"""

register_function("Bipolar", BIPOLAR)


def translate_quantizers(model: ir.Model) -> ir.Model:
    """Replace the operators of QONNX in place, and return the model; one without them is left as it is.

    Raises:
        UnsupportedOperatorError: a quantizer of an activation has several scales, a zero point or another rounding than to
            even, or parameters are not constant; names it.
    """
    quantizers = [n for n in model.graph if n.domain in DOMAINS]
    for node in quantizers:
        if node.op_type in ("Quant", "IntQuant"):
            _quant(model.graph, node)
        elif node.op_type == "BipolarQuant":
            _bipolar(model.graph, node)
        else:
            raise UnsupportedOperatorError(f"{_label(node)} has no translation; known are Quant and BipolarQuant")
        model.graph.remove(node, safe=True)
    if quantizers:
        for domain in DOMAINS:
            model.opset_imports.pop(domain, None)
        remove_unused_initializers(model.graph)
        add_functions(model)
    return model


def _label(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type} {node.name or node.outputs[0].name!r}"


def _parameter(node: ir.Node, index: int) -> np.ndarray:
    array = constant(node.inputs[index])
    if array is None:
        raise UnsupportedOperatorError(f"{_label(node)}: its parameter {index} must be constant")
    return np.asarray(array, np.float64)


def limits(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    if signed:
        return -(1 << (bits - 1)) + narrow, (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1 - narrow


def _quant(graph: ir.Graph, node: ir.Node) -> None:
    scale, zero, width = (_parameter(node, i) for i in (1, 2, 3))
    signed, narrow = bool(attribute(node, "signed", 1)), bool(attribute(node, "narrow", 0))
    mode = str(attribute(node, "rounding_mode", "ROUND")).upper()
    if mode not in ROUNDINGS:
        raise UnsupportedOperatorError(f"{_label(node)}: unknown rounding {mode!r}; known: {', '.join(ROUNDINGS)}")
    if width.size != 1 or float(width.reshape(())) != int(width.reshape(())):
        raise UnsupportedOperatorError(f"{_label(node)}: one whole number of bits is needed, not {width.tolist()}")
    bits = int(width.reshape(()))
    low, high = limits(bits, signed=signed, narrow=narrow)
    x = constant(node.inputs[0])
    name = node.outputs[0].name or "quant"
    if x is not None:
        codes = np.clip(ROUNDINGS[mode](np.asarray(x, np.float64) / scale + zero), low, high) - zero
        replace(node.outputs[0], _constant(graph, node, name, codes, scale))
        return
    if scale.size != 1 or np.any(zero) or not 1 <= bits <= 16:
        raise UnsupportedOperatorError(
            f"{_label(node)}: an activation needs one scale, a zero point of 0 and 1 to 16 bits, not "
            f"{scale.size} scales, zero point {zero.reshape(-1)[:1].tolist()} and {bits} bits"
        )
    if ROUNDINGS[mode] is not np.rint:
        raise UnsupportedOperatorError(f"{_label(node)}: activations are rounded half to even, not {mode}")
    dtype = np.dtype(f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16}")
    step = add_initializer(graph, f"{name}.scale", np.array(scale.reshape(()), np.float32))
    place = add_initializer(graph, f"{name}.zero_point", np.array(0, dtype))
    value, nodes = node.inputs[0], []
    if (low, high) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
        bounds = [
            add_initializer(graph, f"{name}.bound", np.array(b * scale.reshape(()), np.float32)) for b in (low, high)
        ]
        nodes.append(ir.node("Clip", [value, *bounds], name=f"{name}.clip"))
        _typed(nodes[-1].outputs[0], f"{name}.clipped", node.outputs[0], ir.DataType.FLOAT)
        value = nodes[-1].outputs[0]
    nodes.append(ir.node("QuantizeLinear", [value, step, place], name=f"{name}.quantize"))
    _typed(nodes[-1].outputs[0], f"{name}.codes", node.outputs[0], ir.DataType.from_numpy(dtype))
    nodes.append(ir.node("DequantizeLinear", [*nodes[-1].outputs, step, place], name=f"{name}.dequantize"))
    _finish(graph, node, nodes)


def _bipolar(graph: ir.Graph, node: ir.Node) -> None:
    scale, x = _parameter(node, 1), constant(node.inputs[0])
    name = node.outputs[0].name or "bipolar"
    if x is not None:
        codes = np.where(np.asarray(x) >= 0, 1.0, -1.0)
        replace(node.outputs[0], _constant(graph, node, name, codes, scale))
        return
    if scale.size != 1:
        raise UnsupportedOperatorError(f"{_label(node)}: an activation needs one scale, not {scale.size}")
    step = add_initializer(graph, f"{name}.scale", np.array(scale.reshape(()), np.float32))
    _finish(graph, node, [ir.node("Bipolar", [node.inputs[0], step], domain=DOMAIN, name=name)])


def _constant(graph: ir.Graph, node: ir.Node, name: str, codes: np.ndarray, scale: np.ndarray) -> ir.Value:
    """``codes * scale`` as integers and their ``DequantizeLinear``, or as float numbers where 8 bits are not enough."""
    spread = [axis for axis, extent in enumerate(scale.shape) if extent > 1]
    whole = bool((codes == np.rint(codes)).all()) and np.abs(codes).max(initial=0) <= 127 + (codes.min(initial=0) < 0)
    if not whole or len(spread) > 1 or codes.ndim < 2:
        return add_initializer(graph, name, (codes * scale).astype(np.float32))
    stored = add_initializer(graph, f"{name}.codes", codes.astype(np.int8))
    step = add_initializer(graph, f"{name}.scale", scale.reshape(-1 if spread else ()).astype(np.float32))
    attributes = {"axis": spread[0] + codes.ndim - scale.ndim} if spread else {}
    made = ir.node("DequantizeLinear", [stored, step], attributes=attributes, name=f"{name}.dequantize")
    graph.insert_before(node, [made])
    out = made.outputs[0]
    out.name, out.type, out.shape = f"{name}.weight", ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(codes.shape))
    return out


def _typed(value: ir.Value, name: str, like: ir.Value, dtype: Any) -> None:
    value.name, value.shape, value.type = name, like.shape, ir.TensorType(dtype)


def _finish(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put ``nodes`` in the place of ``node``."""
    graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type = old.shape, ir.TensorType(ir.DataType.FLOAT)
    name, old.name = old.name, f"{old.name}.old"
    new.name = name
    replace(old, new)
