"""Products with quantized matrices that are picked at run time become one kernel `Experts`."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import attribute, constant_shape, is_op, module_path
from qcompile.passes.lower.kernel_ops import kernel_node, take_over
from qcompile.passes.lower.linear import AUX, quantized_activation
from qcompile.passes.weights import SITE, quantized_weight


def lower_experts(model: ir.Model) -> None:
    """Replace every ExpertMatMul with a quantized constant stack."""
    for node in list(model.graph):
        if not is_op(node, "ExpertMatMul", domain=DOMAIN):
            continue
        x, picked, ids = node.inputs
        weight = quantized_weight(picked)
        shape = constant_shape(weight.codes) if weight is not None else None
        if weight is None or shape is None or x is None:
            continue
        activation = quantized_activation(x)
        k, experts, n = shape
        operands = [activation.codes, activation.scale, weight.codes, weight.scale, weight.zero_point, ids, None]
        new = kernel_node(
            "Experts",
            [*operands, *weight.aux.values()],
            [node.outputs[0]],
            {
                **({AUX: list(weight.aux)} if weight.aux else {}),
                "weight_format": weight.format,
                "activation_format": activation.format,
                "k": k,
                "n": n,
                "experts": experts,
                "repeat": attribute(node, "repeat", 1),
                "weights": [weight.codes.name],
                "sites": [weight.codes.metadata_props.get(SITE) or module_path(node)],
            },
            like=node,
        )
        model.graph.insert_after(node, [new])
        take_over(node.outputs[0], new.outputs[0])
        model.graph.remove(node, safe=True)
