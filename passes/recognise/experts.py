"""One form for products with a matrix that is picked at run time, as mixtures of experts have them.

    GatherND(stack, ids[..., None])                       ->  Gather(stack, ids)
    Squeeze(MatMul(Gather(W, ids), x[..., None]), -1)     ->  Squeeze(MatMul(x[..., None, :], Gather(W^T, ids)), -2)

The stack is then ``(experts, K, N)``, as the weight of every other linear operator is ``(K, N)``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, constant, is_op, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.linear import TRANSPOSE_OF, existing_transpose, is_weight, set_aside
from qcompile.passes.recognise.result import Found
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, substitute


class GatherWhole(Rule):
    """GatherND by indices of one number -> Gather along the first axis."""

    kind = "picked weights"
    anchors = ("GatherND",)

    def apply(self, node: ir.Node) -> Found | None:
        data, index = node.inputs
        dims = symbols.dims(index)
        if not is_weight(data, 3) or dims is None or dims[-1] != 1 or attribute(node, "batch_dims", 0):
            return None
        last = emit_constant(node, np.array([-1]), f"{node.outputs[0].name}.last")
        ids = emit(node, "Squeeze", [index, last])
        assert index is not None
        ids.type, ids.shape = index.type, ir.Shape(dims[:-1])
        substitute(node.outputs[0], emit(node, "Gather", [data, ids], {"axis": 0}, like=node.outputs[0]))
        return self.found(node)


class PickedFromTheRight(Rule):
    """A picked matrix times a column -> a row times the picked transposed matrix."""

    kind = "picked weights"
    anchors = ("Squeeze",)

    def apply(self, node: ir.Node) -> Found | None:
        product = node.inputs[0].producer() if node.inputs[0] is not None else None
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if not is_op(product, "MatMul") or axes is None or axes.size != 1 or sole_use(product.outputs[0]) is None:
            return None
        assert product is not None
        picked, column = product.inputs
        gather, widened = (v.producer() if v is not None else None for v in (picked, column))
        if not is_op(gather, "Gather") or attribute(gather, "axis", 0) or not is_op(widened, "Unsqueeze"):
            return None
        assert gather is not None and widened is not None and picked is not None
        stack, ids = gather.inputs
        shape, rows, result = symbols.dims(picked), symbols.dims(column), symbols.dims(node.outputs[0])
        x = widened.inputs[0]
        source = symbols.dims(x)
        if not is_weight(stack, 3) or None in (shape, rows, result, source) or ids is None:
            return None
        assert (
            stack is not None and shape is not None and rows is not None and source is not None and result is not None
        )
        if rows != (*source, 1) or result != (*shape[:-2], shape[-2]) or source[:-1] != shape[:-2]:
            return None
        turned = _transposed(node, stack)
        *lead, n, k = shape
        picked = emit(node, "Gather", [turned, ids], {"axis": 0})
        picked.type, picked.shape = stack.type, ir.Shape([*lead, k, n])
        place = emit_constant(node, np.array([-2]), f"{node.outputs[0].name}.place")
        row = emit(node, "Unsqueeze", [x, place])
        y = emit(node, "MatMul", [row, picked])
        row.type = y.type = stack.type
        row.shape, y.shape = ir.Shape([*lead, 1, k]), ir.Shape([*lead, 1, n])
        substitute(node.outputs[0], emit(node, "Squeeze", [y, place], like=node.outputs[0]))
        return self.found(node)


def _transposed(anchor: ir.Node, stack: ir.Value) -> ir.Value:
    """An initializer of all matrices transposed, a view on the same memory; it takes the name over."""
    graph, name = anchor.graph, stack.name or "stack"
    assert isinstance(graph, ir.Graph) and stack.const_value is not None
    if (known := existing_transpose(stack)) is not None:
        return known
    array = stack.const_value.numpy().swapaxes(1, 2)
    shared = len(stack.uses()) > 1 or stack.is_graph_output()
    if not shared:
        set_aside(stack)
    free, i = name, 0
    while free in graph.initializers:
        i += 1
        free = f"{name}.T" if i == 1 else f"{name}.T.{i}"
    tensor = ir.Tensor(array, dtype=stack.const_value.dtype, name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.metadata_props.update(stack.metadata_props)
    if shared:
        value.metadata_props[TRANSPOSE_OF] = name
    graph.register_initializer(value)
    return value


RULES: tuple[Rule, ...] = (GatherWhole(), PickedFromTheRight())
