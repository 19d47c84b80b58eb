"""Attention.

    y = softmax(cap(scale Q K^T) + mask) V          cap(s) = c tanh(s / c)

with Q (batch, heads, queries, size), K and V (batch, kv heads, keys, size). The scale may sit on Q, on K, on the scores
or be split between them; the mask is added, or selects between scores and a large negative number; keys and values that
are repeated per group of heads (Unsqueeze, Expand, Reshape) give grouped-query attention. The result is always the
four-axis form; the Transpose and Reshape around it stay operators of their own. A guard that replaces NaN weights by 0
is dropped: it acts only on queries for which every key is masked, whose result means nothing (padding).
Vaswani et al. 2017; Ainslie et al. 2023, "GQA"; ONNX Attention-23.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import outside_readers, small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, remove_dead, substitute

NEGLIGIBLE = -1e4  # exp of this is 0 in float32 and in float16


@dataclass
class _Core:
    """What is known after walking from the weighted sum back to Q and K."""

    scale: float = 1.0
    softcap: float = 0.0
    mask: ir.Value | None = None
    selects: tuple[ir.Value, ir.Value] | None = None  # (condition, fill) of Where(condition, scores, fill)
    nodes: list[ir.Node] = field(default_factory=list)


class AttentionRule(Rule):
    """Raises Attention."""

    kind = "Attention"
    anchors = ("MatMul",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        core = _Core()
        weights, values = node.inputs
        softmax = _softmax(weights, core)
        if softmax is None or values is None:
            return None
        problem = _scores(softmax.inputs[0], core)
        if problem is not None:
            return self.refused(node, problem) if problem else None
        product = core.nodes[-1]
        queries, scale_q = _unscaled(product.inputs[0])
        keys, scale_k = _unscaled(product.inputs[1])
        core.scale *= scale_q * scale_k
        shapes = [symbols.dims(v) for v in (queries, keys, values)]
        if any(shape is None for shape in shapes):
            return self.refused(node, "the shapes of queries, keys and values are not known")
        q, k, v = (shape for shape in shapes if shape is not None)
        if len(q) != 4 or len(k) != 4 or len(v) != 4:
            return self.refused(node, "queries, keys and values are not (batch, heads, positions, size)")
        axis = int(attribute(softmax, "axis", -1))
        if axis not in (-1, 3):
            return self.refused(node, f"the softmax runs over axis {axis}, not over the keys")
        outside = outside_readers((*core.nodes, node), node.outputs[0])
        if outside is not None:
            return self.refused(node, f"the intermediate '{outside.name}' is used elsewhere")
        if not (isinstance(q[1], int) and isinstance(k[1], int) and isinstance(v[1], int)):
            return self.refused(node, "the number of heads is not known")
        if k[1] not in (1, q[1]) or v[1] not in (1, q[1]) or k[0] != q[0] or v[0] != q[0]:
            return self.refused(node, "keys or values broadcast over the batch or over part of the heads")
        mask = core.mask
        if mask is not None and core.selects is not None:
            return self.refused(node, "has an added mask and a selecting one")
        for added in (mask, core.selects[0] if core.selects is not None else None):
            if added is not None and (problem := _mask_problem(added, q, k[3])):
                return self.refused(node, problem)

        keys, scale_k = _unscaled(_untransposed(keys, node), of=node)
        core.scale *= scale_k
        if k[1] != v[1]:  # one of them broadcasts over the heads: the operator wants the same number in both
            keys, values = (_repeated(value, max(k[1], v[1]), node) for value in (keys, values))
        mask = _boolean(mask)
        if core.selects is not None:
            condition, fill = core.selects
            mask = condition if _is_masking(fill) else None
        if mask is not None:
            mask = _four_axes(mask, node)
        attributes: dict[str, object] = {"scale": float(np.float32(core.scale))}
        if core.softcap:
            attributes["softcap"] = core.softcap
        inputs = [queries, keys, values] + ([mask] if mask is not None else [])
        substitute(node.outputs[0], emit(node, self.kind, inputs, attributes, like=node.outputs[0]))
        return self.found(node)


class GroupedQueryRule(Rule):
    """Attention whose keys and values are repeated per group of query heads -> Attention on what was repeated."""

    kind = "grouped-query attention"
    anchors = ("Attention",)

    def apply(self, node: ir.Node) -> Found | None:
        if len(node.inputs) < 3 or node.inputs[1] is None or node.inputs[2] is None:
            return None
        keys, values = _ungrouped(node.inputs[1]), _ungrouped(node.inputs[2])
        before = [symbols.dims(v) for v in (node.inputs[0], keys, values)]
        if keys is node.inputs[1] or values is node.inputs[2] or any(shape is None for shape in before):
            return None
        heads = [shape[1] for shape in before if shape is not None]
        if heads[1] != heads[2] or not all(isinstance(h, int) for h in heads):
            return None
        unused = [v.producer() for v in node.inputs[1:3] if v is not None]
        node.replace_input_with(1, keys)
        node.replace_input_with(2, values)
        remove_dead([producer for producer in unused if producer is not None])
        return self.found(node, f"{int(heads[0]) // int(heads[1])} query heads per key head")


class FourAxesRule(Rule):
    """Attention on (batch, positions, heads * size) -> on (batch, heads, positions, size), between explicit transposes."""

    kind = "attention by heads"
    anchors = ("Attention",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        q_heads, kv_heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
        shapes = [symbols.dims(v) for v in node.inputs[:3]]
        if not q_heads or not kv_heads or any(shape is None or len(shape) != 3 for shape in shapes):
            return None
        if len(node.outputs) > 1 and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return self.refused(node, "present keys and values are read")
        inputs: list[ir.Value | None] = []
        for value, shape, heads in zip(node.inputs, shapes, (q_heads, kv_heads, kv_heads)):
            if value is None or shape is None or not isinstance(shape[2], int):
                return self.refused(node, "the size of heads is not known")
            target = np.array([0, 0, heads, shape[2] // int(heads)], np.int64)  # type: ignore[call-overload]
            split = emit(node, "Reshape", [value, emit_constant(node, target, f"{value.name}.heads")])
            split.type, split.shape = value.type, ir.Shape([*shape[:2], int(heads), shape[2] // int(heads)])  # type: ignore[call-overload]
            turned = emit(node, "Transpose", [split], {"perm": [0, 2, 1, 3]})
            turned.type, turned.shape = value.type, ir.Shape([split.shape[i] for i in (0, 2, 1, 3)])
            inputs.append(turned)
        attributes = {k: a.value for k, a in node.attributes.items() if k not in ("q_num_heads", "kv_num_heads")}
        result = node.outputs[0]
        y = emit(node, "Attention", [*inputs, *node.inputs[3:]], attributes)
        y.type = result.type
        y = emit(node, "Transpose", [y], {"perm": [0, 2, 1, 3]})
        y.type = result.type
        flat = emit_constant(node, np.array([0, 0, -1], np.int64), f"{result.name}.flat")
        substitute(result, emit(node, "Reshape", [y, flat], like=result))
        return self.found(node)


def _producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds and not node.domain else None


def _softmax(value: ir.Value | None, core: _Core) -> ir.Node | None:
    """Walk from the attention weights to the Softmax, past casts and the guard against rows of NaN."""
    for _ in range(4):
        if (node := _producer(value, "Softmax")) is not None:
            core.nodes.append(node)
            return node
        if (node := _producer(value, "Where")) is not None:
            test, zero, kept = node.inputs
            nan = _producer(test, "IsNaN")
            array = small_constant(zero)
            if nan is None or nan.inputs[0] is not kept or array is None or np.any(array != 0):
                return None
            core.nodes += [node, nan]
            value = kept
        elif (node := _producer(value, "Cast", "Identity", "Dropout")) is not None:
            core.nodes.append(node)
            value = node.inputs[0]
        else:
            return None
    return None


def _scores(value: ir.Value | None, core: _Core) -> str | None:
    """Walk from the input of Softmax to ``Q K^T``; None on success, "" if this is no attention, else why it is refused."""
    for _ in range(8):
        if (node := _producer(value, "MatMul")) is not None:
            core.nodes.append(node)
            return None
        if (node := _producer(value, "Add")) is not None:
            if core.mask is not None or core.softcap or core.scale != 1.0:
                # softmax(s + a + b): two masks; only the outermost may be one.
                return (
                    "two tensors are added to the scores" if core.mask is not None else "a mask is added before scaling"
                )
            index = _scores_input(node)
            if index is None:
                return ""
            core.mask = node.inputs[1 - index]
            value = node.inputs[index]
        elif (node := _producer(value, "Where")) is not None:
            condition, scores, fill = node.inputs
            if not _leads_to_matmul(scores) or condition is None or fill is None:
                return "" if not _leads_to_matmul(fill) else "the selecting mask is inverted"
            if core.mask is not None or core.selects is not None or core.softcap or core.scale != 1.0:
                return "a selecting mask is applied before scaling or adding"
            if not _is_masking(fill):
                return "scores are replaced by something that is not a large negative number"
            core.selects = (condition, fill)
            value = scores
        elif (node := _producer(value, "Mul", "Div")) is not None:
            problem = _scaled(node, core)
            if isinstance(problem, str):
                return problem
            value = problem
        else:
            return ""
        core.nodes.append(node)
    return ""


def _scaled(node: ir.Node, core: _Core) -> ir.Value | str:
    """Take a factor, or a soft cap ``c tanh(s / c)``, off the scores; return the scores inside, or why not."""
    factor = small_constant(node.inputs[1])
    inner = node.inputs[0]
    if factor is None and node.op_type == "Mul":
        factor, inner = small_constant(node.inputs[0]), node.inputs[1]
    if factor is None or factor.size != 1 or inner is None:
        scores = any(_leads_to_matmul(value) for value in node.inputs)
        return "the scores are scaled by something that is not a constant number" if scores else ""
    number = float(factor.reshape(()))
    tanh = _producer(inner, "Tanh")
    if tanh is None:
        core.scale *= number if node.op_type == "Mul" else 1.0 / number
        return inner
    divide = _producer(tanh.inputs[0], "Div", "Mul")
    bound = small_constant(divide.inputs[1]) if divide is not None else None
    if divide is None or bound is None or bound.size != 1 or node.op_type != "Mul" or divide.inputs[0] is None:
        return "the soft cap is not c tanh(s / c)"
    cap = float(bound.reshape(())) if divide.op_type == "Div" else 1.0 / float(bound.reshape(()))
    if not math.isclose(cap, number, rel_tol=1e-4):
        return f"the soft cap multiplies by {number:g} but divides by {cap:g}"
    if core.scale != 1.0 or core.softcap:
        return "the scores are scaled after the soft cap"
    core.softcap = number
    core.nodes += [tanh, divide]
    return divide.inputs[0]


def _scores_input(add: ir.Node) -> int | None:
    """Which input of Add is the scores: the one computed by MatMul, the other being the mask."""
    leads = [_leads_to_matmul(value) for value in add.inputs]
    if leads[0] == leads[1]:
        return None
    return 0 if leads[0] else 1


def _leads_to_matmul(value: ir.Value | None) -> bool:
    """Whether ``value`` is a MatMul, seen through scaling, capping and masking by constants."""
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None or node.domain:
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type in ("Mul", "Div", "Tanh", "Cast"):
            array = small_constant(node.inputs[0])
            value = node.inputs[1] if array is not None and len(node.inputs) > 1 else node.inputs[0]
        elif node.op_type == "Where":
            value = node.inputs[1]
        elif node.op_type == "Add":
            return any(_leads_to_matmul(v) for v in node.inputs)
        else:
            return False
    return False


def _mask_problem(mask: ir.Value, queries: Sequence[symbols.Dim], keys: symbols.Dim) -> str:
    """Why a mask is none that the operator takes: it broadcasts over anything but the keys."""
    shape = symbols.dims(mask)
    if shape is None or len(shape) > 4:
        return "the shape of the mask is not known"
    full = (queries[0], queries[1], queries[2], keys)
    if len(shape) < 2 or shape[-1] != full[-1]:
        return f"the mask {shape} does not have a column for every key"
    if any(size not in (1, wanted) for size, wanted in zip(shape, full[4 - len(shape) :])):
        return f"the mask {shape} does not fit the scores {full}"
    return ""


def _unscaled(value: ir.Value | None, of: ir.Node | None = None) -> tuple[ir.Value, float]:
    """Take constant factors off Q or K; return what is inside and the factor.

    Only factors that nothing else reads; ``of`` reads the value through operators that are about to go.
    """
    assert value is not None
    scale = 1.0
    while (node := _producer(value, "Mul", "Div")) is not None:
        inner, number = node.inputs[0], small_constant(node.inputs[1])
        if number is None and node.op_type == "Mul":
            inner, number = node.inputs[1], small_constant(node.inputs[0])
        if number is None or number.size != 1 or inner is None or (of is None and sole_use(value) is None):
            break
        scale = scale * float(number.reshape(())) if node.op_type == "Mul" else scale / float(number.reshape(()))
        value = inner
    return value, scale


def _is_masking(fill: ir.Value) -> bool:
    array = small_constant(fill)
    return array is not None and array.size == 1 and float(array.reshape(())) <= NEGLIGIBLE


def _boolean(mask: ir.Value | None) -> ir.Value | None:
    """``Where(keep, 0, very negative)`` added to the scores is the boolean mask ``keep``."""
    node = _producer(mask, "Where")
    if node is None or node.inputs[2] is None:
        return mask
    zero = small_constant(node.inputs[1])
    return node.inputs[0] if zero is not None and not np.any(zero) and _is_masking(node.inputs[2]) else mask


def _untransposed(keys: ir.Value, anchor: ir.Node) -> ir.Value:
    """K from K^T: undo the transpose before it, or transpose again (a later simplification merges the two)."""
    shape = symbols.dims(keys)
    assert shape is not None
    node = _producer(keys, "Transpose")
    if node is not None and list(attribute(node, "perm") or ()) == [0, 1, 3, 2] and node.inputs[0] is not None:
        return node.inputs[0]
    result = emit(anchor, "Transpose", [keys], {"perm": [0, 1, 3, 2]})
    result.type, result.shape = keys.type, ir.Shape([shape[0], shape[1], shape[3], shape[2]])
    return result


def _ungrouped(value: ir.Value) -> ir.Value:
    """Undo ``(b, h, s, d) -> (b, h, 1, s, d) -> (b, h, g, s, d) -> (b, h g, s, d)``."""
    reshape = _producer(value, "Reshape")
    expand = _producer(reshape.inputs[0], "Expand") if reshape is not None else None
    lift = _producer(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    if lift is None or expand is None or lift.inputs[0] is None:
        return value
    source, lifted, wide, flat = (symbols.dims(v) for v in (lift.inputs[0], lift.outputs[0], expand.outputs[0], value))
    if source is None or lifted is None or wide is None or flat is None or len(source) != 4 or len(wide) != 5:
        return value
    b, h, s, d = source
    groups = wide[2]
    if not isinstance(h, int) or not isinstance(groups, int):
        return value
    fits = lifted == (b, h, 1, s, d) and wide == (b, h, groups, s, d) and flat == (b, h * groups, s, d)
    return lift.inputs[0] if fits else value


def _repeated(value: ir.Value, heads: int, anchor: ir.Node) -> ir.Value:
    """Broadcast the single head of ``value`` to ``heads``."""
    shape = symbols.dims(value)
    assert shape is not None
    if shape[1] == heads:
        return value
    target = emit_constant(anchor, np.array([1, heads, 1, 1], np.int64), f"{value.name}.heads")
    result = emit(anchor, "Expand", [value, target])
    result.type, result.shape = value.type, ir.Shape([shape[0], heads, shape[2], shape[3]])
    return result


def _four_axes(mask: ir.Value, anchor: ir.Node) -> ir.Value:
    rank = symbols.rank(mask)
    assert rank is not None
    if rank in (2, 4):
        return mask
    axes = np.array(range(4 - rank), np.int64)
    result = emit(anchor, "Unsqueeze", [mask, emit_constant(anchor, axes, f"{mask.name}.axes")])
    result.type, result.shape = mask.type, ir.Shape([1] * (4 - rank) + list(mask.shape or ()))
    return result
