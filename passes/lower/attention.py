"""Attention with its head splits, rotary embeddings and head merges becomes kernel `Rope` and `Attention`.

The kernels read rows of projections as the Linears wrote them, ``(batch, sequence, heads x head_dim)``; where query,
key and value come from one activation, the three Linears are merged and the kernels read ``[q | k | v]`` in place. What
comes from elsewhere, such as a cache of keys and values, is read as ``(batch, heads, sequence, head_dim)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.passes.graph import add_initializer, attribute, constant, is_op, sole_use
from qcompile.passes.lower.kernel_ops import is_kernel, kernel_node, take_over
from qcompile.passes.lower.linear import merge_linears


@dataclass(frozen=True)
class Rotary:
    """cos and sin ``(batch or 1, sequence, rotary / 2)`` of a rotary embedding."""

    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    rotary: int

    def same(self, other: Rotary | None) -> bool:
        """Whether both rotate alike."""
        return self == other


@dataclass(frozen=True)
class Projection:
    """Rows ``(batch, sequence, heads x head_dim)`` behind one operand of an Attention."""

    rows: ir.Value
    heads: int
    head_dim: int
    rotary: Rotary | None


def lower_attention(model: ir.Model) -> None:
    """Replace every Attention the kernel computes; the others stay for the general lowering."""
    common.CommonSubexpressionEliminationPass()(model)
    for node in list(model.graph):
        if is_op(node, "Attention"):
            _lower(model.graph, node)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    query, key, value, mask = inputs[:4]
    if query is None or key is None or value is None or any(v is not None for v in inputs[4:]):
        return
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or float(attribute(node, "softcap", 0.0)) != 0.0:  # type: ignore[arg-type]
        return
    q = _projection(query, attribute(node, "q_num_heads"))
    k = _projection(key, attribute(node, "kv_num_heads"))
    v = _projection(value, attribute(node, "kv_num_heads"))
    split = q is None or k is None or v is None or v.rotary is not None
    if split:
        q, k, v = _heads(query), _heads(_before_repeat(key)), _heads(_before_repeat(value))
    if q is None or k is None or v is None:
        return
    if q.head_dim != k.head_dim or k.heads != v.heads or q.heads % k.heads:
        return
    if v.head_dim != q.head_dim and not split:
        return
    merged_heads = query.shape is not None and len(query.shape) == 3
    out, tail = (node.outputs[0], []) if merged_heads else _merge_of_heads(node.outputs[0], q.heads * v.head_dim)
    if out is None:
        return
    attributes: dict[str, object] = {
        "heads": q.heads,
        "kv_heads": k.heads,
        "head_dim": q.head_dim,
        "value_dim": v.head_dim,
        "is_causal": int(attribute(node, "is_causal", 0)),  # type: ignore[call-overload]
        "scale": float(attribute(node, "scale", q.head_dim**-0.5) or q.head_dim**-0.5),  # type: ignore[arg-type]
    }
    if split:
        layout, operands = "heads", [q.rows, k.rows, v.rows]
    elif (merged := _merged(graph, q, k, v)) is not None:
        layout, operands = "merged", merged
    else:
        layout, operands = "rows", _separate(graph, node, q, k, v)
    if out.shape is not None and len(out.shape) == 4:
        out = _rows_before(graph, out, tail, q.heads, v.head_dim)
    new = kernel_node("Attention", [*operands, mask], [out], {**attributes, "layout": layout}, node)
    graph.insert_before(node, [new])
    take_over(out, new.outputs[0])
    for old in [*reversed(tail), node]:
        graph.remove(old, safe=True)


def _heads(value: ir.Value) -> Projection | None:
    """An operand of an Attention as it is, ``(batch, heads, sequence, head_dim)``."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, head_dim = value.shape[1], value.shape[3]
    return Projection(value, heads, head_dim, None) if isinstance(heads, int) and isinstance(head_dim, int) else None


def _merged(graph: ir.Graph, q: Projection, k: Projection, v: Projection) -> list[ir.Value] | None:
    """One matrix [q | k | v], if the three come from Linears over the same activation and rotate alike."""
    linears = [p.rows.producer() for p in (q, k, v)]
    if not all(is_kernel(linear, "Linear") for linear in linears) or len({id(n) for n in linears}) != 3:
        return None
    if (q.rotary is None) != (k.rotary is None) or (q.rotary is not None and not q.rotary.same(k.rotary)):
        return None
    rows = merge_linears(graph, linears)  # type: ignore[arg-type]
    if rows is None:
        return None
    if q.rotary is not None:
        after = rows.producer()
        assert after is not None
        rows = _rope(graph, rows, q.heads + k.heads, q.head_dim, q.rotary)
    return [rows]


def _separate(graph: ir.Graph, node: ir.Node, *projections: Projection) -> list[ir.Value]:
    return [
        p.rows if p.rotary is None else _rope(graph, p.rows, p.heads, p.head_dim, p.rotary, before=node)
        for p in projections
    ]


def _rope(
    graph: ir.Graph, rows: ir.Value, heads: int, head_dim: int, rotary: Rotary, before: ir.Node | None = None
) -> ir.Value:
    attributes = {
        "heads": heads,
        "head_dim": head_dim,
        "rotary": rotary.rotary,
        "interleaved": int(rotary.interleaved),
    }
    node = kernel_node("Rope", [rows, rotary.cos, rotary.sin], [rows], attributes)
    node.outputs[0].name = f"{rows.name}.rotated.{heads}"
    if before is None:
        # cos and sin may be computed after the projection: place the rotation after all three.
        order = {id(n): i for i, n in enumerate(graph)}
        producers = [v.producer() for v in (rows, rotary.cos, rotary.sin)]
        last = max((p for p in producers if p is not None), key=lambda p: order[id(p)])
        graph.insert_after(last, [node])
    else:
        graph.insert_before(before, [node])
    return node.outputs[0]


def _projection(value: ir.Value, heads_attribute: object) -> Projection | None:
    if value.shape is None:
        return None
    if len(value.shape) == 3:
        if not heads_attribute or not isinstance(value.shape[2], int):
            return None
        heads = int(heads_attribute)  # type: ignore[call-overload]
        return Projection(value, heads, value.shape[2] // heads, None)
    value = _before_repeat(value)
    rotary = None
    node = value.producer()
    if is_op(node, "RotaryEmbedding"):
        assert node is not None
        rotary = _rotary(node)
        if rotary is None or node.inputs[0] is None:
            return None
        value = node.inputs[0]
        node = value.producer()
    if not is_op(node, "Transpose") or list(attribute(node, "perm", [])) != [0, 2, 1, 3]:  # type: ignore[arg-type, call-overload]
        return None
    assert node is not None and node.inputs[0] is not None
    split = node.inputs[0].producer()
    if not is_op(split, "Reshape") or node.inputs[0].shape is None:
        return None
    assert split is not None
    rows = split.inputs[0]
    shape = node.inputs[0].shape
    heads, head_dim = shape[2], shape[3]
    if rows is None or rows.shape is None or len(rows.shape) != 3:
        return None
    if not isinstance(heads, int) or not isinstance(head_dim, int) or rows.shape[2] != heads * head_dim:
        return None
    return Projection(rows, heads, head_dim, rotary)


def _before_repeat(value: ir.Value) -> ir.Value:
    """Step over ``Reshape(Expand(Unsqueeze(x, 2)))``, which repeats key/value heads for grouped queries."""
    reshape = value.producer()
    if not is_op(reshape, "Reshape"):
        return value
    assert reshape is not None and reshape.inputs[0] is not None
    expand = reshape.inputs[0].producer()
    if not is_op(expand, "Expand"):
        return value
    assert expand is not None and expand.inputs[0] is not None
    unsqueeze = expand.inputs[0].producer()
    if not is_op(unsqueeze, "Unsqueeze"):
        return value
    assert unsqueeze is not None
    axes, source = constant(unsqueeze.inputs[1]), unsqueeze.inputs[0]
    if axes is None or axes.tolist() not in ([2], 2) or source is None or source.shape is None:
        return value
    wide = expand.outputs[0].shape
    if len(source.shape) != 4 or wide is None or len(wide) != 5 or value.shape is None or len(value.shape) != 4:
        return value
    kept = wide[1] == source.shape[1] and wide[3:] == source.shape[2:] and value.shape[2:] == source.shape[2:]
    return source if kept else value


def _rotary(node: ir.Node) -> Rotary | None:
    cos, sin = node.inputs[1], node.inputs[2]
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    x = node.inputs[0]
    if cos is None or sin is None or positions is not None or x is None or x.shape is None or len(x.shape) != 4:
        return None
    rotary = int(attribute(node, "rotary_embedding_dim", 0)) or x.shape[3]  # type: ignore[call-overload]
    if not isinstance(rotary, int):
        return None
    return Rotary(cos, sin, bool(attribute(node, "interleaved", 0)), rotary)


def _merge_of_heads(value: ir.Value, width: int) -> tuple[ir.Value | None, list[ir.Node]]:
    """Follow ``Reshape(Transpose(y, 0213), (batch, sequence, width))``; returns the rows and the nodes passed.

    Where other things are done to the transposed value, that is returned.
    """
    transpose = sole_use(value)
    if not is_op(transpose, "Transpose") or list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:  # type: ignore[arg-type, call-overload]
        return None, []
    assert transpose is not None
    split = transpose.outputs[0]
    reshape = sole_use(split)
    shape = reshape.outputs[0].shape if reshape is not None and is_op(reshape, "Reshape") else None
    if reshape is not None and shape is not None and len(shape) == 3 and shape[2] == width:
        return reshape.outputs[0], [transpose, reshape]
    return (split, [transpose]) if split.shape is not None and not split.is_graph_output() else (None, [])


def _rows_before(graph: ir.Graph, split: ir.Value, tail: list[ir.Node], heads: int, head_dim: int) -> ir.Value:
    """A new value ``(batch, sequence, heads x head_dim)`` whose Reshape takes the place of ``split``."""
    assert split.shape is not None
    rows = ir.Value(name=f"{split.name}.rows", type=split.type)
    rows.shape = ir.Shape([*split.shape[:2], heads * head_dim])
    target = add_initializer(graph, f"{split.name}.split", np.array([0, 0, heads, head_dim], np.int64))
    reshape = ir.node("Reshape", [rows, target])
    reshape.outputs[0].type, reshape.outputs[0].shape = split.type, split.shape
    graph.insert_after(tail[-1], [reshape])
    take_over(split, reshape.outputs[0])
    return rows
