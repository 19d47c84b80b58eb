"""Gathers of int8 rows with their scales become one kernel `Embedding`."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import attribute, constant_shape, is_op
from qcompile.passes.lower.kernel_ops import kernel_node, take_over


def lower_embeddings(model: ir.Model) -> None:
    """Replace ``DequantizePerToken(Gather(codes, ids), Gather(scale, ids))`` with constant tables."""
    for node in list(model.graph):
        if not is_op(node, "DequantizePerToken", domain=DOMAIN):
            continue
        rows = node.inputs[0].producer() if node.inputs[0] is not None else None
        steps = node.inputs[1].producer() if node.inputs[1] is not None else None
        if not (is_op(rows, "Gather") and is_op(steps, "Gather")):
            continue
        assert rows is not None and steps is not None
        (codes, ids), (scale, same_ids) = rows.inputs, steps.inputs
        if ids is not same_ids or attribute(rows, "axis", 0) != 0 or attribute(steps, "axis", 0) != 0:
            continue
        if constant_shape(codes) is None or constant_shape(scale) is None:
            continue
        new = kernel_node("Embedding", [codes, scale, ids], [node.outputs[0]], like=rows)
        model.graph.insert_after(node, [new])
        take_over(node.outputs[0], new.outputs[0])
        model.graph.remove(node, safe=True)
