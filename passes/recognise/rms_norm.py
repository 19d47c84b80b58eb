"""RMSNormalization.

    y = x / sqrt(ReduceMean(x^2) + eps) [* gain]

over the last axis or the last few, in the spellings of `layer_norm`. Zhang, Sennrich 2019, "Root Mean Square Layer
Normalization"; ONNX RMSNormalization-23.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.graph import sole_use
from qcompile.passes.recognise.layer_norm import fits, normalised, square, trailing_axis, unit_gain
from qcompile.passes.recognise.pattern import Op, Var, first, outside_readers
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, substitute

_X = Var("x")
_CORE = normalised(_X, Op("ReduceMean", square(_X), name="variance", more=True))


class RmsNormRule(Rule):
    """Raises RMSNormalization."""

    kind = "RMSNormalization"
    anchors = ("Div", "Mul")

    def apply(self, node: ir.Node) -> Found | Refused | None:
        match = first(_CORE, node.outputs[0])
        if match is None:
            return None
        x = match.values["x"]
        producer = x.producer()
        if producer is not None and producer.op_type == "Sub" and _is_centred(producer):
            return None  # a LayerNormalization, which its own rule raises or refuses
        reason, axis = trailing_axis(x, match.named["variance"])
        if reason:
            return self.refused(node, reason)
        if "eps_outside" in match.constants:
            return self.refused(node, "epsilon is added outside the square root")
        epsilon = match.scalar("eps")
        if epsilon is None:
            return self.refused(node, "epsilon is not a single number")
        reader = outside_readers(match.nodes, node.outputs[0])
        if reader is not None:
            return self.refused(node, f"the intermediate '{reader.name}' is used elsewhere")
        result, gain = node.outputs[0], None
        scaled = sole_use(result)
        if scaled is not None and scaled.op_type == "Mul":
            other = scaled.inputs[1] if scaled.inputs[0] is result else scaled.inputs[0]
            if fits(other, x, axis):
                gain, result = other, scaled.outputs[0]
        last = result.producer()
        assert last is not None
        gain = gain or unit_gain(last, x, axis)
        if gain is None:
            return self.refused(node, "the size of the normalised axes is not known")
        substitute(result, emit(last, self.kind, [x, gain], {"axis": axis, "epsilon": epsilon}, like=result))
        return self.found(node)


def _is_centred(sub: ir.Node) -> bool:
    mean = sub.inputs[1].producer() if sub.inputs[1] is not None else None
    return mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is sub.inputs[0]
