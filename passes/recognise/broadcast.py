"""Broadcasting that ONNX allows by its text but that the operators as implemented want spelled out.

* RotaryEmbedding without position ids takes tables (batch, sequence, half); a model that counts positions from 0
  computes them with batch 1.
* Attention takes a mask (batch or 1, heads or 1, queries, keys); a padding mask has one row for all queries.

Both are expanded by an Expand whose shape is read from a graph input where possible, so that all layers share it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.rule import emit, emit_constant


def expand_tables(graph: ir.Graph) -> int:
    """Expand cos and sin of every RotaryEmbedding to the batch of its input; return how many operators were changed."""
    changed = 0
    done: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        data = node.inputs[0]
        if data is None or _equal(data, 0, node.inputs[1], 0):
            continue
        for index in (1, 2):
            table = node.inputs[index]
            if table is not None:
                node.replace_input_with(index, _expand(node, table, 0, data, 0, done))
        changed += 1
    return changed


def expand_masks(graph: ir.Graph) -> int:
    """Expand the mask of every Attention to one row per query; return how many operators were changed."""
    changed = 0
    done: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        queries, mask = node.inputs[0], node.inputs[3]
        if symbols.rank(queries) != 4 or queries is None or (symbols.rank(mask) or 0) < 2 or mask.shape is None:
            continue
        if mask.shape[-2] == 1 and queries.shape is not None and queries.shape[2] != 1:
            node.replace_input_with(3, _expand(node, mask, len(mask.shape) - 2, queries, 2, done))
            changed += 1
    return changed


def _equal(a: ir.Value | None, i: int, b: ir.Value | None, j: int) -> bool:
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    first, second = a.shape[i], b.shape[j]
    if isinstance(first, ir.SymbolicDim) and isinstance(second, ir.SymbolicDim):
        return first.value is not None and first.value == second.value
    return isinstance(first, int) and first == second


def _expand(
    node: ir.Node, value: ir.Value, axis: int, like: ir.Value, like_axis: int, done: dict[ir.Value, ir.Value]
) -> ir.Value:
    """Expand ``axis`` of ``value`` from 1 to the size of ``like_axis`` of ``like``."""
    if value in done:
        return done[value]
    source, source_axis = _same_dimension(node.graph, like, like_axis)
    size = emit(node, "Shape", [source], {"start": source_axis, "end": source_axis + 1})
    rank = symbols.rank(value) or 0
    parts: list[ir.Value] = [size]
    for count, place in ((axis, 0), (rank - axis - 1, len(parts))):
        if count:
            ones = emit_constant(node, np.ones(count, np.int64), "expand.keep")
            parts.insert(0 if place == 0 else len(parts), ones)
    shape = emit(node, "Concat", parts, {"axis": 0}) if len(parts) > 1 else size
    result = emit(node, "Expand", [value, shape])
    result.type = value.type
    if value.shape is not None and like.shape is not None:
        known = list(value.shape)
        known[axis] = like.shape[like_axis]
        result.shape = ir.Shape(known)
    done[value] = result
    return result


def _same_dimension(graph: object, like: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """A graph input with a dimension of the same symbolic size, and the axis; ``like`` itself if there is none."""
    wanted = like.shape[axis] if like.shape is not None else None
    if isinstance(graph, ir.Graph) and isinstance(wanted, ir.SymbolicDim) and wanted.value is not None:
        for value in graph.inputs:
            for index, dim in enumerate(value.shape or ()):
                if isinstance(dim, ir.SymbolicDim) and dim.value == wanted.value:
                    return value, index
    return like, axis
