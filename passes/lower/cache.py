"""A decoding step that keeps its cache: keys and values are appended where the caller has room for them.

A decoder with a cache returns ``present = Concat(past, new)``, a copy of everything it has read. Here the caller passes, in place
of ``past``, tensors with room for more positions than there are, and each step writes its own behind those of the steps before:

    past (batch, heads, past, size), present = Concat(past, new)
        ->  cache (batch, heads, capacity, size), cache[:, :, total - sequence : total] = new,      total = past + sequence

How many positions there are is what another input tells by its shape: the mask ``(batch, past + sequence)``. Attention reads the
first ``total`` positions of the cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.graph import insert_before, is_op
from qcompile.passes.lower.kernel_ops import is_kernel, kernel_node, take_over

CAPACITY, TOTAL = "capacity", "total"


@dataclass(frozen=True)
class Lengths:
    """Where a program reads its lengths.

    Attributes:
        past, sequence: names of the dimensions.
        total: an input whose extent along ``axis`` is their sum.
        tokens: an input whose extent along ``tokens_axis`` is the sequence.
    """

    past: str
    sequence: str
    total: ir.Value
    axis: int
    tokens: ir.Value
    tokens_axis: int


def keep_cache(lowered: ir.Model) -> ir.Model | None:
    """A copy of a lowered model that appends to its cache in place; None if ``lowered`` is not a decoder of the known form.

    Its inputs have the names and the order they had; what was ``present`` is no output.
    """
    model = lowered.clone()
    graph = model.graph
    appends = {v: node for v in graph.inputs if (node := _append(v)) is not None}
    if not appends:
        return None
    lengths = _lengths(graph, list(appends))
    if lengths is None or any(isinstance(a.value, ir.Graph) for n in graph for a in n.attributes.values()):
        return None
    if any(not (node is appends[v] or is_op(node, "Shape")) for v in appends for node, _ in v.uses()):
        return None
    presents = {node.outputs[0] for node in appends.values()}
    if any(not presents.issuperset(user.inputs[1:3]) for present in presents for user, _ in present.uses()):
        return None
    for past, concat in appends.items():
        _replace_shapes(past, lengths)
        _replace_concat(past, concat, lengths)
    _rename(graph, lengths)
    return model


def _append(value: ir.Value) -> ir.Node | None:
    """What appends to a graph input, if its result is returned and otherwise read by attention alone."""
    found = [node for node, index in value.uses() if is_op(node, "Concat") and index == 0 and len(node.inputs) == 2]
    if len(found) != 1 or value.shape is None or value.shape.rank() != 4:
        return None
    node, present = found[0], found[0].outputs[0]
    if node.attributes["axis"].as_int() not in (2, -2) or not present.is_graph_output():
        return None
    for user, index in present.uses():
        if not is_kernel(user, "Attention") or index not in (1, 2):
            return None
        if user.attributes["layout"].as_string() != "heads" or len(user.inputs) < 4 or user.inputs[3] is None:
            return None
    return node if present.uses() and value.dtype == ir.DataType.FLOAT else None


def _lengths(graph: ir.Graph, caches: list[ir.Value]) -> Lengths | None:
    names = {_dimensions(v)[2] for v in caches}
    past = names.pop()
    others = [v for v in graph.inputs if v not in caches and v.shape is not None]
    if names or not past.isidentifier() or any(past in _dimensions(v) for v in others):
        return None
    for value in others:
        for axis, text in enumerate(_dimensions(value)):
            terms = [term.strip() for term in text.split("+")]
            if len(terms) != 2 or past not in terms:
                continue
            sequence = terms[1 - terms.index(past)]
            places = ((v, i) for v in others for i, d in enumerate(_dimensions(v)) if d == sequence)
            tokens = next(places, None)
            if tokens is not None and sequence.isidentifier():
                return Lengths(past, sequence, value, axis, *tokens)
    return None


def _dimensions(value: ir.Value) -> list[str]:
    assert value.shape is not None
    return [str(d) if isinstance(d, int) else str(d.value) for d in value.shape]


def _replace_shapes(past: ir.Value, lengths: Lengths) -> None:
    """``Shape(cache)`` tells the capacity; what was asked is how many positions there were before."""
    for node, _ in list(past.uses()):
        if not is_op(node, "Shape"):
            continue
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else 4
        new, pieces = [], []
        for axis in range(*slice(start, end).indices(4)):
            made = [_extent(past, axis)]
            if axis == 2:
                made = [_extent(lengths.total, lengths.axis), _extent(lengths.tokens, lengths.tokens_axis)]
                made.append(ir.node("Sub", [n.outputs[0] for n in made]))
            new += made
            pieces.append(made[-1].outputs[0])
        whole = ir.node("Concat", pieces, attributes={"axis": 0})
        whole.outputs[0].type, whole.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        insert_before(node, [*new, whole])
        take_over(node.outputs[0], whole.outputs[0])
        node.graph.remove(node, safe=True)


def _extent(value: ir.Value, axis: int) -> ir.Node:
    node = ir.node("Shape", [value], attributes={"start": axis, "end": axis + 1})
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
    return node


def _replace_concat(past: ir.Value, concat: ir.Node, lengths: Lengths) -> None:
    present, graph = concat.outputs[0], concat.graph
    assert past.shape is not None and isinstance(graph, ir.Graph)
    past.shape = ir.Shape([CAPACITY if axis == 2 else d for axis, d in enumerate(past.shape)])
    append = kernel_node("Append", [past, concat.inputs[1], lengths.total], [None], {"axis": lengths.axis})
    out = append.outputs[0]
    out.dtype, out.shape = past.dtype, past.shape
    insert_before(concat, [append])
    graph.outputs.remove(present)
    for user, index in list(present.uses()):
        user.replace_input_with(index, out)
        user.attributes["layout"] = ir.AttrString("layout", "cache")
    graph.remove(concat, safe=True)


def _rename(graph: ir.Graph, lengths: Lengths) -> None:
    """Dimensions are those of ``total`` and the sequence, as nothing has the extent ``past`` any more."""
    word = re.compile(rf"\b{re.escape(lengths.past)}\b")

    def renamed(text: str) -> str:
        terms = sorted(term.strip() for term in text.split("+"))
        if terms == sorted((lengths.past, lengths.sequence)):
            return TOTAL
        return word.sub(f"({TOTAL} - {lengths.sequence})", text)

    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else d.value and renamed(d.value) for d in value.shape])
