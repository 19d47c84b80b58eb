"""A decoder graph of any size, built operator by operator, with weights that do not exist until somebody reads them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class Reads:
    """Counts the tensors that were loaded."""

    def __init__(self) -> None:
        self.names: list[str] = []


def llama_graph(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, reads: Reads
) -> ir.Model:
    """Embedding, ``layers`` x (RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU), RMSNorm, head."""
    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []
    float32 = ir.TensorType(ir.DataType.FLOAT)
    width = hidden // heads

    def weight(name: str, *shape: int) -> ir.Value:
        def load() -> ir.TensorProtocol:
            reads.names.append(name)
            return ir.tensor(np.ones(shape, np.float32), name=name)

        lazy = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name, cache=False)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=float32, const_value=lazy)
        initializers.append(value)
        return value

    def integers(name: str, *values: int) -> ir.Value:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        initializers.append(value)
        return value

    def node(op: str, inputs: list[ir.Value], shape: list[int | str], **attributes) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes, name=f"{op.lower()}_{len(nodes)}")
        made.outputs[0].name = f"v{len(nodes)}"
        made.outputs[0].shape, made.outputs[0].type = ir.Shape(shape), float32
        nodes.append(made)
        return made.outputs[0]

    def value(name: str, shape: list[int | str], dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    b, s = "batch", "seq"
    ids = value("ids", [b, s], ir.DataType.INT64)
    cos, sin = (value(n, [b, s, width // 2], ir.DataType.FLOAT) for n in ("cos", "sin"))
    to_heads, to_groups = integers("to_heads", 0, 0, heads, width), integers("to_groups", 0, 0, kv_heads, width)
    merged = integers("merged", 0, 0, hidden)
    x = node("Gather", [weight("table", vocabulary, hidden), ids], [b, s, hidden])
    for i in range(layers):
        y = node("RMSNormalization", [x, weight(f"{i}.n1", hidden)], [b, s, hidden])
        parts = []
        for name, count, shape in (("q", heads, to_heads), ("k", kv_heads, to_groups), ("v", kv_heads, to_groups)):
            p = node("MatMul", [y, weight(f"{i}.{name}", hidden, count * width)], [b, s, count * width])
            p = node("Reshape", [p, shape], [b, s, count, width])
            p = node("Transpose", [p], [b, count, s, width], perm=[0, 2, 1, 3])
            if name != "v":
                p = node("RotaryEmbedding", [p, cos, sin], [b, count, s, width])
            parts.append(p)
        a = node("Attention", parts, [b, heads, s, width], is_causal=1)
        a = node("Transpose", [a], [b, s, heads, width], perm=[0, 2, 1, 3])
        a = node("Reshape", [a, merged], [b, s, hidden])
        a = node("MatMul", [a, weight(f"{i}.o", hidden, hidden)], [b, s, hidden])
        x = node("Add", [x, a], [b, s, hidden])
        y = node("RMSNormalization", [x, weight(f"{i}.n2", hidden)], [b, s, hidden])
        gate = node("MatMul", [y, weight(f"{i}.gate", hidden, inner)], [b, s, inner])
        up = node("MatMul", [y, weight(f"{i}.up", hidden, inner)], [b, s, inner])
        gate = node("Mul", [gate, node("Sigmoid", [gate], [b, s, inner])], [b, s, inner])
        gate = node("Mul", [gate, up], [b, s, inner])
        x = node("Add", [x, node("MatMul", [gate, weight(f"{i}.down", inner, hidden)], [b, s, hidden])], [b, s, hidden])
    x = node("RMSNormalization", [x, weight("norm", hidden)], [b, s, hidden])
    logits = node("MatMul", [x, weight("head", hidden, vocabulary)], [b, s, vocabulary])
    graph = ir.Graph(
        [ids, cos, sin], [logits], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)
