"""Softmax and normalization, over the channels of a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.driver import Context, Value, label, operator
from qcompile.codegen.fixed.importer.operators.common import attribute, bare
from qcompile.codegen.fixed.importer.values import Pending, Real, Scaled, matrix_view
from qcompile.codegen.fixed.nodes import Normalize, Softmax
from qcompile.codegen.fixed.nodes.attention import exp_table
from qcompile.codegen.fixed.nodes.normalize import Z
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError


class SoftmaxPending(Pending):
    """A softmax before its quantizer decides the form of the probabilities."""

    def __init__(self, where: str, index: np.ndarray, stream: Stream, heads: int, scale: float) -> None:
        super().__init__(where, index, stream.shape)
        self.stream, self.heads, self.scale = stream, heads, scale

    def codes(self, context: Context, bits: int) -> Real:
        """As codes of powers of two."""
        table = exp_table(self.scale, self.stream.type)
        out = context.builder.add(Softmax(context.builder.name(self.where), (self.stream,), table, self.heads, bits))
        return Real(out, self.index, 1.0, log2=True)

    def build(self, builder: Any, scale: float, low: int, high: int) -> Stream:
        raise UnsupportedOperatorError(
            f"Softmax {self.where!r}: only a product with values (attention) reads probabilities in hardware; "
            "let the model end with what the softmax reads"
        )

    def reach(self) -> float:
        return 1.0


@operator("Softmax")
def _softmax(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    rank = value.index.ndim
    index = value.index.reshape((1,) * (3 - rank) + value.index.shape)
    axis = int(attribute(node, "axis", -1))
    if axis not in (-1, rank) or rank > 3:
        raise UnsupportedOperatorError(f"{label(node)}: the softmax must run over the last axis")
    heads, tokens, _ = index.shape
    stream, order = matrix_view(context.builder, value, label(node), index.transpose(1, 0, 2).reshape(tokens, -1))
    if (np.diff(order) != 1).any():
        raise UnsupportedOperatorError(f"{label(node)}: its rows are reordered")
    out = np.arange(index.size).reshape(tokens, heads, -1).transpose(1, 0, 2)
    return SoftmaxPending(bare(node), out.reshape(value.index.shape), stream, heads, value.scale)


@operator("LayerNormalization", "RMSNormalization")
def _normalization(context: Context, node: ir.Node) -> Value:
    value = context.real(node.inputs[0], node)
    axis = int(attribute(node, "axis", -1))
    if axis not in (-1, value.index.ndim):
        raise UnsupportedOperatorError(f"{label(node)}: it must normalise the last axis")
    stream, order = matrix_view(context.builder, value, label(node))
    c = stream.channels
    epsilon = max(1, round(float(attribute(node, "epsilon", 1e-5)) * c * c / value.scale**2))
    centred = node.op_type == "LayerNormalization"
    name = context.builder.name(f"{bare(node)}_normal")
    normal = context.builder.add(Normalize(name, (stream,), epsilon, centred))
    factor = np.full(c, 2.0**-Z)
    offset = np.zeros((1, c))
    columns = np.empty(c, np.int64)  # logical column of every position
    columns[order] = np.arange(c)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        factor = factor * context.constant(node.inputs[1], node).reshape(-1)[columns]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        offset = offset + context.constant(node.inputs[2], node).reshape(-1)[columns]
    index = np.arange(normal.tokens)[:, None] * c + order
    return Scaled(bare(node), index.reshape(value.index.shape), normal.shape, normal, factor, offset)
