"""One form for every linear operator: ``MatMul(x, w)`` with a constant ``w`` of shape (K, N), then ``Add(y, bias)``.

    Gemm(x, w, b) = alpha x w' + beta b            w' = w or w^T
    MatMul(x, Transpose(w))                        w^T is computed once
    Reshape(MatMul(Reshape(x, (-1, K)), w) + b)    MatMul maps over leading axes by itself

A weight that other operators read too (an embedding table that is also the output matrix) gets a second, transposed
initializer, whose metadata property ``qcompile.transpose_of`` names the first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, constant_shape, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, remove_dead, substitute

TRANSPOSE_OF = "qcompile.transpose_of"


def transposed_initializer(anchor: ir.Node, weight: ir.Value, scale: float = 1.0) -> ir.Value:
    """An initializer holding ``scale * weight^T`` as a view on the same memory where ``scale`` is 1."""
    assert weight.const_value is not None
    array = weight.const_value.numpy().T
    if scale != 1.0:
        array = (array * np.asarray(scale, array.dtype)).astype(array.dtype)
    elif (existing := existing_transpose(weight)) is not None:
        return existing
    shared = len(weight.uses()) > 1 or weight.is_graph_output()
    name = weight.name or "weight"
    if not shared:
        set_aside(weight)
    graph = _initializer_graph(anchor, weight)
    # A tied weight is named after the module that reads it transposed, as it is in the checkpoint.
    module = anchor.metadata_props.get("namespace")
    free, i = (f"{module}.weight" if shared and module else name), 0
    while free in graph.initializers:
        i += 1
        free = f"{name}.T" if i == 1 else f"{name}.T.{i}"
    tensor = ir.Tensor(array, dtype=weight.const_value.dtype, name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.metadata_props.update(weight.metadata_props)
    if shared and scale == 1.0:
        value.metadata_props[TRANSPOSE_OF] = name
    graph.register_initializer(value)
    return value


def set_aside(weight: ir.Value) -> None:
    """Give the name of ``weight`` free. It gets a tensor object of its own: the present one may be the caller's."""
    assert weight.const_value is not None
    name = f"{weight.name}.before_transpose"
    weight.const_value = ir.Tensor(weight.const_value.numpy(), dtype=weight.const_value.dtype, name=name)
    weight.name = name


def existing_transpose(weight: ir.Value) -> ir.Value | None:
    """The initializer that holds the transpose of ``weight``, which other operators read too."""
    graph = weight.graph
    if graph is None:
        return None
    for value in graph.initializers.values():
        if value.metadata_props.get(TRANSPOSE_OF) == weight.name:
            return value
    return None


def _initializer_graph(anchor: ir.Node, weight: ir.Value) -> ir.Graph:
    graph = weight.graph or anchor.graph
    assert isinstance(graph, ir.Graph)
    return graph


def is_weight(value: ir.Value | None, rank: int = 2) -> bool:
    """Whether ``value`` is a constant float tensor of that rank, held by an initializer."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    return value.const_value.dtype.is_floating_point() and len(value.const_value.shape) == rank


class TransposedWeight(Rule):
    """``Transpose(w)`` of an initializer -> an initializer."""

    kind = "Linear"
    anchors = ("Transpose",)

    def apply(self, node: ir.Node) -> Found | None:
        weight = node.inputs[0]
        perm = attribute(node, "perm")
        if not is_weight(weight) or node.outputs[0].is_graph_output() or list(perm or (1, 0)) != [1, 0]:
            return None
        if not any(use.node.op_type in ("MatMul", "Gemm") for use in node.outputs[0].uses()):
            return None
        assert weight is not None
        substitute(node.outputs[0], transposed_initializer(node, weight))
        return self.found(node, "constant transpose folded")


class GemmToMatMul(Rule):
    """Gemm -> MatMul and Add."""

    kind = "Linear"
    anchors = ("Gemm",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        x, w = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
        if x is None or w is None:
            return None
        result = node.outputs[0]
        if attribute(node, "transA", 0):
            x = emit(node, "Transpose", [x], {"perm": [1, 0]})
        if attribute(node, "transB", 0):
            if is_weight(w):
                w, alpha = transposed_initializer(node, w, alpha), 1.0
            else:
                w = emit(node, "Transpose", [w], {"perm": [1, 0]})
        elif alpha != 1.0 and is_weight(w):
            assert w.const_value is not None
            scaled = w.const_value.numpy() * np.asarray(alpha, w.const_value.dtype.numpy())
            w, alpha = emit_constant(node, scaled, f"{w.name}.scaled"), 1.0
        y = emit(node, "MatMul", [x, w], like=result)
        dtype = result.dtype.numpy() if result.dtype is not None else np.dtype(np.float32)
        if alpha != 1.0:
            y = emit(
                node, "Mul", [y, emit_constant(node, np.asarray(alpha, dtype), f"{result.name}.alpha")], like=result
            )
        if bias is not None and beta != 0.0:
            if beta != 1.0:
                array = small_constant(bias)
                if array is not None:
                    bias = emit_constant(node, (array * beta).astype(array.dtype), f"{bias.name}.scaled")
                else:
                    factor = emit_constant(node, np.asarray(beta, dtype), f"{result.name}.beta")
                    bias = emit(node, "Mul", [bias, factor])
            y = emit(node, "Add", [y, bias], like=result)
        substitute(result, y)
        return self.found(node, "Gemm split into MatMul and Add")


class FlattenedLinear(Rule):
    """Reshape to two axes, linear, reshape back -> the linear operator on all axes."""

    kind = "Linear"
    anchors = ("MatMul",)

    def apply(self, node: ir.Node) -> Found | None:
        flat, w = node.inputs[0], node.inputs[1]
        reshape = flat.producer() if flat is not None else None
        if reshape is None or reshape.op_type not in ("Reshape", "Flatten") or not is_weight(w):
            return None
        x = reshape.inputs[0]
        shape, flat_shape, w_shape = symbols.dims(x), symbols.dims(flat), constant_shape(w)
        if shape is None or flat_shape is None or w_shape is None or len(flat_shape) != 2 or len(shape) < 3:
            return None
        if shape[-1] != w_shape[0]:
            return None
        add = sole_use(node.outputs[0])
        last, bias = node, None
        if add is not None and add.op_type == "Add":
            other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
            if (constant_shape(other) or (0, 0))[-1:] == w_shape[1:] and len(constant_shape(other) or (0, 0)) == 1:
                last, bias = add, other
        back = sole_use(last.outputs[0])
        if back is None or back.op_type != "Reshape" or symbols.dims(back.outputs[0]) != (*shape[:-1], w_shape[1]):
            return None
        y = emit(back, "MatMul", [x, w], like=back.outputs[0])
        if bias is not None:
            y = emit(back, "Add", [y, bias], like=back.outputs[0])
        substitute(back.outputs[0], y)
        remove_dead([last])
        return self.found(node, "flattening around it removed")


class BiasLast(Rule):
    """``Add(bias, MatMul)`` -> ``Add(MatMul, bias)``."""

    kind = "Linear"
    anchors = ("Add",)

    def apply(self, node: ir.Node) -> Found | None:
        first, second = node.inputs
        if first is None or second is None or not is_weight(first, 1):
            return None
        matmul = second.producer()
        if matmul is None or matmul.op_type not in ("MatMul", "Conv"):
            return None
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        return self.found(node, "bias moved to the second input")


RULES: tuple[Rule, ...] = (TransposedWeight(), GemmToMatMul(), FlattenedLinear(), BiasLast())
