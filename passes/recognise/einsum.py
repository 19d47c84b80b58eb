"""Einsum of two operands that is a matrix product -> Transpose and MatMul.

    "bsk,kn->bsn", "bsk,nk->bsn"      a linear operator
    "bqhd,bkhd->bhqk"                 scores of attention
    "bhqk,bkhd->bqhd"                 the weighted sum

In general ``A[batch, m, c] B[batch, c, n] -> Y[batch, m, n]`` with every group of labels but the batch a single one, in
any order; B may lack the batch, and then ``m`` may be several labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.graph import attribute
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.result import Found
from qcompile.passes.recognise.rule import Rule, emit, substitute


@dataclass(frozen=True)
class Product:
    """Orders of axes that turn an Einsum into ``MatMul``: of the first operand, of the second, and of the result."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]


def as_product(equation: str) -> Product | None:
    """How to compute ``equation`` as one MatMul between transposes, if it is one."""
    text = equation.replace(" ", "")
    if "->" not in text or "." in text:
        return None
    inputs, y = text.split("->")
    operands = inputs.split(",")
    if len(operands) != 2 or any(len(set(labels)) != len(labels) for labels in (*operands, y)):
        return None
    a, b = operands
    contracted = [label for label in a if label in b and label not in y]
    rows = [label for label in a if label not in b]
    columns = [label for label in b if label not in a]
    batch = [label for label in y if label in a and label in b]
    if len(contracted) != 1 or len(columns) != 1 or set(y) != {*batch, *rows, *columns}:
        return None
    if batch and len(rows) != 1:
        return None
    left = [*batch, *rows, *contracted]
    right = [*batch, *contracted, *columns]
    if set(left) != set(a) or set(right) != set(b):
        return None
    made = [*batch, *rows, *columns]
    return Product(
        tuple(a.index(label) for label in left),
        tuple(b.index(label) for label in right),
        tuple(made.index(label) for label in y),
    )


class EinsumToMatMul(Rule):
    """Einsum that is a matrix product -> MatMul."""

    kind = "Einsum"
    anchors = ("Einsum",)

    def apply(self, node: ir.Node) -> Found | None:
        equation = attribute(node, "equation", "")
        form = as_product(equation) if isinstance(equation, str) and len(node.inputs) == 2 else None
        if form is None:
            return None
        operands = [
            _transposed(node, value, order)
            for value, order in zip(node.inputs, (form.left, form.right))
            if value is not None
        ]
        if len(operands) != 2:
            return None
        product = emit(node, "MatMul", operands)
        product.type = node.outputs[0].type
        substitute(node.outputs[0], _transposed(node, product, form.result, like=node.outputs[0]))
        return self.found(node)


def _transposed(node: ir.Node, value: ir.Value, order: tuple[int, ...], like: ir.Value | None = None) -> ir.Value:
    if order == tuple(range(len(order))):
        return value
    result = emit(node, "Transpose", [value], {"perm": list(order)}, like=like)
    shape = symbols.dims(value)
    result.type = value.type
    if like is None and shape is not None:
        result.shape = ir.Shape([shape[axis] for axis in order])
    return result
