"""Matrix products, with constant matrices and of two streams."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import attribute, bare
from qcompile.codegen.fixed.importer.values import Codes, Linear, Real, matrix_view
from qcompile.codegen.fixed.nodes import MatMul, MatVec
from qcompile.errors import UnsupportedOperatorError


def weight(context: Context, value: ir.Value | None, node: ir.Node) -> Codes:
    """A constant operand as integers and scales.

    Raises:
        UnsupportedOperatorError: it is not quantized.
    """
    found = context.get(value, node)
    if not isinstance(found, Codes):
        raise UnsupportedOperatorError(f"{label(node)}: its weight {value.name if value else ''!r} is not quantized")
    return found


def column_scale(codes: Codes, node: ir.Node) -> np.ndarray:
    """Scales ``(N,)`` of a ``(K, N)`` weight."""
    if (codes.scale != codes.scale[:1]).any():
        raise UnsupportedOperatorError(f"{label(node)}: weights in groups along the sum; quantize per output channel")
    return codes.scale[0]


@operator("MatMul")
def _matmul(context: Context, node: ir.Node) -> Value:
    right = context.get(node.inputs[1], node)
    if isinstance(right, Real):
        return _product_of_streams(context, node, context.real(node.inputs[0], node), right)
    return _dense(context, node, weight(context, node.inputs[1], node))


@operator("Gemm")
def _gemm(context: Context, node: ir.Node) -> Value:
    if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        raise UnsupportedOperatorError(f"{label(node)}: only x @ w + b is supported")
    codes = weight(context, node.inputs[1], node)
    if attribute(node, "transB", 0):
        codes = codes.map(np.transpose)
    result = _dense(context, node, codes)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = result.plus(np.broadcast_to(context.constant(node.inputs[2], node), result.scale.shape))
    return result


def _dense(context: Context, node: ir.Node, codes: Codes) -> Linear:
    value = context.real(node.inputs[0], node)
    if codes.codes.ndim != 2:
        raise UnsupportedOperatorError(f"{label(node)}: a weight of {codes.codes.ndim} axes")
    stream, order = matrix_view(context.builder, value, label(node))
    n = codes.codes.shape[1]
    matrix = np.empty_like(codes.codes)
    matrix[order] = codes.codes
    index = np.arange(stream.tokens * n).reshape(*value.index.shape[:-1], n)
    scale = value.scale * column_scale(codes, node)
    return Linear(
        bare(node), index, (stream.tokens, n), scale, np.zeros(n),
        lambda name, bias, step: MatVec(name, (stream,), matrix, bias, step),
    )  # fmt: skip


def _product_of_streams(context: Context, node: ir.Node, left: Real, right: Real) -> Value:
    if right.log2:
        raise UnsupportedOperatorError(f"{label(node)}: powers of two must be the left operand")
    if left.index.ndim == 2:
        left, right = left.moved(left.index[None]), right.moved(right.index[None])
    heads, tokens = left.index.shape[:2]
    n = right.index.shape[2]
    a, a_order = matrix_view(context.builder, left, label(node), left.index.transpose(1, 0, 2).reshape(tokens, -1))
    # Scores read the rows of their right operand, values its columns.
    for transposed, index in ((False, right.index), (True, right.index.transpose(0, 2, 1))):  # noqa: B007  (read below)
        flat = index.transpose(1, 0, 2).reshape(index.shape[1], -1)
        if (np.diff(flat, axis=1) == 1).all():
            b, b_order = matrix_view(context.builder, right, label(node), flat)
            break
    else:
        raise UnsupportedOperatorError(f"{label(node)}: its right operand is not stored by tokens")
    if (np.diff(a_order) != 1).any() or (np.diff(b_order) != 1).any():
        raise UnsupportedOperatorError(f"{label(node)}: its operands are reordered within tokens")
    exponent = int(a.high.max()) if left.log2 else None
    scale = right.scale * (2.0**-exponent if exponent is not None else left.scale)
    index = np.arange(tokens * heads * n).reshape(tokens, heads, n).transpose(1, 0, 2)
    if len(node.outputs[0].shape or ()) == 3:
        index = index[0]
    return Linear(
        bare(node), index, (tokens, heads * n), np.array([scale]), np.zeros(1),
        lambda name, bias, step: MatMul(name, (a, b), heads, transposed, step, exponent), False,
    )  # fmt: skip
