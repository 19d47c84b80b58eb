"""A convolution whose result only a static quantizer reads stores codes instead of floats.

    Quantize(Clip(Conv(x), lo, hi), step)  ->  Conv(x, limits = (step, lowest, highest))

Rounding keeps the order of numbers, so what is clipped before the quantizer can be clipped as codes:
``lowest = max(round(lo / step), -2^(b-1))``, ``highest = min(round(hi / step), 2^(b-1) - 1)``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import add_initializer, attribute, constant, is_op
from qcompile.passes.lower.kernel_ops import is_kernel, take_over

LIMITS = 6
"""Index of the operand of `Conv` that holds step, lowest and highest code."""


def store_codes(model: ir.Model) -> None:
    """Merge static quantizers into the convolutions before them."""
    for node in list(model.graph):
        if is_kernel(node, "Quantize") and len(node.inputs) > 1 and node.inputs[1] is not None:
            _merge(model.graph, node)


def _merge(graph: ir.Graph, quantizer: ir.Node) -> None:
    step = constant(quantizer.inputs[1])
    if step is None or step.size != 1:
        return
    top = 1 << (int(attribute(quantizer, "bits", 8)) - 1)  # type: ignore[call-overload]
    low, high = -float(top), float(top - 1)
    between = []
    node = _only_reader(quantizer.inputs[0])
    while is_op(node, "Clip", "Relu"):
        assert node is not None
        bounds = _bounds(node)
        if bounds is None:
            return
        # The last clip of the chain is met first: what it leaves bounds what those before it may leave.
        low, high = (float(np.clip(np.rint(np.float32(b) / step.reshape(())), low, high)) for b in bounds)
        between.append(node)
        node = _only_reader(node.inputs[0])
    if not is_kernel(node, "Conv"):
        return
    assert node is not None
    operands = [*node.inputs, *[None] * (LIMITS + 1 - len(node.inputs))]
    if operands[LIMITS] is not None:
        return
    limits = np.array([float(step.reshape(())), low, high], np.float32)
    codes, scale = quantizer.outputs
    operands[LIMITS] = add_initializer(graph, f"{codes.name}.limits", limits)
    merged = ir.node(
        "Conv",
        operands,
        domain=node.domain,
        num_outputs=2,
        attributes=dict(node.attributes),
        name=node.name,
    )
    merged.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [merged])
    for old, new in zip((codes, scale), merged.outputs):
        new.shape, new.type = old.shape, old.type
        take_over(old, new)
    for gone in (quantizer, *between, node):
        graph.remove(gone, safe=True)


def _only_reader(value: ir.Value | None) -> ir.Node | None:
    """The producer of a value that nothing else reads."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.producer()


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if is_op(node, "Relu"):
        return 0.0, np.inf
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        operand = node.inputs[index] if len(node.inputs) > index else None
        value = None if operand is None else constant(operand)
        if operand is not None and (value is None or value.size != 1):
            return None
        bounds.append(default if value is None else float(value.reshape(())))
    return bounds[0], bounds[1]
