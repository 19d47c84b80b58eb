"""Quantized MatMuls with their bias, activation and residual become one kernel `Linear`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.formats import ActivationFormat
from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import attribute, constant, constant_shape, is_op, module_path, sole_use
from qcompile.passes.lower.kernel_ops import kernel_node, same_shape, take_over
from qcompile.passes.weights import SITE, QuantizedWeight, quantized_weight

AUX = "weight_aux"
"""Attribute of a kernel operator: names of the weight's further parameters, which are its operands from `FIRST_AUX` on."""

FIRST_AUX = 7


@dataclass(frozen=True)
class QuantizedActivation:
    """The other operand: ``codes`` is the float value itself when the activation is not quantized."""

    codes: ir.Value
    scale: ir.Value | None
    format: str


def quantized_activation(value: ir.Value) -> QuantizedActivation:
    """Recognise a dynamic per-token or static per-tensor quantized activation; anything else is float."""
    node = value.producer()
    if is_op(node, "DequantizePerToken", domain=DOMAIN):
        assert node is not None
        codes, scale = node.inputs
        source = codes.producer() if codes is not None else None
        if is_op(source, "QuantizePerToken", domain=DOMAIN):
            assert source is not None and codes is not None
            return QuantizedActivation(codes, scale, str(ActivationFormat(int(attribute(source, "bits", 8)), "token")))  # type: ignore[call-overload]
    elif is_op(node, "DequantizeLinear"):
        assert node is not None
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if is_op(source, "QuantizeLinear") and node.inputs[0] is not None:
            assert source is not None
            same = list(source.inputs[1:]) == list(node.inputs[1:])
            zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            scale = constant(node.inputs[1])
            symmetric = node.inputs[0].dtype == ir.DataType.INT8 and (zero is None or not zero.any())
            if same and symmetric and scale is not None and scale.size == 1:
                return QuantizedActivation(node.inputs[0], node.inputs[1], "int8/tensor")
    return QuantizedActivation(value, None, "none")


def activation_name(node: ir.Node | None) -> str:
    """Name of the elementwise activation that a node computes on its only input, or an empty string."""
    if is_op(node, "Gelu"):
        assert node is not None
        return "gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"
    if is_op(node, "Relu"):
        return "relu"
    if is_op(node, "Swish"):
        assert node is not None
        return "silu" if float(attribute(node, "alpha", 1.0)) == 1.0 else ""  # type: ignore[arg-type]
    return ""


def lower_linears(model: ir.Model) -> None:
    """Replace every MatMul with a quantized constant weight."""
    for node in list(model.graph):
        if is_op(node, "MatMul") and (weight := quantized_weight(node.inputs[1])) is not None:
            _lower(model.graph, node, weight)


def _lower(graph: ir.Graph, matmul: ir.Node, weight: QuantizedWeight) -> None:
    x = matmul.inputs[0]
    assert x is not None
    shape = constant_shape(weight.codes)
    assert shape is not None
    k, n = shape
    activation = quantized_activation(x)
    last, fused = matmul, [matmul]
    bias = residual = None
    if (add := sole_use(last.outputs[0])) is not None and is_op(add, "Add"):
        other = _other(add, last.outputs[0])
        if other is not None and constant_shape(other) in ((n,), (1, n)):
            bias, last = other, add
            fused.append(add)
    name = ""
    if (found := activation_name(sole_use(last.outputs[0]))) and found != "silu":
        # silu is left to the gated product that usually follows it
        name, last = found, sole_use(last.outputs[0])  # type: ignore[assignment]
        fused.append(last)
    if (add := sole_use(last.outputs[0])) is not None and is_op(add, "Add"):
        other = _other(add, last.outputs[0])
        if other is not None and constant_shape(other) is None and same_shape(other, last.outputs[0]):
            residual, last = other, add
            fused.append(add)
    linear = kernel_node(
        "Linear",
        [
            activation.codes,
            activation.scale,
            weight.codes,
            weight.scale,
            weight.zero_point,
            bias,
            residual,
            *weight.aux.values(),
        ],
        [last.outputs[0]],
        {
            **({AUX: list(weight.aux)} if weight.aux else {}),
            "weight_format": weight.format,
            "activation_format": activation.format,
            "epilogue": name,
            "k": k,
            "n": n,
            "parts": [n],
            "weights": [weight.codes.name],
            "sites": [weight.codes.metadata_props.get(SITE) or module_path(matmul)],
        },
        like=matmul,
    )
    graph.insert_after(last, [linear])
    take_over(last.outputs[0], linear.outputs[0])
    for node in reversed(fused):
        graph.remove(node, safe=True)


def _other(add: ir.Node, value: ir.Value) -> ir.Value | None:
    a, b = add.inputs
    if a is value and b is value:
        return None
    return b if a is value else a


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of a node, None if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def merge_linears(graph: ir.Graph, linears: list[ir.Node]) -> ir.Value | None:
    """Concatenate parallel Linears along N into one placed at the first, or return None if they differ.

    Returns the merged output; the outputs of ``linears`` keep their users, who are expected to be rewritten.
    """
    first = linears[0]
    keys = ("weight_format", "activation_format", "k", *([AUX] if AUX in first.attributes else []))
    aux = range(FIRST_AUX, FIRST_AUX + len(attribute(first, AUX, ())))  # type: ignore[arg-type]
    same = all(
        operand(node, 0) is operand(first, 0)
        and operand(node, 1) is operand(first, 1)
        and operand(node, 6) is None
        and all(attribute(node, key) == attribute(first, key) for key in keys)
        and attribute(node, "epilogue") == ""
        and (operand(node, 4) is None) == (operand(first, 4) is None)
        and all(_joinable(operand(node, index), operand(first, index)) for index in aux)
        for node in linears
    )
    if not same:
        return None
    widths = [int(attribute(node, "n")) for node in linears]  # type: ignore[call-overload]

    lists = {key: [item for node in linears for item in attribute(node, key)] for key in ("parts", "weights", "sites")}  # type: ignore[attr-defined]

    def joined(index: int) -> ir.Value | None:
        values = [operand(node, index) for node in linears]
        if values[0] is None and index != 5:
            return None
        if all(v is None for v in values):
            return None
        arrays = [
            np.zeros(w, np.float32) if v is None else constant(v).reshape(-1) if index == 5 else constant(v)  # type: ignore[union-attr]
            for v, w in zip(values, widths)
        ]
        shared = index >= FIRST_AUX and arrays[0].ndim < 2
        whole = arrays[0] if shared else np.concatenate(arrays, axis=-1)
        names = [v.name for v in values if v is not None]
        like = next(v for v in values if v is not None)
        assert like.dtype is not None
        name = "+".join(str(n) for n in names)
        value = ir.Value(
            name=name,
            const_value=ir.Tensor(whole, dtype=like.dtype, name=name),
            shape=ir.Shape(whole.shape),
            type=ir.TensorType(like.dtype),
        )
        value.metadata_props.update(like.metadata_props)
        if name not in graph.initializers:
            graph.register_initializer(value)
        return graph.initializers[name]

    merged = kernel_node(
        "Linear",
        [operand(first, 0), operand(first, 1), joined(2), joined(3), joined(4), joined(5), None, *map(joined, aux)],
        [None],
        {**{k: attribute(first, k) for k in keys}, "epilogue": "", "n": sum(widths), **lists},
        like=first,
    )
    out = merged.outputs[0]
    out.name, out.type = f"{first.outputs[0].name}.merged", first.outputs[0].type
    if first.outputs[0].shape is not None:
        out.shape = ir.Shape([*first.outputs[0].shape[:-1], sum(widths)])
    graph.insert_before(first, [merged])
    return out


def _joinable(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether one array can hold the parameters of both weights: those of columns, or equal ones."""
    first, second = constant(a), constant(b)
    assert first is not None and second is not None
    return first.ndim > 1 or np.array_equal(first, second)
