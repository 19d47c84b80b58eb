"""LayerNormalization.

    mean = ReduceMean(x),  d = x - mean,  y = d / sqrt(ReduceMean(d^2) + eps) [* gain] [+ bias]

over the last axis or the last few. The division may be written as a product with the reciprocal or with the power
-1/2, the square as a power or a product. Ba, Kiros, Hinton 2016, "Layer Normalization"; ONNX LayerNormalization-17.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.pattern import Const, Either, Op, Pattern, Var, first, outside_readers, small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, substitute


def square(x: Pattern) -> Pattern:
    """``x^2`` as a power or a product."""
    return Either(Op("Pow", x, Const(near=2.0)), Op("Mul", x, x))


def normalised(x: Pattern, variance: Pattern) -> Pattern:
    """``x / sqrt(variance + eps)`` in its usual spellings; ``eps`` outside the root matches too, to be refused."""
    inside = Op("Sqrt", Op("Add", variance, Const("eps")))
    outside = Op("Add", Op("Sqrt", variance), Const("eps_outside"))
    root = Either(inside, outside)
    inverse = Either(
        Op("Reciprocal", root),
        Op("Div", Const(near=1.0), root),
        Op("Pow", Op("Add", variance, Const("eps")), Const(near=-0.5)),
    )
    return Either(Op("Div", x, root), Op("Mul", x, inverse))


_X = Var("x")
_D = Op("Sub", _X, Op("ReduceMean", _X, name="mean", more=True), name="sub")
_CORE = normalised(_D, Op("ReduceMean", square(Var("d")), name="variance", more=True))


class LayerNormRule(Rule):
    """Raises LayerNormalization."""

    kind = "LayerNormalization"
    anchors = ("Div", "Mul")

    def apply(self, node: ir.Node) -> Found | Refused | None:
        match = first(_CORE, node.outputs[0])
        if match is None:
            return None
        centred = match.values["d"].producer()
        if centred is None or centred.op_type != "Sub" or list(centred.inputs) != list(match.named["sub"].inputs):
            return None
        x = match.values["x"]
        reason, axis = trailing_axis(x, match.named["mean"], match.named["variance"])
        if reason:
            return self.refused(node, reason)
        if "eps_outside" in match.constants:
            return self.refused(node, "epsilon is added outside the square root")
        epsilon = match.scalar("eps")
        if epsilon is None:
            return self.refused(node, "epsilon is not a single number")
        reader = outside_readers((*match.nodes, centred), node.outputs[0])
        if reader is not None:
            return self.refused(node, f"the intermediate '{reader.name}' is used elsewhere")
        result, gain, bias = affine_tail(node.outputs[0], x, axis)
        last = result.producer()
        assert last is not None
        if gain is None:
            gain = unit_gain(last, x, axis)
            if gain is None:
                return self.refused(node, "the size of the normalised axes is not known")
        inputs = [x, gain] if bias is None else [x, gain, bias]
        substitute(result, emit(last, self.kind, inputs, {"axis": axis, "epsilon": epsilon}, like=result))
        return self.found(node)


def trailing_axis(x: ir.Value, *means: ir.Node) -> tuple[str, int]:
    """The first of the axes that every ReduceMean of a normalisation reduces, as a negative number; or why not."""
    rank = symbols.rank(x)
    found: set[tuple[int, ...]] = set()
    for mean in means:
        if not attribute(mean, "keepdims", 1):
            return "a mean drops the reduced axis", 0
        axes = symbols.contents(mean.inputs[1]) if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
        if not axes:
            return "the axes of a mean are not constant", 0
        if rank is None and any(int(a) >= 0 for a in axes):
            return "the rank of the input is not known", 0
        found.add(tuple(sorted(int(a) if int(a) < 0 else int(a) - (rank or 0) for a in axes)))
    if len(found) > 1:
        return "the means reduce different axes", 0
    axes_found = next(iter(found))
    if axes_found != tuple(range(-len(axes_found), 0)):
        return f"normalises axes {list(axes_found)}, not the last ones", 0
    return "", axes_found[0]


def affine_tail(value: ir.Value, x: ir.Value, axis: int) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """Follow ``* gain`` and ``+ bias`` after the normalised value; return the last result, the gain and the bias."""
    gain = bias = None
    reader = sole_use(value)
    if reader is not None and reader.op_type == "Mul":
        other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
        if fits(other, x, axis):
            gain, value = other, reader.outputs[0]
            reader = sole_use(value)
    if gain is not None and reader is not None and reader.op_type == "Add":
        other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
        if fits(other, x, axis):
            bias, value = other, reader.outputs[0]
    return value, gain, bias


def fits(value: ir.Value | None, x: ir.Value, axis: int) -> bool:
    """Whether ``value`` is a constant that has exactly the shape of the normalised axes of ``x``."""
    array = small_constant(value)
    shape = symbols.dims(x)
    return array is not None and shape is not None and tuple(array.shape) == shape[axis:] and array.dtype.kind == "f"


def unit_gain(anchor: ir.Node, x: ir.Value, axis: int) -> ir.Value | None:
    """A gain of ones for a normalisation without one."""
    shape = symbols.dims(x)
    if shape is None or x.dtype is None or any(isinstance(d, str) for d in shape[axis:]):
        return None
    ones = np.ones([int(d) for d in shape[axis:]], x.dtype.numpy())
    return emit_constant(anchor, ones, f"{anchor.outputs[0].name}.unit_gain")
