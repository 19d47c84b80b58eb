"""Keeps channels last between convolution kernels: Transposes sink through element-wise operators and meet their inverse.

f(Transpose(x), Transpose(y))  ->  Transpose(f(x, y))        Transpose(Transpose(x))  ->  x
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.graph import attribute, constant, is_op
from qcompile.passes.lower.kernel_ops import take_over

_ELEMENTWISE = (
    *("Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Gelu", "Mish", "Tanh", "Clip"),
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Abs", "Neg", "Identity"),
)


def sink_transposes(model: ir.Model) -> None:
    """Move ``(0, last, 1, ...)`` Transposes behind element-wise operators, then cancel pairs."""
    graph = model.graph
    for node in list(graph):
        if is_op(node, *_ELEMENTWISE):
            _sink(graph, node)
        elif is_op(node, "GlobalAveragePool", "ReduceMean"):
            _sink_mean(graph, node)
        elif is_op(node, "Transpose"):
            _cancel(graph, node)


def _behind(value: ir.Value | None) -> ir.Value | None:
    """What a channels-first view is a view of."""
    node = value.producer() if value is not None else None
    if not is_op(node, "Transpose"):
        return None
    assert node is not None
    perm = list(attribute(node, "perm", ()))  # type: ignore[call-overload]
    return node.inputs[0] if len(perm) > 2 and perm == [0, len(perm) - 1, *range(1, len(perm) - 1)] else None


def _is_scalar(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and array.ndim <= 1


def _sink(graph: ir.Graph, node: ir.Node) -> None:
    behind = [_behind(v) for v in node.inputs]
    tensors = [v for v in node.inputs if v is not None and not _is_scalar(v)]
    sources = [b for b in behind if b is not None]
    if not sources or len(sources) != len(tensors) or len(node.outputs) != 1:
        return
    first = tensors[0]
    if first.shape is None or any(v.shape != first.shape for v in tensors) or node.outputs[0].shape != first.shape:
        return  # broadcasting follows the order of axes
    perm = attribute(first.producer(), "perm")  # type: ignore[arg-type]
    for index, source in enumerate(behind):
        if source is not None:
            node.replace_input_with(index, source)
    out = node.outputs[0]
    back = ir.node("Transpose", [out], attributes={"perm": perm})
    back.outputs[0].shape, back.outputs[0].type = out.shape, out.type
    graph.insert_after(node, [back])
    users = [(u.node, u.idx) for u in out.uses() if u.node is not back]
    new = back.outputs[0]
    for user, index in users:
        user.replace_input_with(index, new)
    if out.is_graph_output():
        graph.outputs[list(graph.outputs).index(out)] = new
    name = out.name
    out.name, new.name = f"{name}.last", name
    out.shape = sources[0].shape


def _sink_mean(graph: ir.Graph, node: ir.Node) -> None:
    """An average over all positions reads them in any order."""
    source = _behind(node.inputs[0])
    if source is None or source.shape is None:
        return
    rank = len(source.shape)
    keep = True
    if node.op_type == "ReduceMean":
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(int(a) % rank for a in axes.reshape(-1)) != list(range(2, rank)):
            return
        keep = bool(attribute(node, "keepdims", 1))
    axes_value = ir.Value(
        name=f"{node.outputs[0].name}.axes", const_value=ir.tensor(list(range(1, rank - 1)), dtype=ir.DataType.INT64)
    )
    axes_value.shape, axes_value.type = ir.Shape([rank - 2]), ir.TensorType(ir.DataType.INT64)
    graph.register_initializer(axes_value)
    out = node.outputs[0]
    mean = ir.node("ReduceMean", [source, axes_value], attributes={"keepdims": int(keep)}, name=node.name)
    made = mean.outputs[0]
    made.type, made.shape = out.type, out.shape
    nodes = [mean]
    if keep:
        made.name, made.shape = f"{out.name}.last", ir.Shape([source.shape[0], *[1] * (rank - 2), source.shape[-1]])
        nodes.append(ir.node("Transpose", [made], attributes={"perm": [0, rank - 1, *range(1, rank - 1)]}))
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = out.type, out.shape
    graph.insert_after(node, nodes)
    take_over(out, nodes[-1].outputs[0])
    graph.remove(node, safe=True)


def _cancel(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if not is_op(source, "Transpose"):
        return
    assert source is not None and source.inputs[0] is not None
    first, second = list(attribute(source, "perm", ())), list(attribute(node, "perm", ()))  # type: ignore[call-overload]
    if len(first) != len(second) or [first[i] for i in second] != list(range(len(first))):
        return
    if node.outputs[0].is_graph_output():
        return
    ir.convenience.replace_all_uses_with(node.outputs[0], source.inputs[0])
    graph.remove(node, safe=True)
