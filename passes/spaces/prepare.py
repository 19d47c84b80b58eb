"""Bring a model into the form the analysis reads, without changing what it computes.

* Constant nodes become initializers.
* Small expressions of constants (``1 + w`` of a norm) are evaluated, all but codes of quantized weights.
* BatchNormalization becomes a product and a sum per channel: y = s (x - m) / sqrt(v + e) + b = g x + (b - g m).
* Vectors shared by several readers get one copy per reader: exporters merge equal initializers (all norm gammas of a
  fresh model), which would tie spaces that have nothing to do with each other. Matrices stay shared: a tied embedding
  is tied.
* Missing shapes are inferred, and every node gets a name of its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.passes.graph import add_initializer, attribute, constant_shape, remove_unused_initializers

COPY_OF = "qcompile.copy_of"
"""Metadata of a vector that was given to one reader as its own copy: the name of the original."""

LARGEST_FOLDED = 1 << 16
"""Elements up to which an expression of constants is evaluated."""


SAME_SHAPE = {"GroupNormalization", "InstanceNormalization", "RMSNormalization", "LayerNormalization", "Swish", "Gelu"}
SAME_SHAPE |= {"SimplifiedLayerNormalization", "Silu", "HardSwish", "Mish", "Erfc"}


def prepare(model: ir.Model) -> ir.Model:
    """Return a clone of ``model`` in analysable form. Doing it twice changes nothing more."""
    model = model.clone()
    graph = model.graph
    _lift_constants(graph)
    _evaluate_small(model)
    _expand_batch_norm(graph)
    _separate_vectors(graph)
    remove_unused_initializers(graph)
    _name_nodes(graph)
    return _with_shapes(model)


def _with_shapes(model: ir.Model) -> ir.Model:
    """Infer missing shapes, again as long as operators without an inference of their own hold it up."""
    while any(o.shape is None for n in model.graph for o in n.outputs if o.name):
        model = ShapeInferencePass()(model).model
        filled = False
        for node in model.graph:
            # Operators that ONNX defines by a function body.
            x, out = node.inputs[0] if node.inputs else None, node.outputs[0]
            if node.op_type in SAME_SHAPE and out.shape is None and x is not None and x.shape is not None:
                out.shape, out.type, filled = x.shape, out.type or x.type, True
        if not filled:
            break
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """Analysis and asks refer to nodes by name."""
    seen: set[str] = set()
    for node in graph:
        base = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
        name, i = base, 0
        while name in seen:
            i += 1
            name = f"{base}.{i}"
        seen.add(name)
        node.name = name


def copies_of(model: ir.Model) -> dict[str, str]:
    """Which constants are copies of which, as left by `prepare`."""
    return {
        name: value.metadata_props[COPY_OF]
        for name, value in model.graph.initializers.items()
        if COPY_OF in value.metadata_props
    }


def _lift_constants(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type == "Constant" and node.domain == "":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is None:
                continue
            value = node.outputs[0]
            new = add_initializer(graph, value.name or "constant", tensor.numpy())
            ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or (value.const_value is not None and not value.is_graph_input())


def _evaluate_small(model: ir.Model) -> None:
    """Evaluate nodes whose inputs are all small constants, with ONNX's reference implementation."""
    graph = model.graph
    for node in list(graph):
        if node.domain not in ("", "ai.onnx") or not node.inputs or not all(_is_constant(v) for v in node.inputs):
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            continue
        if node.op_type.startswith("Random") or any(v.is_graph_output() for v in node.outputs):
            continue
        if node.op_type == "DequantizeLinear":
            # Codes of a model that is quantized already stay codes.
            continue
        if any(_shared_matrix(v) for v in node.inputs if v is not None):
            continue
        sizes = [int(np.prod(constant_shape(v) or (1,))) for v in node.inputs if v is not None]
        if max(sizes, default=0) > LARGEST_FOLDED:
            continue
        results = _evaluate(node, model.opset_imports.get("", 23))
        if results is None or sum(r.size for r in results) > LARGEST_FOLDED:
            continue
        for old, array in zip(node.outputs, results):
            new = add_initializer(graph, old.name or "constant", array)
            ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)


def _shared_matrix(value: ir.Value) -> bool:
    """A matrix with other readers: evaluating one of them would untie it."""
    shape = constant_shape(value) or ()
    return sum(d != 1 for d in shape) > 1 and len({u.node for u in value.uses()}) > 1


def _evaluate(node: ir.Node, opset: int) -> list[np.ndarray] | None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    inputs = {f"i{k}": v.const_value.numpy() for k, v in enumerate(node.inputs) if v is not None and v.const_value}
    proto = ir.serde.serialize_node(node)
    proto.input[:] = [f"i{k}" if v is not None else "" for k, v in enumerate(node.inputs)]
    proto.output[:] = [f"o{k}" for k in range(len(node.outputs))]
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [
            onnx.helper.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for k, a in inputs.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(o) for o in proto.output],
    )
    try:
        small = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        return [np.asarray(r) for r in ReferenceEvaluator(small).run(None, inputs)]
    except Exception:
        # An expression the reference evaluator does not know simply stays an expression.
        return None


def _expand_batch_norm(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        if attribute(node, "training_mode", 0) or not all(_is_constant(v) for v in node.inputs[1:]):
            continue
        x = node.inputs[0]
        if x is None or x.shape is None:
            continue
        tensors = [v.const_value.numpy() for v in node.inputs[1:] if v is not None and v.const_value is not None]
        scale, bias, mean, variance = (t.astype(np.float64) for t in tensors)
        gamma = scale / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
        shape = (-1, *(1,) * (len(x.shape) - 2))
        name = node.name or node.outputs[0].name or "batch_norm"
        parts = [
            add_initializer(graph, f"{name}.{role}", array.reshape(shape).astype(tensors[0].dtype))
            for role, array in (("scale", gamma), ("shift", bias - gamma * mean))
        ]
        product = ir.node("Mul", [x, parts[0]], name=f"{name}.scale")
        product.outputs[0].shape, product.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        total = ir.node("Add", [product.outputs[0], parts[1]], name=f"{name}.shift")
        total.outputs[0].shape, total.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        total.outputs[0].name = node.outputs[0].name
        graph.insert_before(node, [product, total])
        ir.convenience.replace_all_uses_with(node.outputs[0], total.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _separate_vectors(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        shape = constant_shape(value)
        if shape is None or value.is_graph_input() or value.is_graph_output():
            continue
        if sum(d != 1 for d in shape) > 1 or value.dtype not in (
            ir.DataType.FLOAT,
            ir.DataType.DOUBLE,
            ir.DataType.FLOAT16,
            ir.DataType.BFLOAT16,
        ):
            continue
        for usage in list(value.uses())[1:]:
            tensor = value.const_value
            assert tensor is not None
            copy = add_initializer(graph, value.name or "vector", tensor.numpy(), like=value)
            copy.metadata_props[COPY_OF] = value.metadata_props.get(COPY_OF, value.name or "")
            usage.node.replace_input_with(usage.idx, copy)
