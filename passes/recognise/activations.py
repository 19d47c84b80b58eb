"""Gelu and Swish.

    Gelu(x)        = x/2 (1 + erf(x / sqrt 2))
    Gelu(x), tanh  = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    Swish_a(x)     = x sigmoid(a x)

Hendrycks, Gimpel 2016, "Gaussian Error Linear Units"; Ramachandran et al. 2017, "Searching for Activation Functions".
Factors come in any order and grouping, so the product is first flattened into a constant and a list of values.
A gated unit ``Swish(gate) * up`` stays two operators; the report counts them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import sole_use
from qcompile.passes.recognise.pattern import Const, Either, Match, Op, Var, match, outside_readers, small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, substitute

_X = Var("x")
_CUBE = Either(
    Op("Pow", _X, Const(near=3.0)), Op("Mul", _X, Op("Mul", _X, _X)), Op("Mul", _X, Op("Pow", _X, Const(near=2.0)))
)
_SQUARE = Either(Op("Mul", _X, _X), Op("Pow", _X, Const(near=2.0)))
_SIGMOID = Either(
    Op("Sigmoid", _X),
    Op("Sigmoid", Op("Mul", _X, Const("alpha"))),
)


class GeluRule(Rule):
    """Raises Gelu with ``approximate`` none or tanh."""

    kind = "Gelu"
    anchors = ("Mul", "Div")

    def apply(self, node: ir.Node) -> Found | Refused | None:
        reader = sole_use(node.outputs[0])
        scale, values, nodes = product(node)
        if len(values) != 2 or (reader is not None and reader.op_type in ("Mul", "Div") and _has_number(reader)):
            return None  # with a factor still to come, the subgraph ends further on
        for x, curve in (values, values[::-1]):
            bound = _curve(x, curve)
            if bound is None:
                continue
            form, inner, problem = bound
            if not math.isclose(scale, 0.5, rel_tol=1e-4):
                return self.refused(node, f"the factor is {scale:g} instead of 0.5")
            if problem:
                return self.refused(node, problem)
            matched = (*nodes, *inner)
            outside = outside_readers(matched, node.outputs[0])
            if outside is not None:
                return self.refused(node, f"the intermediate '{outside.name}' is used elsewhere")
            attributes: dict[str, object] = {"approximate": form}
            substitute(node.outputs[0], emit(node, self.kind, [x], attributes, like=node.outputs[0]))
            return self.found(node)
        return None


def _has_number(node: ir.Node) -> bool:
    return any(small_constant(value, 1) is not None for value in node.inputs)


def _curve(x: ir.Value, value: ir.Value) -> tuple[str, tuple[ir.Node, ...], str] | None:
    """Recognise ``1 + erf(...)`` or ``1 + tanh(...)`` of ``x``: the form, its nodes, and what is wrong with it if anything."""
    for form, kind in (("none", "Erf"), ("tanh", "Tanh")):
        for found in match(Op("Add", Op(kind, Var("arg")), Const(near=1.0)), value):
            scale, values, nodes = product_of(found.values["arg"])
            inner = (*found.nodes, *nodes)
            if form == "none":
                if values == [x]:
                    good = math.isclose(scale, math.sqrt(0.5), rel_tol=1e-4)
                    return form, inner, "" if good else f"the argument of erf is {scale:g} x instead of x / sqrt(2)"
                continue
            cubic = _cubic(x, values)
            if cubic is not None:
                coefficient, more = cubic
                good = math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=1e-4)
                problem = "" if good else f"the argument of tanh has factor {scale:g} instead of sqrt(2 / pi)"
                if not math.isclose(coefficient, 0.044715, rel_tol=1e-4):
                    problem = f"the cubic coefficient is {coefficient:g} instead of 0.044715"
                return form, (*inner, *more), problem
    return None


def _cubic(x: ir.Value, values: list[ir.Value]) -> tuple[float, tuple[ir.Node, ...]] | None:
    """The coefficient ``c`` if the values multiply to ``x + c x^3``, and the nodes that compute it."""
    if len(values) == 1:
        pattern, value = (
            Op(
                "Add", _X, Either(Op("Mul", _CUBE, Const("c")), Op("Mul", Op("Mul", Op("Mul", _X, Const("c")), _X), _X))
            ),
            values[0],
        )
    elif len(values) == 2 and x in values:
        value = values[1] if values[0] is x else values[0]
        pattern = Op(
            "Add", Const(near=1.0), Either(Op("Mul", _SQUARE, Const("c")), Op("Mul", Op("Mul", _X, Const("c")), _X))
        )
    else:
        return None
    for found in match(pattern, value):
        coefficient = found.scalar("c")
        if found.values["x"] is x and coefficient is not None:
            return coefficient, found.nodes
    return None


def product(node: ir.Node) -> tuple[float, list[ir.Value], tuple[ir.Node, ...]]:
    """Flatten nested Mul and Div-by-constant: the product of all constants, the other factors, the nodes.

    Only products that nothing else reads are opened, so that a factor which is itself a product stays one.
    """
    scale, values = 1.0, list[ir.Value]()
    nodes: tuple[ir.Node, ...] = (node,)
    for index, value in enumerate(node.inputs):
        array = small_constant(value, 1)
        inner = value.producer() if value is not None else None
        if array is not None and array.size == 1:
            number = float(array.reshape(()))
            scale = scale * number if node.op_type == "Mul" or index == 0 else scale / number if number else math.nan
        elif node.op_type == "Div" and index == 1:
            return math.nan, [], (node,)
        elif inner is not None and value is not None and _is_product(inner) and sole_use(value) is node:
            more, below, deeper = product(inner)
            scale, values, nodes = scale * more, values + below, nodes + deeper
        elif value is not None:
            values.append(value)
    return scale, values, nodes


def _is_product(node: ir.Node) -> bool:
    if node.domain or node.op_type not in ("Mul", "Div"):
        return False
    return node.op_type == "Mul" or small_constant(node.inputs[1], 1) is not None


def product_of(value: ir.Value) -> tuple[float, list[ir.Value], tuple[ir.Node, ...]]:
    """`product` of whatever computes ``value``; the value itself if that is no product."""
    node = value.producer()
    if node is not None and _is_product(node):
        return product(node)
    return 1.0, [value], ()


class SwishRule(Rule):
    """Raises Swish (SiLU for alpha 1)."""

    kind = "Swish"
    anchors = ("Mul",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        found: Match | None = next(match(Op("Mul", _X, _SIGMOID), node.outputs[0]), None)
        if found is None:
            return None
        alpha = found.scalar("alpha") if "alpha" in found.constants else 1.0
        if alpha is None:
            return self.refused(node, "the factor inside the sigmoid is not a single number")
        outside = outside_readers(found.nodes, node.outputs[0])
        if outside is not None:
            return self.refused(node, f"the intermediate '{outside.name}' is used elsewhere")
        attributes: dict[str, object] = {} if alpha == 1.0 else {"alpha": float(np.float32(alpha))}
        substitute(node.outputs[0], emit(node, self.kind, [found.values["x"]], attributes, like=node.outputs[0]))
        return self.found(node)
