"""Rewrites that keep every value and leave less to look at: no-ops, shape arithmetic, chains of transposes.

Exporters compute shapes at run time (Shape, Gather, Concat ... Reshape). Where symbolic inference knows the result,
the target shape becomes a constant: in Reshape, ``0`` keeps a dimension and ``-1`` takes the one that is left; in
Expand, ``1`` keeps a dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import small_constant
from qcompile.passes.recognise.result import Found
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, remove_dead, substitute


class RemoveNoOp(Rule):
    """Identity, Dropout at inference, Cast to the same type, ``x * 1``, ``x + 0``, reshapes and slices of everything."""

    kind = "no-op"
    anchors = (
        "Identity",
        "Dropout",
        "Cast",
        "Mul",
        "Div",
        "Add",
        "Sub",
        "And",
        "Reshape",
        "Expand",
        "Slice",
        "Transpose",
        "Concat",
        "Unsqueeze",
        "Squeeze",
    )

    def apply(self, node: ir.Node) -> Found | None:
        source = _noop_source(node)
        if source is None or (source.producer() is None and node.outputs[0].is_graph_output()):
            return None
        if node.op_type == "Identity" and node.outputs[0].is_graph_output() and source.is_graph_output():
            return None
        substitute(node.outputs[0], source)
        return self.found(node)


def _noop_source(node: ir.Node) -> ir.Value | None:
    """The input that ``node`` passes on unchanged, if it does."""
    x = node.inputs[0]
    y = node.outputs[0]
    if x is None:
        return None
    match node.op_type:
        case "Identity":
            return x
        case "Dropout":
            training = small_constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else False
            mask_read = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
            return x if training is not None and not np.any(training) and not mask_read else None
        case "Cast":
            return x if x.dtype is not None and int(attribute(node, "to", 0)) == int(x.dtype) else None
        case "Concat":
            return x if len(node.inputs) == 1 else None
        case "Transpose":
            perm = attribute(node, "perm")
            return x if perm is not None and list(perm) == list(range(len(perm))) else None
        case "Unsqueeze" | "Squeeze":
            axes = symbols.contents(node.inputs[1]) if len(node.inputs) > 1 else None
            return x if axes == [] else None
        case "Reshape" | "Expand":
            before, after = symbols.dims(x), symbols.dims(y)
            if before is not None and before == after:
                return x
            return (
                x
                if node.op_type == "Reshape" and _keeps_all_but_one(before, symbols.contents(node.inputs[1]))
                else None
            )
        case "Slice":
            return x if _slices_everything(node) else None
        case "Add" | "Sub" | "Mul" | "Div" | "And":
            neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "And": True}[node.op_type]
            for this, other in ((0, 1), (1, 0)) if node.op_type in ("Add", "Mul", "And") else ((0, 1),):
                array = small_constant(node.inputs[other], 1)
                data = node.inputs[this]
                if array is None or array.size != 1 or data is None or array.reshape(()) != neutral:
                    continue
                known = symbols.rank(data)
                if array.ndim == 0 or (known is not None and array.ndim <= known):
                    return data
    return None


def _keeps_all_but_one(before: Sequence[symbols.Dim] | None, target: Sequence[symbols.Dim] | None) -> bool:
    """Whether a Reshape asks for the sizes that are there, with at most one left open: that one is what remains."""
    if before is None or target is None or len(before) != len(target) or list(target).count(-1) > 1:
        return False
    return all(new in (old, -1) or (new == 0 and old != 0) for old, new in zip(before, target))


def _slices_everything(node: ir.Node) -> bool:
    starts, ends = symbols.contents(node.inputs[1]), symbols.contents(node.inputs[2])
    steps = symbols.contents(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if starts is None or ends is None or (steps is not None and any(s != 1 for s in steps)):
        return False
    before, after = symbols.dims(node.inputs[0]), symbols.dims(node.outputs[0])
    return all(s == 0 for s in starts) and before is not None and before == after


class ConstantContents(Rule):
    """A shape vector that is known element by element becomes a constant."""

    kind = "constant shape"
    anchors = ("Shape", "Size", "Gather", "Slice", "Concat", "Cast", "Add", "Sub", "Mul", "Div", "Squeeze", "Unsqueeze",
               "Where", "Reshape", "ConstantOfShape", "ReduceProd", "Min", "Max", "Expand")  # fmt: skip

    def apply(self, node: ir.Node) -> Found | None:
        value = node.outputs[0]
        if (
            value.dtype not in (ir.DataType.INT64, ir.DataType.INT32)
            or value.is_graph_output()
            or len(node.outputs) > 1
        ):
            return None
        shape = symbols.dims(value)
        items = symbols.contents(value)
        if items is None or shape is None or len(shape) > 1 or not all(isinstance(item, int) for item in items):
            return None
        if any(isinstance(d, str) for d in shape) or len(items) != int(np.prod([int(d) for d in shape], dtype=int)):
            return None
        array = np.array(items, value.dtype.numpy()).reshape([int(d) for d in shape])
        substitute(value, emit_constant(node, array, f"{value.name}.constant"))
        return self.found(node)


class CancelledFactor(Rule):
    """``(a * b) / a`` of sizes -> ``b``: how a flattened dimension is split again."""

    kind = "constant shape"
    anchors = ("Div",)

    def apply(self, node: ir.Node) -> Found | None:
        product = node.inputs[0].producer() if node.inputs[0] is not None else None
        divisor = symbols.contents(node.inputs[1])
        if product is None or product.op_type != "Mul" or divisor is None or len(divisor) != 1 or divisor == [0]:
            return None
        if node.outputs[0].dtype is None or not node.outputs[0].dtype.is_integer():
            return None
        for factor, rest in (product.inputs, product.inputs[::-1]):
            same_rank = symbols.rank(rest) == symbols.rank(node.outputs[0])
            if rest is not None and symbols.contents(factor) == divisor and same_rank:
                substitute(node.outputs[0], rest)
                return self.found(node)
        return None


class ConstantFill(Rule):
    """ConstantOfShape of a small known shape -> a constant."""

    kind = "constant shape"
    anchors = ("ConstantOfShape",)

    def apply(self, node: ir.Node) -> Found | None:
        shape = symbols.contents(node.inputs[0])
        if shape is None or node.outputs[0].is_graph_output() or any(isinstance(d, str) for d in shape):
            return None
        size = [int(d) for d in shape]
        if any(d < 0 for d in size) or int(np.prod(size, dtype=np.int64)) > 64:
            return None
        fill = attribute(node, "value")
        element = fill.numpy().reshape(()) if isinstance(fill, ir.TensorProtocol) else np.float32(0)
        substitute(node.outputs[0], emit_constant(node, np.full(size, element), f"{node.outputs[0].name}.constant"))
        return self.found(node)


class ConstantReshape(Rule):
    """Reshape by a computed shape -> Reshape by a constant one, if all but one dimension are fixed or kept."""

    kind = "constant shape"
    anchors = ("Reshape",)

    def apply(self, node: ir.Node) -> Found | None:
        if small_constant(node.inputs[1]) is not None:
            return None
        before, after = symbols.dims(node.inputs[0]), symbols.dims(node.outputs[0])
        if before is None or after is None or 0 in after:
            return None
        target = [
            d if isinstance(d, int) else 0 if i < len(before) and before[i] == d else -1 for i, d in enumerate(after)
        ]
        if target.count(-1) > 1:
            return None
        set_constant_shape(node, target)
        return self.found(node)


class ConstantExpand(Rule):
    """Expand by a computed shape -> by a constant one, if every dimension is kept or grows from 1 to a known size."""

    kind = "constant shape"
    anchors = ("Expand",)

    def apply(self, node: ir.Node) -> Found | None:
        if small_constant(node.inputs[1]) is not None:
            return None
        before, after = symbols.dims(node.inputs[0]), symbols.dims(node.outputs[0])
        if before is None or after is None:
            return None
        padded = (1,) * (len(after) - len(before)) + before
        target: list[int] = []
        for old, new in zip(padded, after):
            if old == new:
                target.append(1)
            elif isinstance(new, int):
                target.append(new)
            else:
                return None
        set_constant_shape(node, target)
        return self.found(node)


def set_constant_shape(node: ir.Node, target: list[int]) -> None:
    """Give Reshape or Expand a constant target shape."""
    if node.op_type == "Reshape":
        node.attributes.pop("allowzero", None)
    old = node.inputs[1]
    shape = emit_constant(node, np.array(target, np.int64), f"{node.outputs[0].name}.shape")
    node.replace_input_with(1, shape)
    producer = old.producer() if old is not None else None
    if producer is not None:
        remove_dead([producer])


class ExpandShapeGuard(Rule):
    """``Expand(x, Where(shape == -1, 1, shape))`` -> ``Expand(x, shape with 1 for -1)``: what older exporters write."""

    kind = "constant shape"
    anchors = ("Expand",)

    def apply(self, node: ir.Node) -> Found | None:
        where = node.inputs[1].producer() if node.inputs[1] is not None else None
        if where is None or where.op_type != "Where":
            return None
        equal = where.inputs[0].producer() if where.inputs[0] is not None else None
        kept = where.inputs[2]
        if equal is None or equal.op_type != "Equal" or kept not in equal.inputs:
            return None
        other = equal.inputs[1] if equal.inputs[0] is kept else equal.inputs[0]
        ones, minus = symbols.contents(where.inputs[1]), symbols.contents(other)
        target, before = symbols.contents(kept), symbols.dims(node.inputs[0])
        if not ones or not minus or set(ones) != {1} or set(minus) != {-1} or target is None or before is None:
            return None
        padded = (1,) * (len(target) - len(before)) + before
        if len(padded) != len(target):
            return None
        constant: list[int] = []
        dynamic = False
        for old, new in zip(padded, target):
            constant.append(1 if new in (-1, old) else new if isinstance(new, int) else 1)
            dynamic |= isinstance(new, str) and new != old
        if dynamic:
            concat = kept.producer() if kept is not None else None
            if concat is None or concat.op_type != "Concat" or len(concat.inputs) != len(target):
                return None
            one = emit_constant(node, np.array([1], np.int64), f"{node.outputs[0].name}.one")
            items = [one if new == -1 else value for new, value in zip(target, concat.inputs)]
            node.replace_input_with(1, emit(node, "Concat", items, {"axis": 0}))
            node.outputs[0].shape = ir.Shape([old if new == -1 else new for old, new in zip(padded, target)])
        else:
            set_constant_shape(node, constant)
        return self.found(node)


class ConstantGather(Rule):
    """GatherND of consecutive rows by constant indices -> Slice."""

    kind = "slices"
    anchors = ("GatherND",)

    def apply(self, node: ir.Node) -> Found | None:
        indices = small_constant(node.inputs[1], 64)
        shape = symbols.dims(node.inputs[0])
        if indices is None or indices.ndim != 2 or indices.shape[1] != 1 or attribute(node, "batch_dims", 0):
            return None
        if shape is None or not isinstance(shape[0], int) or not indices.size:
            return None
        rows = indices[:, 0] % shape[0]
        if (np.diff(rows) != 1).any():
            return None
        bounds = [np.array([v], np.int64) for v in (rows[0], rows[-1] + 1, 0)]
        name = node.outputs[0].name
        values = [emit_constant(node, b, f"{name}.{role}") for b, role in zip(bounds, ("start", "end", "axis"))]
        substitute(node.outputs[0], emit(node, "Slice", [node.inputs[0], *values], like=node.outputs[0]))
        return self.found(node)


class SqueezeOfUnsqueeze(Rule):
    """``Squeeze(Unsqueeze(x, a), a)`` -> ``x``."""

    kind = "no-op"
    anchors = ("Squeeze",)

    def apply(self, node: ir.Node) -> Found | None:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type not in ("Unsqueeze", "Reshape", "Squeeze") or inner.inputs[0] is None:
            return None
        before, after = symbols.dims(inner.inputs[0]), symbols.dims(node.outputs[0])
        if before is None or before != after or inner.inputs[0].producer() is None:
            return None
        substitute(node.outputs[0], inner.inputs[0])
        return self.found(node)


class MergeTransposes(Rule):
    """``Transpose(Transpose(x, p), q)`` -> ``Transpose(x, p[q])``."""

    kind = "merged transposes"
    anchors = ("Transpose",)

    def apply(self, node: ir.Node) -> Found | None:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Transpose" or inner.domain:
            return None
        first, second = attribute(inner, "perm"), attribute(node, "perm")
        if first is None or second is None:
            return None
        perm = [first[i] for i in second]
        merged = emit(node, "Transpose", [inner.inputs[0]], {"perm": perm}, like=node.outputs[0])
        substitute(node.outputs[0], merged)
        return self.found(node)


class TransposeThroughReshape(Rule):
    """``(a, b, s, d) -> (a*b, s, d) -> (a*b, d, s) -> (a, b, d, s)`` is a transpose of the last two axes."""

    kind = "merged transposes"
    anchors = ("Reshape",)

    def apply(self, node: ir.Node) -> Found | None:
        turn = node.inputs[0].producer() if node.inputs[0] is not None else None
        if turn is None or turn.op_type != "Transpose" or list(attribute(turn, "perm") or ()) != [0, 2, 1]:
            return None
        inner = turn.inputs[0].producer() if turn.inputs[0] is not None else None
        if inner is None or inner.op_type != "Reshape":
            return None
        source, middle, result = (symbols.dims(v) for v in (inner.inputs[0], inner.outputs[0], node.outputs[0]))
        if source is None or middle is None or result is None or len(source) != len(result) or len(source) < 3:
            return None
        *batch, rows, columns = source
        if middle[1:] != (rows, columns) or result != (*batch, columns, rows):
            return None
        count = len(source)
        perm = [*range(count - 2), count - 1, count - 2]
        flat = emit(node, "Transpose", [inner.inputs[0]], {"perm": perm}, like=node.outputs[0])
        substitute(node.outputs[0], flat)
        return self.found(node)


class MergeReshapes(Rule):
    """``Reshape(Reshape(x))`` -> ``Reshape(x)`` where the final shape can be given as a constant."""

    kind = "merged reshapes"
    anchors = ("Reshape",)

    def apply(self, node: ir.Node) -> Found | None:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type not in ("Reshape", "Unsqueeze", "Squeeze", "Flatten"):
            return None
        before, after = symbols.dims(inner.inputs[0]), symbols.dims(node.outputs[0])
        if before is None or after is None or 0 in after:
            return None
        target = [
            d if isinstance(d, int) else 0 if i < len(before) and before[i] == d else -1 for i, d in enumerate(after)
        ]
        if target.count(-1) > 1:
            return None
        shape = emit_constant(node, np.array(target, np.int64), f"{node.outputs[0].name}.shape")
        merged = emit(node, "Reshape", [inner.inputs[0], shape], like=node.outputs[0])
        substitute(node.outputs[0], merged)
        return self.found(node)


RULES: tuple[Rule, ...] = (
    RemoveNoOp(),
    ConstantContents(),
    CancelledFactor(),
    ConstantFill(),
    ExpandShapeGuard(),
    ConstantReshape(),
    ConstantExpand(),
    ConstantGather(),
    SqueezeOfUnsqueeze(),
    MergeTransposes(),
    TransposeThroughReshape(),
    MergeReshapes(),
)
