"""Quantize what is left: every value between operators becomes integers with one scale, as hardware without floats needs it.

    y = f(x)   ->   y = f(DequantizeLinear(QuantizeLinear(x)))

Matrices and their inputs are quantized before this pass. It finds the other operands (`open_values`), whose scales are
then calibrated, and inserts their quantizers (`close`). Operators that only move elements carry integers through, so
the quantizer stands in front of them, once for all readers. Probabilities of attention are rounded to powers of two
(Li et al., "RepQ-ViT" (2023), section 3.3):

    Log2Quantize(p) = clip(round(-log2 p), 0, 2^bits - 1)        Log2Dequantize(q) = 2^-q

Every result runs in stock ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.domain import DOMAIN, add_functions, register_function
from qcompile.passes.graph import add_initializer, constant, is_op, replace
from qcompile.passes.weights import DEQUANTIZERS

MOVEMENT = (
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Slice",
    "Split",
    "Gather",
    "Dropout",
)
"""Operators whose first input holds the elements of their outputs."""

OPERANDS = {
    "MatMul": 2,
    "Gemm": 2,
    "Conv": 2,
    "Softmax": 1,
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "Gelu": 1,
    "Swish": 1,
    "Sigmoid": 1,
    "HardSigmoid": 1,
    "HardSwish": 1,
    "Tanh": 1,
    "Erf": 1,
    "Exp": 1,
    "Softplus": 1,
    "Elu": 1,
    "LeakyRelu": 1,
    "PRelu": 1,
    "Abs": 1,
    "Sin": 1,
    "Cos": 1,
    "Softsign": 1,
    "Mish": 1,
    "Celu": 1,
    "Selu": 1,
    "ThresholdedRelu": 1,
    "AveragePool": 1,
    "GlobalAveragePool": 1,
    "MaxPool": 1,
    "ReduceMean": 1,
}
"""How many inputs of an operator are operands that must be integers."""

JOINS = ("Add", "Sub", "Mul", "Div", "Neg", "Concat")
"""Operators that need integers where several of their inputs are not constant."""

SUMS = (
    "MatMul",
    "Gemm",
    "Conv",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "LayerNormalization",
    "RMSNormalization",
)
"""Operators that still take constant factors and summands before the quantizer that follows."""

LOG2_QUANTIZE = """
<domain: "qcompile", opset_import: ["" : 23]>
Log2Quantize <bits: int = 4> (p) => (codes)
{
    two = Constant <value_float: float = 2.0> ()
    one = Constant <value_float: float = 1.0> ()
    zero = Constant <value_float: float = 0.0> ()
    width = Constant <value_int: int = @bits> ()
    width_f = Cast <to: int = 1> (width)
    levels = Pow (two, width_f)
    top = Sub (levels, one)
    natural = Log (p)
    log_two = Log (two)
    binary = Div (natural, log_two)
    places = Neg (binary)
    rounded = Round (places)
    clipped = Clip (rounded, zero, top)
    codes = Cast <to: int = 2> (clipped)
}
"""

LOG2_DEQUANTIZE = """
<domain: "qcompile", opset_import: ["" : 23]>
Log2Dequantize (codes) => (p)
{
    two = Constant <value_float: float = 2.0> ()
    places = Cast <to: int = 1> (codes)
    exponent = Neg (places)
    p = Pow (two, exponent)
}
"""

register_function("Log2Quantize", LOG2_QUANTIZE)
register_function("Log2Dequantize", LOG2_DEQUANTIZE)


def open_values(model: ir.Model) -> list[ir.Value]:
    """Values that are operands somewhere and not yet integers, in graph order: where quantizers are missing."""
    found: dict[int, ir.Value] = {}
    for node in model.graph:
        for value in _operands(node):
            source = origin(value)
            if source is not None:
                found.setdefault(id(source), source)
    return list(found.values())


def origin(value: ir.Value) -> ir.Value | None:
    """The value whose quantizer ``value`` needs: in front of operators that only move elements; None if it has one."""
    while (node := value.producer()) is not None:
        if node.op_type in ("DequantizeLinear", "Log2Dequantize", "Bipolar", *DEQUANTIZERS):
            return None
        if node.domain or node.op_type not in MOVEMENT or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return None if constant(value) is not None or value.is_initializer() else value


def is_probability(value: ir.Value) -> bool:
    """Whether a value is the result of a softmax that only matrix products read."""
    readers = [use.node for use in value.uses()]
    return is_op(value.producer(), "Softmax") and bool(readers) and all(is_op(n, "MatMul") for n in readers)


def close(model: ir.Model, scales: Mapping[str, float], *, log2_bits: int = 4) -> ir.Model:
    """Insert the missing quantizers in place and return the model.

    Args:
        model: with matrices quantized.
        scales: of the values of `open_values`, by name.
        log2_bits: bits of probabilities as powers of two; 0 to treat them like all others.
    """
    graph = model.graph
    for value in open_values(model):
        if log2_bits and is_probability(value):
            quantize = ir.node("Log2Quantize", [value], domain=DOMAIN, attributes={"bits": log2_bits})
            dequantize = ir.node("Log2Dequantize", quantize.outputs, domain=DOMAIN)
            code_type = ir.DataType.UINT8
        else:
            existing = _dequantized(value)
            if existing is not None:
                _redirect(value, existing)
                continue
            scale = add_initializer(graph, f"{value.name}.scale", np.array(scales[value.name or ""], np.float32))
            zero = add_initializer(graph, f"{value.name}.zero_point", np.array(0, np.int8))
            quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}.quantize")
            dequantize = ir.node("DequantizeLinear", [*quantize.outputs, scale, zero], name=f"{value.name}.dequantize")
            code_type = ir.DataType.INT8
        codes, result = quantize.outputs[0], dequantize.outputs[0]
        codes.name, codes.shape, codes.type = f"{value.name}.codes", value.shape, ir.TensorType(code_type)
        result.name, result.shape = f"{value.name}.dequantized", value.shape
        result.type = ir.TensorType(ir.DataType.FLOAT)
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, [quantize, dequantize])
        else:
            graph.insert_before(graph[0], [quantize, dequantize])
        _redirect(value, result)
    _quantize_inputs(model)
    _keep_integers(model)
    add_functions(model)
    return model


def round_scales(model: ir.Model) -> ir.Model:
    """Round the scales of activations up to powers of two, in place; integers are then rescaled by shifts (QFX)."""
    for node in model.graph:
        if not is_op(node, "QuantizeLinear"):
            continue
        scale = node.inputs[1]
        assert scale is not None
        value = constant(scale)
        if value is None:
            raise UnsupportedOperatorError(f"the scale {scale.name!r} of {node.name!r} is not constant")
        rounded = np.exp2(np.ceil(np.log2(np.asarray(value, np.float64)) - 1e-6)).astype(np.float32)
        scale.const_value = ir.tensor(rounded, name=scale.name)
    return model


def _quantize_inputs(model: ir.Model) -> None:
    """Where an input is moved before it is quantized, quantize it first, alike: hardware takes integers."""
    graph = model.graph
    for node in list(graph):
        if not is_op(node, "QuantizeLinear") or node.inputs[0] is None:
            continue
        value: ir.Value | None = node.inputs[0]
        while value is not None and (before := value.producer()) is not None:
            if before.domain or before.op_type not in MOVEMENT:
                break
            value = before.inputs[0]
        if value is None or value is node.inputs[0] or not value.is_graph_input():
            continue
        readers = [(use.node, use.idx) for use in value.uses()]
        quantize = ir.node("QuantizeLinear", [value, *node.inputs[1:]], name=f"{value.name}.quantize")
        dequantize = ir.node("DequantizeLinear", [*quantize.outputs, *node.inputs[1:]], name=f"{value.name}.dequantize")
        for made, like in ((quantize, node.outputs[0]), (dequantize, value)):
            out = made.outputs[0]
            out.name, out.shape, out.type = f"{made.name}d", value.shape, like.type
        graph.insert_before(graph[0], [quantize, dequantize])
        for reader, index in readers:
            reader.replace_input_with(index, dequantize.outputs[0])


def _keep_integers(model: ir.Model) -> None:
    """Drop quantizers of values that are integers already, moved or pooled: they would only round again."""
    for node in list(model.graph):
        if not is_op(node, "QuantizeLinear") or node.inputs[0] is None:
            continue
        source = node.inputs[0]
        value: ir.Value | None = source
        while (before := value.producer() if value is not None else None) is not None:
            if before.domain or before.op_type not in (*MOVEMENT, "MaxPool"):
                break
            value = before.inputs[0]
        if not is_op(before, "DequantizeLinear"):
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if all(is_op(reader, "DequantizeLinear") for reader in readers):
            for reader in readers:
                replace(reader.outputs[0], source)
            for gone in [*readers, node]:
                model.graph.remove(gone, safe=True)


def _operands(node: ir.Node) -> list[ir.Value]:
    """Inputs of ``node`` that must be integers."""
    if node.domain:
        return []
    if node.op_type in OPERANDS:
        return [v for v in node.inputs[: OPERANDS[node.op_type]] if v is not None and not _is_weight(v)]
    if node.op_type in JOINS:
        moving = [v for v in node.inputs if v is not None and not _is_weight(v)]
        tables = [constant(v) for v in node.inputs if v is not None and _is_weight(v)]
        # A table that differs between tokens (positions) is added to integers, not to the sums before a quantizer.
        wide = any(t is not None and sum(extent > 1 for extent in t.shape) > 1 for t in tables)
        return moving if len(moving) > 1 or wide or not all(_takes_constants(v) for v in moving) else []
    if node.op_type in ("Relu", "Clip") and node.inputs[0] is not None and _source(node.inputs[0]).is_graph_input():
        return [node.inputs[0]]
    return []


def _source(value: ir.Value) -> ir.Value:
    """The value whose elements ``value`` has, in front of operators that only move them."""
    while (node := value.producer()) is not None and not node.domain and node.op_type in MOVEMENT:
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _takes_constants(value: ir.Value) -> bool:
    """Whether constants may be added to a value, or multiplied into it, before it is rounded."""
    value = _source(value)
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("DequantizeLinear", "Log2Dequantize", "Bipolar", *DEQUANTIZERS, *SUMS):
        return True
    moving = [v for v in node.inputs if v is not None and not _is_weight(v)]
    return not node.domain and node.op_type in JOINS and len(moving) == 1 and _takes_constants(moving[0])


def _is_weight(value: ir.Value) -> bool:
    """Whether a value depends on constants alone."""
    if constant(value) is not None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(v is None or _is_weight(v) for v in node.inputs)


def _dequantized(value: ir.Value) -> ir.Value | None:
    """The dequantized form of a value that some reader already has."""
    for use in value.uses():
        if is_op(use.node, "QuantizeLinear"):
            for reader in use.node.outputs[0].uses():
                if is_op(reader.node, "DequantizeLinear"):
                    return reader.node.outputs[0]
    return None


def _redirect(value: ir.Value, result: ir.Value) -> None:
    """Let the readers of ``value`` that need integers read ``result``; constants and activations may follow on the float value."""
    for use in list(value.uses()):
        node = use.node
        if node is result.producer() or is_op(node, "QuantizeLinear") or node.op_type == "Log2Quantize":
            continue
        if node.op_type in MOVEMENT and not node.domain:
            if any(_leads_to_operand(out) for out in node.outputs):
                node.replace_input_with(use.idx, result)
        elif any(v is value for v in _operands(node)):
            node.replace_input_with(use.idx, result)


def _leads_to_operand(value: ir.Value) -> bool:
    for use in value.uses():
        node = use.node
        if node.op_type in MOVEMENT and not node.domain:
            if any(_leads_to_operand(out) for out in node.outputs):
                return True
        elif any(v is value for v in _operands(node)):
            return True
    return False
