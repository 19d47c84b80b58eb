"""RotaryEmbedding.

Halves of a head (``interleaved=0``), x = (a, b), or even and odd channels (``interleaved=1``):

    a' = a cos - b sin,   b' = b cos + a sin

Decomposed graphs write it with full tables, ``x * C + rotate(x) * S`` with C = (cos, cos) and rotate(a, b) = (-b, a), or
with half tables on the parts. The operator takes half tables, so a full one must be proven to repeat itself: it is
followed back, through operators that act on each element alone, to ``Concat(f, f)`` or to a constant.
Su et al. 2021, "RoFormer"; ONNX RotaryEmbedding-23.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import Op, Var, match, outside_readers, small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, substitute

_FULL = Op("Add", Op("Mul", Var("x"), Var("cos")), Op("Mul", Var("rotated"), Var("sin")))
_FIRST = Op("Sub", Op("Mul", Var("a"), Var("cos")), Op("Mul", Var("b"), Var("sin")))
_SECOND = Op("Add", Op("Mul", Var("b"), Var("cos")), Op("Mul", Var("a"), Var("sin")))


class RotaryRule(Rule):
    """Raises RotaryEmbedding from full tables (ends in Add) or from parts (ends in Concat or Reshape)."""

    kind = "RotaryEmbedding"
    anchors = ("Add", "Concat", "Reshape")

    def apply(self, node: ir.Node) -> Found | Refused | None:
        if node.op_type == "Add":
            return self._full_tables(node)
        return self._parts(node)

    def _full_tables(self, node: ir.Node) -> Found | Refused | None:
        for found in match(_FULL, node.outputs[0]):
            x = found.values["x"]
            rotation = rotated_source(found.values["rotated"])
            if rotation is None or rotation[0] is not x:
                continue
            interleaved, inner = rotation[1], rotation[2]
            outside = outside_readers((*found.nodes, *inner), node.outputs[0])
            if outside is not None:
                return self.refused(node, f"the intermediate '{outside.name}' is used elsewhere")
            tables = []
            for role in ("cos", "sin"):
                half = halve(found.values[role], node, interleaved)
                if half is None:
                    return self.refused(node, f"the two halves of the {role} table could not be proven equal")
                tables.append(half)
            return self._raise(node, x, tables, interleaved)
        return None

    def _parts(self, node: ir.Node) -> Found | Refused | None:
        joined = joined_parts(node)
        if joined is None:
            return None
        first, second, interleaved, inner = joined
        for found in match(_FIRST, first):
            for other in match(_SECOND, second):
                if any(found.values[k] is not other.values[k] for k in ("a", "b", "cos", "sin")):
                    continue
                sources = [part_of(found.values[k]) for k in ("a", "b")]
                if None in sources:
                    continue
                (x, index_a, kind_a, nodes_a), (y, index_b, kind_b, nodes_b) = sources  # type: ignore[misc]
                if x is not y or (index_a, index_b) != (0, 1) or kind_a != kind_b or kind_a != interleaved:
                    continue
                matched = (*found.nodes, *other.nodes, *inner, *nodes_a, *nodes_b, node)
                outside = outside_readers(tuple(dict.fromkeys(matched)), node.outputs[0])
                if outside is not None and outside not in (found.values["a"], found.values["b"]):
                    return self.refused(node, f"the intermediate '{outside.name}' is used elsewhere")
                return self._raise(node, x, [found.values["cos"], found.values["sin"]], interleaved)
        return None

    def _raise(self, node: ir.Node, x: ir.Value, tables: list[ir.Value], interleaved: bool) -> Found | Refused:
        """Replace the result of ``node`` given half tables that broadcast against half of ``x``."""
        shape = symbols.dims(x)
        if shape is None or len(shape) != 4:
            return self.refused(node, "the input is not (batch, heads, sequence, size)")
        heads_axis = None
        ready = []
        for table in tables:
            half = symbols.dims(table)
            if half is None or len(half) > 4 or half[-1] != int(shape[3]) // 2:
                return self.refused(
                    node, f"the shape of the table '{table.name}' is not known to be half of the input's"
                )
            half = (1,) * (4 - len(half)) + half
            axis = 1 if half[1] == 1 and half[2] == shape[2] else 2 if half[2] == 1 and half[1] == shape[1] else None
            if axis is None or half[0] not in (1, shape[0]) or heads_axis not in (None, axis):
                return self.refused(node, f"the table '{table.name}' {half} does not vary with position alone")
            heads_axis = axis
            if len(symbols.dims(table) or ()) == 4:
                axes = emit_constant(node, np.array([axis], np.int64), f"{table.name}.axes")
                table = emit(node, "Squeeze", [table, axes])
            else:
                size = emit_constant(node, np.array([1, -1, half[3]], np.int64), f"{table.name}.shape")
                table = emit(node, "Reshape", [table, size])
            table.shape = ir.Shape([half[0], half[3 - axis], half[3]])
            table.type = tables[0].type
            ready.append(table)
        result, size = node.outputs[0], int(shape[3])
        attributes: dict[str, object] = {"interleaved": int(interleaved)}
        detail = "interleaved" if interleaved else ""
        partial = whole_heads(x, result)
        if partial is not None:
            attributes["rotary_embedding_dim"] = size
            x, result, size = partial
            detail = f"{detail}, of part of each head".lstrip(", ")
        last = result.producer()
        assert last is not None
        if heads_axis == 1:
            y = emit(last, self.kind, [x, *ready], attributes, like=result)
        else:  # (batch, sequence, heads, size): between transposes, which those around attention cancel
            y = swapped(last, x)
            y = swapped(last, emit(last, self.kind, [y, *ready], attributes, like=y))
        substitute(result, y)
        return self.found(node, detail)


def swapped(anchor: ir.Node, value: ir.Value) -> ir.Value:
    """``value`` with its two middle axes, heads and positions, in the other order."""
    result = emit(anchor, "Transpose", [value], {"perm": [0, 2, 1, 3]})
    result.type = value.type
    if value.shape is not None:
        result.shape = ir.Shape([value.shape[axis] for axis in (0, 2, 1, 3)])
    return result


def whole_heads(x: ir.Value, rotated: ir.Value) -> tuple[ir.Value, ir.Value, int] | None:
    """If ``x`` is the first part of each head and ``rotated`` is joined with the rest: the heads, the joined value, their size."""
    concat = sole_use(rotated)
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2 or concat.inputs[0] is not rotated:
        return None
    if concat.inputs[1] is None:
        return None
    first, rest = slice_range(x), slice_range(concat.inputs[1])
    whole = symbols.dims(first[0]) if first is not None else None
    if first is None or rest is None or first[0] is not rest[0] or whole is None or len(whole) != 4:
        return None
    joined = concat.outputs[0]
    if first[1] != 0 or first[2] != rest[1] or rest[2] != whole[-1] or symbols.dims(joined) != whole:
        return None
    return first[0], joined, int(whole[-1])


def rotated_source(value: ir.Value) -> tuple[ir.Value, bool, tuple[ir.Node, ...]] | None:
    """If ``value`` is ``rotate(x)``: x, whether channels are interleaved, and the nodes that compute it."""
    node = value.producer()
    joined = joined_parts(node) if node is not None else None
    if node is None or joined is None:
        return None
    first, second, interleaved, inner = joined
    negated = first.producer()
    if negated is None or negated.op_type != "Neg" or negated.inputs[0] is None:
        return None
    low, high = part_of(second), part_of(negated.inputs[0])
    if low is None or high is None or low[0] is not high[0] or (low[1], high[1]) != (0, 1):
        return None
    if low[2] != interleaved or high[2] != interleaved:
        return None
    return low[0], interleaved, tuple(dict.fromkeys((node, *inner, negated, *low[3], *high[3])))


def joined_parts(node: ir.Node) -> tuple[ir.Value, ir.Value, bool, tuple[ir.Node, ...]] | None:
    """Two parts put together along the last axis: ``Concat(p, q)``, or interleaved ``Reshape(Concat(p[..., None], q[..., None]))``."""
    if node.op_type == "Concat":
        rank = symbols.rank(node.outputs[0])
        if len(node.inputs) != 2 or rank is None or int(attribute(node, "axis", 0)) % rank != rank - 1:
            return None
        first, second = node.inputs
        return (first, second, False, ()) if first is not None and second is not None else None
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    concat = node.inputs[0].producer()
    inside, result = symbols.dims(node.inputs[0]), symbols.dims(node.outputs[0])
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2 or inside is None or result is None:
        return None
    if inside[-1] != 2 or inside[:-2] != result[:-1] or not isinstance(inside[-2], int) or inside[-2] * 2 != result[-1]:
        return None
    if int(attribute(concat, "axis", 0)) % len(inside) != len(inside) - 1:
        return None
    parts = []
    for value in concat.inputs:
        lifted = value.producer() if value is not None else None
        if lifted is None or lifted.op_type not in ("Unsqueeze", "Reshape") or lifted.inputs[0] is None:
            return None
        if symbols.dims(lifted.inputs[0]) != inside[:-1]:
            return None
        parts.append(lifted)
    values = [part.inputs[0] for part in parts]
    return values[0], values[1], True, (concat, *parts)  # type: ignore[return-value]


def part_of(value: ir.Value) -> tuple[ir.Value, int, bool, tuple[ir.Node, ...]] | None:
    """If ``value`` is half of a tensor's last axis: the tensor, which half, whether every other channel, the nodes."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    whole, size = node.inputs[0], (symbols.dims(node.inputs[0]) or (None,))[-1]
    rank = symbols.rank(whole)
    if not isinstance(size, int) or size % 2 or rank is None:
        return None
    if node.op_type == "Split":
        part = symbols.dims(value)
        if (
            int(attribute(node, "axis", 0)) % rank != rank - 1
            or len(node.outputs) != 2
            or part is None
            or part[-1] * 2 != size
        ):
            return None
        return whole, node.outputs.index(value), False, (node,)
    if node.op_type != "Slice":
        return None
    starts, ends = symbols.contents(node.inputs[1]), symbols.contents(node.inputs[2])
    axes = symbols.contents(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else [0]
    steps = symbols.contents(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if not (starts and ends and axes and steps) or len(starts) != 1 or int(axes[0]) % rank != rank - 1:
        return None
    if any(isinstance(item, str) for item in (*starts, *ends, *steps)):
        return None
    start, stop, step = slice(int(starts[0]), int(ends[0]), int(steps[0])).indices(size)
    if step == 1 and stop - start == size // 2 and start in (0, size // 2):
        return whole, int(start != 0), False, (node,)
    if step == 2 and start in (0, 1) and stop >= size - 1:
        return whole, start, True, (node,)
    return None


_ELEMENTWISE = ("Cos", "Sin", "Cast", "Identity", "Neg")


def halve(value: ir.Value, anchor: ir.Node, interleaved: bool) -> ir.Value | None:
    """Build the first half (or the even channels) of a table whose two halves are provably equal; None if they are not.

    The producers of ``value`` are rebuilt on the half, so nothing of the full table remains.
    """
    array = small_constant(value)
    if array is not None:
        if array.ndim == 0 or array.shape[-1] % 2:
            return None
        half = array.shape[-1] // 2
        parts = (array[..., ::2], array[..., 1::2]) if interleaved else (array[..., :half], array[..., half:])
        if not np.array_equal(*parts):
            return None
        return emit_constant(anchor, parts[0], f"{value.name}.half")
    node = value.producer()
    if node is None or node.domain or value is not node.outputs[0]:
        return None
    shape = symbols.dims(value)
    if shape is None or not isinstance(shape[-1], int):
        return None
    if (repeated := _repeated(node, interleaved)) is not None:
        return repeated
    rebuild: Callable[[ir.Value], list[ir.Value | None]] | None = None
    match node.op_type:
        case kind if kind in _ELEMENTWISE:
            rebuild = lambda half: [half]  # noqa: E731
        case "Mul" | "Div":
            number = small_constant(node.inputs[1])
            if number is not None and number.size == 1:
                rebuild = lambda half: [half, node.inputs[1]]  # noqa: E731
        case "Unsqueeze" | "Squeeze":
            axes = symbols.contents(node.inputs[1]) if len(node.inputs) > 1 else None
            rank = len(shape) if node.op_type == "Unsqueeze" else symbols.rank(node.inputs[0])
            if axes is not None and rank is not None and all(int(a) % rank != rank - 1 for a in axes):
                rebuild = lambda half: [half, node.inputs[1]]  # noqa: E731
        case "Transpose":
            perm = attribute(node, "perm")
            if perm is not None and list(perm)[-1] == len(shape) - 1:
                rebuild = lambda half: [half]  # noqa: E731
        case "Gather":
            if int(attribute(node, "axis", 0)) == 0 and (symbols.rank(node.inputs[0]) or 0) >= 2:
                rebuild = lambda half: [half, node.inputs[1]]  # noqa: E731
        case "Slice":
            rank = symbols.rank(node.inputs[0])
            axes = symbols.contents(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
            if axes is not None and rank is not None and all(int(a) % rank != rank - 1 for a in axes):
                rebuild = lambda half: [half, *node.inputs[1:]]  # noqa: E731
        case "Expand":
            target = symbols.contents(node.inputs[1])
            if target is not None and target[-1] == 1:
                rebuild = lambda half: [half, node.inputs[1]]  # noqa: E731
        case "Split":
            return None
    if rebuild is None or node.inputs[0] is None:
        return None
    half = halve(node.inputs[0], anchor, interleaved)
    if half is None:
        return None
    attributes = {key: attr.value for key, attr in node.attributes.items()}
    result = emit(anchor, node.op_type, rebuild(half), attributes)
    result.type = value.type
    result.shape = ir.Shape([*shape[:-1], int(shape[-1]) // 2])
    return result


def _repeated(node: ir.Node, interleaved: bool) -> ir.Value | None:
    """``f`` if ``node`` computes ``Concat(f, f)``, or ``f`` with every element twice."""
    joined = joined_parts(node)
    if joined is not None:
        first, second, form, _ = joined
        return first if first is second and form == interleaved else None
    if not interleaved or node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    expand = node.inputs[0].producer()
    if expand is None or expand.op_type not in ("Expand", "Tile") or expand.inputs[0] is None:
        return None
    lifted = expand.inputs[0].producer()
    inside, result = symbols.dims(expand.outputs[0]), symbols.dims(node.outputs[0])
    if lifted is None or lifted.op_type not in ("Unsqueeze", "Reshape") or inside is None or result is None:
        return None
    single = symbols.dims(lifted.outputs[0])
    if single is None or len(single) < 2 or single[-1] != 1 or not isinstance(single[-2], int):
        return None
    if inside != (*single[:-1], 2) or result != (*single[:-2], 2 * single[-2]):
        return None
    if symbols.dims(lifted.inputs[0]) == single[:-1]:
        return lifted.inputs[0]
    axes = emit_constant(node, np.array([-1], np.int64), f"{node.outputs[0].name}.axes")
    half = emit(node, "Squeeze", [lifted.outputs[0], axes])
    half.type, half.shape = node.outputs[0].type, ir.Shape(single[:-1])
    return half


class PartialRotaryRule(Rule):
    """``Concat(RotaryEmbedding(x[..., :r]), x[..., r:])`` -> RotaryEmbedding with ``rotary_embedding_dim=r``."""

    kind = "RotaryEmbedding"
    anchors = ("RotaryEmbedding",)

    def apply(self, node: ir.Node) -> Found | None:
        x, shape = node.inputs[0], symbols.dims(node.inputs[0])
        if x is None or shape is None or len(shape) != 4 or attribute(node, "rotary_embedding_dim", 0):
            return None
        partial = whole_heads(x, node.outputs[0])
        if partial is None:
            return None
        whole, result, _ = partial
        last = result.producer()
        assert last is not None
        attributes = {key: attr.value for key, attr in node.attributes.items()}
        attributes["rotary_embedding_dim"] = int(shape[-1])
        substitute(result, emit(last, self.kind, [whole, *node.inputs[1:]], attributes, like=result))
        return self.found(node, "of part of each head")


class RotaryByHeadsRule(Rule):
    """RotaryEmbedding on (batch, positions, heads * size) -> on (batch, heads, positions, size), between transposes."""

    kind = "rotary by heads"
    anchors = ("RotaryEmbedding",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        x, shape, heads = node.inputs[0], symbols.dims(node.inputs[0]), int(attribute(node, "num_heads", 0))
        if x is None or shape is None or len(shape) != 3:
            return None
        if not heads or not isinstance(shape[2], int):
            return self.refused(node, "has three axes, but the number and size of heads are not known")
        result, size = node.outputs[0], shape[2] // heads
        target = emit_constant(node, np.array([0, 0, heads, size], np.int64), f"{result.name}.heads")
        y = emit(node, "Reshape", [x, target])
        y.type, y.shape = x.type, ir.Shape([shape[0], shape[1], heads, size])
        y = swapped(node, y)
        attributes = {key: attr.value for key, attr in node.attributes.items() if key != "num_heads"}
        y = swapped(node, emit(node, node.op_type, [y, *node.inputs[1:]], attributes, like=y))
        flat = emit_constant(node, np.array([0, 0, shape[2]], np.int64), f"{result.name}.flat")
        substitute(result, emit(node, "Reshape", [y, flat], like=result))
        return self.found(node)


def slice_range(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """If ``value`` is a range of a tensor's last axis: the tensor, the start and the end."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    whole = node.inputs[0]
    shape = symbols.dims(whole)
    if shape is None or not isinstance(shape[-1], int):
        return None
    if node.op_type == "Split" and int(attribute(node, "axis", 0)) % len(shape) == len(shape) - 1:
        sizes = [(symbols.dims(v) or ("",))[-1] for v in node.outputs]
        if any(isinstance(s, str) for s in sizes):
            return None
        index = node.outputs.index(value)
        start = sum(int(s) for s in sizes[:index])
        return whole, start, start + int(sizes[index])
    if node.op_type != "Slice":
        return None
    starts, ends = symbols.contents(node.inputs[1]), symbols.contents(node.inputs[2])
    axes = symbols.contents(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else [0]
    steps = symbols.contents(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if not (starts and ends and axes) or len(axes) != 1 or steps != [1] or int(axes[0]) % len(shape) != len(shape) - 1:
        return None
    if isinstance(starts[0], str) or isinstance(ends[0], str):
        return None
    start, stop, _ = slice(starts[0], ends[0], 1).indices(shape[-1])
    return whole, start, stop
