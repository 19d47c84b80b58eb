"""Attention masks as exporters write them -> as kernels want them.

* Exporters of Hugging Face models read the padding mask by computed indices, ``mask[range(batch)[:, None], range(keys)]``
  (GatherND, or Gather on the flattened mask). That is the mask itself with two new axes.
* ``And(true, mask)``, where the first operand is a comparison that always holds (positions from 0 are >= 0), is the mask.
* ``And(causal, padding)`` with ``causal = keys <= queries`` over ranges from 0 is ``is_causal=1`` of Attention and a mask
  of padding alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import small_constant
from qcompile.passes.recognise.result import Found
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, substitute


def counts_along(value: ir.Value | None, depth: int = 8) -> tuple[int, int] | None:
    """If ``value[i, j, ...] = start + i_axis``: the axis (negative) and the start; it has size 1 or repeats along others."""
    if value is None or depth == 0:
        return None
    rank = symbols.rank(value)
    node = value.producer()
    if node is None or node.domain or rank is None:
        return None
    if node.op_type == "Range":
        start, step = symbols.contents(node.inputs[0]), symbols.contents(node.inputs[2])
        return (-1, int(start[0])) if start and step == [1] and isinstance(start[0], int) else None
    if node.op_type in ("Unsqueeze", "Reshape", "Expand", "Cast"):
        inner = counts_along(node.inputs[0], depth - 1)
        before, after = symbols.dims(node.inputs[0]), symbols.dims(value)
        if inner is None or before is None or after is None:
            return None
        axis, start = inner
        if node.op_type in ("Cast", "Expand"):
            return inner if after[axis] == before[axis] else None
        if [d for d in before if d != 1] != [d for d in after if d != 1] or after.count(before[axis]) != 1:
            return None
        return after.index(before[axis]) - len(after), start
    return None


class PaddingMaskRule(Rule):
    """``mask[batch index, key index]`` -> ``mask`` with two axes in between."""

    kind = "padding mask"
    anchors = ("GatherND", "Gather")

    def apply(self, node: ir.Node) -> Found | None:
        mask = self._gather_nd(node) if node.op_type == "GatherND" else self._flat(node)
        result = symbols.dims(node.outputs[0])
        if mask is None or result is None:
            return None
        axes = np.array([1, 2, 4] if len(result) == 5 else [1, 2], np.int64)
        lifted = emit(
            node, "Unsqueeze", [mask, emit_constant(node, axes, f"{node.outputs[0].name}.axes")], like=node.outputs[0]
        )
        substitute(node.outputs[0], lifted)
        return self.found(node)

    def _gather_nd(self, node: ir.Node) -> ir.Value | None:
        mask, indices = node.inputs
        shape, result = symbols.dims(mask), symbols.dims(node.outputs[0])
        if shape is None or len(shape) != 2 or result != (shape[0], 1, 1, shape[1]) or attribute(node, "batch_dims", 0):
            return None
        concat = indices.producer() if indices is not None else None
        if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
            return None
        # Each index tensor is (batch, 1, 1, keys, 1): one counts from 0 along the batch, the other along the keys.
        return mask if [counts_along(v) for v in concat.inputs] == [(-5, 0), (-2, 0)] else None

    def _flat(self, node: ir.Node) -> ir.Value | None:
        """``flat(mask)[batch index * keys + key index]``, where flat(mask) may keep a last axis of size 1."""
        flat, index = node.inputs
        source = flat.producer() if flat is not None else None
        add = index.producer() if index is not None else None
        if source is None or source.op_type not in ("Flatten", "Reshape") or add is None or add.op_type != "Add":
            return None
        mask = source.inputs[0]
        shape, result = symbols.dims(mask), symbols.dims(node.outputs[0])
        if shape is None or len(shape) != 2 or result is None or int(attribute(node, "axis", 0)) != 0:
            return None
        if result not in ((shape[0], 1, 1, shape[1]), (shape[0], 1, 1, shape[1], 1)):
            return None
        for keys, rows in (add.inputs, add.inputs[::-1]):
            mul = rows.producer() if rows is not None else None
            if mul is None or mul.op_type != "Mul" or counts_along(keys) != (-1, 0):
                continue
            for batch, width in (mul.inputs, mul.inputs[::-1]):
                if counts_along(batch) == (-4, 0) and symbols.contents(width) == [shape[1]]:
                    return mask
        return None


class AlwaysTrueRule(Rule):
    """``And(always true, mask)`` as the mask of Attention -> ``mask``; what it broadcasts to is the operator's business."""

    kind = "no-op"
    anchors = ("Attention",)

    def apply(self, node: ir.Node) -> Found | None:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        both = mask.producer() if mask is not None else None
        if both is not None and both.op_type == "Expand" and mask is not None:
            source = both.inputs[0]
            inside, outside = symbols.dims(source), symbols.dims(mask)
            if inside is None or outside is None or len(inside) != len(outside) or inside[-1] != outside[-1]:
                return None
            both = source.producer() if source is not None else None
        if both is None or both.op_type != "And":
            return None
        for true, rest in (both.inputs, both.inputs[::-1]):
            if rest is not None and symbols.rank(rest) == 4 and always_true(true):
                last, keys = symbols.dims(rest), symbols.dims(node.inputs[1])
                if last is None or keys is None or last[-1] != keys[-2]:
                    continue
                node.replace_input_with(3, rest)
                return self.found(node)
        return None


def always_true(value: ir.Value | None) -> bool:
    """Whether every element is True: a constant, or positions counted from ``a`` compared with a smaller number."""
    array = small_constant(value)
    if array is not None:
        return array.dtype == np.bool_ and bool(array.all())
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "GreaterOrEqual":
        return False
    counted, bound = counts_along(node.inputs[0]), symbols.contents(node.inputs[1])
    return (
        counted is not None
        and bound is not None
        and len(bound) == 1
        and isinstance(bound[0], int)
        and counted[1] >= bound[0]
    )


class CausalMaskRule(Rule):
    """Attention with a boolean mask ``And(causal, rest)`` -> ``is_causal=1`` and the mask ``rest``."""

    kind = "causal mask"
    anchors = ("Attention",)

    def apply(self, node: ir.Node) -> Found | None:
        if len(node.inputs) < 4 or node.inputs[3] is None or attribute(node, "is_causal", 0):
            return None
        if any(value is not None for value in node.inputs[4:]):
            return None
        queries, keys = symbols.dims(node.inputs[0]), symbols.dims(node.inputs[1])
        if queries is None or keys is None or queries[-2] != keys[-2]:
            return None  # with a cache, the diagonal is not where is_causal puts it
        mask = node.inputs[3]
        if is_causal(mask):
            node.replace_input_with(3, None)
        else:
            both = mask.producer()
            if both is None or both.op_type != "And":
                return None
            first, second = both.inputs
            rest = second if is_causal(first) else first if is_causal(second) else None
            if rest is None or symbols.rank(rest) != 4:
                return None
            node.replace_input_with(3, rest)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        return self.found(node)


def is_causal(value: ir.Value | None) -> bool:
    """Whether ``value[..., q, k]`` is ``k <= q``."""
    if value is None:
        return False
    array = small_constant(value)
    if array is not None:
        square = array.ndim >= 2 and array.shape[-1] == array.shape[-2] and array.dtype == np.bool_
        return square and bool((array == np.tri(array.shape[-1], dtype=bool)).all())
    node = value.producer()
    if node is None or node.op_type not in ("LessOrEqual", "GreaterOrEqual"):
        return False
    keys, queries = node.inputs if node.op_type == "LessOrEqual" else node.inputs[::-1]
    return counts_along(keys) == (-1, 0) and counts_along(queries) == (-2, 0)
