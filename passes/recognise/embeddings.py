"""Lookups with the same index everywhere.

A text encoder that is given no token types looks up type 0 for every token: ``table[c]`` is one constant row, which
broadcasts in the addition that follows.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.graph import attribute
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.linear import is_weight
from qcompile.passes.recognise.pattern import small_constant
from qcompile.passes.recognise.result import Found
from qcompile.passes.recognise.rule import Rule, emit_constant, substitute

_KEEPS_ELEMENTS = (
    "GatherElements",
    "Gather",
    "Expand",
    "Slice",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Transpose",
    "Tile",
)


def uniform(value: ir.Value | None, depth: int = 8) -> int | None:
    """The integer that every element of ``value`` is equal to, if that is provable."""
    if value is None or depth == 0:
        return None
    array = small_constant(value)
    if array is not None:
        flat = array.reshape(-1)
        return int(flat[0]) if flat.size and array.dtype.kind in "iu" and (flat == flat[0]).all() else None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "ConstantOfShape":
        fill = attribute(node, "value")
        number = fill.numpy().reshape(()) if isinstance(fill, ir.TensorProtocol) else None
        return int(number) if number is not None and number.dtype.kind in "iu" else None
    return uniform(node.inputs[0], depth - 1) if node.op_type in _KEEPS_ELEMENTS else None


class UniformLookup(Rule):
    """``x + Gather(table, c everywhere)`` -> ``x + table[c]``."""

    kind = "constant lookup"
    anchors = ("Gather",)

    def apply(self, node: ir.Node) -> Found | None:
        table, result = node.inputs[0], node.outputs[0]
        if not is_weight(table) or int(attribute(node, "axis", 0)) != 0 or result.is_graph_output():
            return None
        index = uniform(node.inputs[1])
        if index is None or table is None or table.const_value is None:
            return None
        for use in result.uses():
            others = [v for v in use.node.inputs if v is not result]
            shape = symbols.dims(use.node.outputs[0])
            if use.node.op_type != "Add" or len(others) != 1 or shape is None or symbols.dims(others[0]) != shape:
                return None
        row = table.const_value.numpy()[index]
        substitute(result, emit_constant(node, row, f"{table.name}.{index}"))
        return self.found(node)
