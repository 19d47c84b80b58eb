"""Matrix products, with constant matrices and of two streams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Note, Value, label, operator
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


SCALE_STEPS = 255
"""Steps in which scales of groups are counted, at most; the largest of a column has as many where no fewer give all."""


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """``weight * scale`` with ``weight`` integers.

    Attributes:
        weight: int64 ``(K, N)``, the scales of groups multiplied in.
        scale: float64 ``(N,)``.
        group_scale: int64 ``(G, N)``, not negative; None if there is one scale per column.
        group_length: consecutive k of a group, fewer in the last one; 0 without groups.
        vanished: groups whose scale is too small for a step, so that their weights are zero.
    """

    weight: np.ndarray
    scale: np.ndarray
    group_scale: np.ndarray | None = None
    group_length: int = 0
    vanished: int = 0


def integer_matrix(codes: Codes) -> IntegerMatrix:
    """A ``(K, N)`` weight as integers times a scale per column.

    Scales of groups along K become integers of at most 8 bits times a scale of the column, as in Zhang et al., "Dual Grained
    Quantization" (2023): exactly where they are multiples of one in up to `SCALE_STEPS` steps, else rounded.
    """
    if (codes.scale == codes.scale[:1]).all():
        return IntegerMatrix(codes.codes, codes.scale[0])
    changes = np.flatnonzero((codes.scale[1:] != codes.scale[:-1]).any(1)) + 1
    length = int(np.gcd.reduce(changes))
    scale, signs = np.abs(codes.scale[::length]), np.sign(codes.scale)
    top = np.where(scale.any(0), scale.max(0), 1)
    steps = np.arange(1, SCALE_STEPS + 1)[:, None]
    # (steps, N): whether the largest scale of the column in so many steps makes all of them whole.
    whole = np.stack([(np.abs((r := scale / top * n) - np.rint(r)) < 1e-4).all(0) for n in steps[:, 0]])
    count = np.where(whole.any(0), whole.argmax(0) + 1, SCALE_STEPS)
    groups = np.rint(scale / top * count).astype(np.int64)
    weight = (codes.codes * signs).astype(np.int64) * np.repeat(groups, length, axis=0)[: len(signs)]
    return IntegerMatrix(weight, top / count, groups, length, int(((groups == 0) & (scale > 0)).sum()))


def report_vanished(context: Context, node: ir.Node, found: IntegerMatrix) -> None:
    """Leave a note where scales of groups became zero."""
    if found.vanished and found.group_scale is not None:
        name = node.inputs[1].name if node.inputs[1] is not None else ""
        context.notes.append(
            Note(
                "scales of groups",
                name or label(node),
                f"{found.vanished} of {found.group_scale.size} are below 1/{2 * SCALE_STEPS} of the largest of their column and "
                "became zero, and with them their weights; use longer groups or one scale per channel",
            )
        )


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
    found = integer_matrix(codes)
    report_vanished(context, node, found)
    matrix = np.empty_like(found.weight)
    matrix[order] = found.weight
    groups, length = found.group_scale, found.group_length
    if (np.diff(order) != 1).any():  # channels of a group are apart
        groups, length = None, 0
    index = np.arange(stream.tokens * n).reshape(*value.index.shape[:-1], n)
    return Linear(
        bare(node), index, (stream.tokens, n), value.scale * found.scale, np.zeros(n),
        lambda name, bias, step: MatVec(name, (stream,), matrix, bias, step, group_scale=groups, group_length=length),
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
