"""Small helpers over `onnx_ir` that several passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the numpy value of a constant input (initializer or Constant node), else None."""
    if value is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "":
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()
    return None


def constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a constant without loading it, else None."""
    if value is None or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def add_initializer(
    graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol, like: ir.Value | None = None
) -> ir.Value:
    """Register a new initializer under a name derived from ``name`` that is free in ``graph``."""
    free, i = name, 0
    while free in graph.initializers:
        i += 1
        free = f"{name}.{i}"
    tensor = ir.tensor(array, name=free) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=free, shape=ir.Shape(list(tensor.shape.numpy())), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    if like is not None:
        value.metadata_props.update(like.metadata_props)
    graph.register_initializer(value)
    return value


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Drop initializers that nothing reads."""
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]


def sole_use(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``, or None if there are none, several, or it is a graph output."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    return next(iter(uses)).node


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether ``node`` exists and is one of ``op_types`` in ``domain``."""
    return (
        node is not None and node.domain in (domain, "ai.onnx" if domain == "" else domain) and node.op_type in op_types
    )


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """Value of an attribute, or ``default``."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def module_path(node: ir.Node) -> str:
    """Where in the source model the node came from, for messages; falls back to the node's name."""
    for key in ("pkg.torch.onnx.name_scopes", "namespace"):
        if text := node.metadata_props.get(key):
            return text
    return node.name or node.outputs[0].name or node.op_type


def replace(old: ir.Value, new: ir.Value) -> None:
    """Make every reader of ``old`` read ``new``; a graph output keeps its name."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def insert_before(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes, in order, right before ``anchor``."""
    assert anchor.graph is not None
    anchor.graph.insert_before(anchor, nodes)


def insert_after_producer(value: ir.Value, node: ir.Node) -> None:
    """Insert ``node`` right behind the node that computes ``value``, or first of all if it is an input."""
    producer = value.producer()
    if producer is not None:
        assert producer.graph is not None
        producer.graph.insert_after(producer, [node])
        return
    graph = next(
        iter(use.node.graph for use in value.uses() if use.node is not node and use.node.graph is not None), None
    )
    assert graph is not None
    graph.insert_before(graph[0], [node])


def float_type(value: ir.Value) -> np.dtype:
    """Type for constants that meet ``value``: its own, float32 if it is not known."""
    return np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
