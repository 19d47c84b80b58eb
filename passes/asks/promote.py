"""Give a nonlinearity a per-channel parameter, so that scales pass it.

    SiLU(x) = x sigmoid(x)        ->  x sigmoid(s x)           x' = x / s  is the same function
    min(max(x, a), b)             ->  min(max(x, a_j), b_j)    d a_j, d b_j take a positive scale d

The parameter is a vector (of ones, of equal bounds) that costs one multiplication or nothing; the analysis then finds
the scales by itself. It is worth it only together with an ask that uses them.

Sources: Xu et al., "MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods", 2025 (smooth-fused
SiLU); Nagel et al., ICCV 2019 (ReLU6 under equalization).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.asks.base import Context, Entry, Rewrite, register_ask
from qcompile.passes.graph import add_initializer, constant, float_type


@register_ask("promote-silu")
@dataclass(frozen=True)
class PromoteSiLU(Rewrite):
    """Parametrizes every ``x sigmoid(x)`` and Swish whose channels lie on a static axis."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Insert the factor before the sigmoid."""
        done = 0
        for node in list(model.graph):
            x = node.inputs[0] if node.inputs else None
            if x is None or node.domain not in ("", "ai.onnx"):
                continue
            vector = _channel_vector(context, x)
            if vector is None:
                continue
            if node.op_type == "Sigmoid" and any(_is_product(u.node, x, node) for u in node.outputs[0].uses()):
                _scale_input(model.graph, node, x, vector)
                done += 1
            elif node.op_type == "Swish":
                sigmoid = ir.node("Sigmoid", [x], name=f"{node.name}.sigmoid")
                product = ir.node("Mul", [x, sigmoid.outputs[0]], name=f"{node.name}.product")
                for new in (sigmoid, product):
                    new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
                product.outputs[0].name, sigmoid.outputs[0].name = node.outputs[0].name, f"{node.name}.gate"
                model.graph.insert_before(node, [sigmoid, product])
                ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0], replace_graph_outputs=True)
                model.graph.remove(node, safe=True)
                alpha = float(node.attributes["alpha"].value) if "alpha" in node.attributes else 1.0
                _scale_input(model.graph, sigmoid, x, vector * alpha)
                done += 1
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} activations parametrized"))
        return done > 0


@register_ask("promote-clip")
@dataclass(frozen=True)
class PromoteClip(Rewrite):
    """Writes every Clip with scalar bounds as Max and Min, whose bounds the analysis may scale per channel."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Replace Clip nodes on values that belong to a space."""
        done = 0
        for node in list(model.graph):
            if node.op_type != "Clip" or node.inputs[0] is None or node.inputs[0].name not in context.spaces.layouts:
                continue
            bounds = [(op, v) for op, v in zip(("Max", "Min"), node.inputs[1:]) if v is not None]
            if any(constant(v) is None for _, v in bounds):
                continue
            current, nodes = node.inputs[0], []
            for op, bound in bounds:
                nodes.append(ir.node(op, [current, bound], name=f"{node.name}.{op.lower()}"))
                current = nodes[-1].outputs[0]
                current.shape, current.type = node.outputs[0].shape, node.outputs[0].type
                current.name = f"{node.outputs[0].name}.{op.lower()}"
            current.name = node.outputs[0].name
            model.graph.insert_before(node, nodes)
            ir.convenience.replace_all_uses_with(node.outputs[0], current, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            done += 1
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} clips opened"))
        return done > 0


def _channel_vector(context: Context, x: ir.Value) -> np.ndarray | None:
    maps = context.spaces.layouts.get(x.name or "", ())
    if len(maps) != 1:
        return None
    return np.ones(maps[0].table.shape)


def _is_product(node: ir.Node, x: ir.Value, sigmoid: ir.Node) -> bool:
    return node.op_type == "Mul" and {id(v) for v in node.inputs} == {id(x), id(sigmoid.outputs[0])}


def _scale_input(graph: ir.Graph, node: ir.Node, x: ir.Value, vector: np.ndarray) -> None:
    lead = next((i for i, n in enumerate(vector.shape) if n != 1), vector.ndim - 1)
    factor = add_initializer(graph, f"{node.name}.factor", vector.reshape(vector.shape[lead:]).astype(float_type(x)))
    scaled = ir.node("Mul", [x, factor], name=f"{node.name}.scaled")
    scaled.outputs[0].shape, scaled.outputs[0].type, scaled.outputs[0].name = x.shape, x.type, f"{node.name}.scaled"
    graph.insert_before(node, [scaled])
    node.replace_input_with(0, scaled.outputs[0])
