"""The order of things: current opset, constants, simplification, linear operators, composites, clean up."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import add_initializer, is_op, remove_unused_initializers
from qcompile.passes.opset import convert_opset
from qcompile.passes.recognise import experts, linear, simplify, symbols
from qcompile.passes.recognise.activations import GeluRule, SwishRule
from qcompile.passes.recognise.attention import AttentionRule, FourAxesRule, GroupedQueryRule
from qcompile.passes.recognise.batch_norm import FoldBatchNorm, FoldBatchNormLinear
from qcompile.passes.recognise.broadcast import expand_masks, expand_tables
from qcompile.passes.recognise.einsum import EinsumToMatMul
from qcompile.passes.recognise.embeddings import UniformLookup
from qcompile.passes.recognise.layer_norm import LayerNormRule
from qcompile.passes.recognise.masks import AlwaysTrueRule, CausalMaskRule, PaddingMaskRule
from qcompile.passes.recognise.result import COMPOSITES, Recognised, Refused
from qcompile.passes.recognise.rms_norm import RmsNormRule
from qcompile.passes.recognise.rotary import PartialRotaryRule, RotaryByHeadsRule, RotaryRule
from qcompile.passes.recognise.rule import Rule, apply_rules
from qcompile.passes.recognise.ties import merge_equal_weights

OPSET = 24
COMPOSITE_RULES: tuple[Rule, ...] = (
    EinsumToMatMul(),
    FoldBatchNorm(),
    FoldBatchNormLinear(),
    LayerNormRule(),
    RmsNormRule(),
    GeluRule(),
    SwishRule(),
    RotaryRule(),
    PartialRotaryRule(),
    RotaryByHeadsRule(),
    PaddingMaskRule(),
    UniformLookup(),
    AttentionRule(),
    FourAxesRule(),
    GroupedQueryRule(),
    AlwaysTrueRule(),
    CausalMaskRule(),
)


def recognise(model: ir.Model) -> tuple[ir.Model, Recognised]:
    """Return a new model in which patterns have become composites, and the report of what was found and refused.

    The result has default-domain opset 24, constants as initializers, linear operators as ``MatMul(x, w)`` with
    ``w`` of shape (K, N) followed by ``Add(y, bias)``, inferred shapes, and runs in stock ONNX Runtime.
    """
    model = model.clone()
    report = Recognised()
    prepare(model)
    merge_equal_weights(model.graph, report)
    # Transposed weights before constants in general, so that they keep their names and stay views on mapped memory.
    apply_rules(model, linear.RULES, report)
    for _ in range(10):
        report.refused.clear()  # what an earlier round refused, this one may raise
        fold_constants(model, report)
        symbols.infer(model)
        changes = apply_rules(model, simplify.RULES, report)
        changes += apply_rules(model, (*linear.RULES, *experts.RULES), report)
        symbols.infer(model)
        changes += apply_rules(model, COMPOSITE_RULES, report)
        if not changes:
            break
    finish(model, report)
    count(model, report)
    return model, report


def prepare(model: ir.Model) -> None:
    """Inline functions of other domains, spell out loops, make constants initializers, raise the opset number."""
    convert_opset(model, OPSET)
    common_passes.InlinePass(lambda function: function.domain != DOMAIN)(model)
    start_loops(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common_passes.RemoveInitializersFromInputsPass()(model)
    common_passes.CommonSubexpressionEliminationPass()(model)


def start_loops(model: ir.Model) -> None:
    """Give loops without a condition one that is true; inference of shapes demands it."""
    loops = [node for node in model.graph.all_nodes() if is_op(node, "Loop") and node.inputs[1] is None]
    for node in loops:
        node.replace_input_with(1, add_initializer(model.graph, "loop.starts", np.array(True)))


def fold_constants(model: ir.Model, report: Recognised) -> None:
    """Evaluate what depends on constants only, results of at most 2^18 elements."""
    import onnxscript.optimizer

    try:
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False, output_size_limit=1 << 18)
    except RuntimeError as error:  # it cannot evaluate an operator; what it folded before that stays
        report.refused.append(Refused("constant folding", "the graph", " ".join(str(error).split())[:200]))
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common_passes.RemoveUnusedNodesPass()(model)


def finish(model: ir.Model, report: Recognised) -> None:
    """Spell out broadcasting, merge equal subexpressions, drop what nothing reads, sort, give every value a name and a shape."""
    expand_tables(model.graph)
    expand_masks(model.graph)
    for _ in range(2):
        common_passes.DeduplicateInitializersPass(size_limit=16)(model)
        common_passes.CommonSubexpressionEliminationPass()(model)
        common_passes.RemoveUnusedNodesPass()(model)
        symbols.infer(model)
        apply_rules(model, simplify.RULES, report)
    remove_unused_initializers(model.graph)
    common_passes.TopologicalSortPass()(model)
    common_passes.NameFixPass()(model)
    symbols.infer(model)
    symbols.clear(model)


def count(model: ir.Model, report: Recognised) -> None:
    """Fill in what the resulting graph holds."""
    kinds = Counter(node.op_type for node in model.graph.all_nodes() if node.domain == "")
    report.composites = Counter({kind: kinds[kind] for kind in COMPOSITES if kinds[kind]})
    for node in model.graph.all_nodes():
        if is_op(node, "MatMul") and linear.is_weight(node.inputs[1]):
            report.linears += 1
        if is_op(node, "Mul") and any(v is not None and is_op(v.producer(), "Swish") for v in node.inputs):
            report.swiglu += 1
