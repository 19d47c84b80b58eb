"""Constant folding at conversion: a node whose inputs are all known is computed once, here, by ONNX's reference evaluator.

What is *not* folded: nodes that quantize or dequantize weights (they are the point of the compiler: folding
DequantizeLinear would store the float weights), random operators, and results larger than a limit or much larger than
what they are computed from (an ``Expand`` of a scalar belongs into the program, not into its constants).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompile.codegen.relax.context import Context

#: Largest input or result, in elements.
FOLD_LIMIT = 1 << 24

#: A result may always have this many elements, and otherwise at most twice as many as the inputs.
SMALL = 4096

_NEVER = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform"}
    | {"RandomUniformLike", "Bernoulli", "Multinomial", "Dropout", "If", "Loop", "Scan", "SequenceMap", "Optional"}
)


def fold(ctx: Context, node: ir.Node) -> list[np.ndarray] | None:
    """The outputs of a node with constant inputs, or ``None`` if it must be computed when the program runs."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER or not node.outputs:
        return None
    if node.op_type == "Constant":
        return None
    total = 0
    for value in node.inputs:
        if value is None:
            continue
        known = ctx.known(value)
        if not known.is_constant():
            return None
        total += known.tensor.size if known.tensor is not None else known.constant.size
    if total > FOLD_LIMIT:
        return None
    if node.op_type in ("ConstantOfShape", "Expand", "Tile") and _elements(ctx, node) > max(SMALL, 2 * total):
        return None
    results = _evaluate(ctx, node)
    if results is None:
        return None
    limit = max(SMALL, 2 * total)
    if any(not isinstance(r, np.ndarray | np.generic) or np.size(r) > limit for r in results):
        return None
    return [np.asarray(r) for r in results]


def _elements(ctx: Context, node: ir.Node) -> int:
    shape = ctx.constant(node.inputs[-1] if node.op_type != "ConstantOfShape" else node.inputs[0])
    count = int(np.prod(shape.astype(np.float64)))
    if node.op_type == "Tile":
        count *= max(ctx.constant(node.inputs[0]).size, 1)
    return count


def _evaluate(ctx: Context, node: ir.Node) -> list[np.ndarray] | None:
    """Runs the node alone in the reference evaluator; ``None`` where that does not implement it."""
    feeds, names = {}, []
    for i, value in enumerate(node.inputs):
        names.append("" if value is None else f"i{i}")
        if value is not None:
            feeds[f"i{i}"] = ctx.constant(value)
    outputs = [f"o{i}" if output.name else "" for i, output in enumerate(node.outputs)]
    try:
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(outputs)
        graph = onnx.helper.make_graph(
            [proto],
            "fold",
            [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in feeds],
            [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in outputs if n],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", ctx.version(node))])
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # the evaluator signals what it lacks in many ways; the node is then computed by the program
        return None
    results = iter(found)
    return [next(results) if name else np.zeros(0) for name in outputs]
