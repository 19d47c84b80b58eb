"""BatchNormalization at inference folds into the convolution or linear operator before it.

    y = gain (conv(x, w) + b - mean) / sqrt(var + eps) + beta
      = conv(x, s w) + s (b - mean) + beta,      s = gain / sqrt(var + eps)  per output channel

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 3.2.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, sole_use
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.linear import is_weight
from qcompile.passes.recognise.pattern import small_constant
from qcompile.passes.recognise.result import Found, Refused
from qcompile.passes.recognise.rule import Rule, emit, emit_constant, substitute


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """The norm as ``scale * x + offset`` per channel, in float64; None if its parameters are not constant."""
    arrays = [small_constant(value) for value in node.inputs[1:5]]
    if any(array is None for array in arrays):
        return None
    gain, beta, mean, var = (np.asarray(array, np.float64) for array in arrays)
    scale = gain / np.sqrt(var + float(attribute(node, "epsilon", 1e-5)))
    return scale, beta - mean * scale


def _training(node: ir.Node) -> bool:
    return bool(attribute(node, "training_mode", 0)) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


class FoldBatchNorm(Rule):
    """Folds BatchNormalization into the Conv or ConvTranspose that only it reads."""

    kind = "BatchNorm folded"
    anchors = ("BatchNormalization",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        x = node.inputs[0]
        conv = x.producer() if x is not None else None
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or conv.domain:
            return None
        if _training(node):
            return self.refused(node, "is in training mode")
        if x is None or sole_use(x) is not node:
            return self.refused(node, f"'{x.name if x else ''}' is used elsewhere, so the convolution cannot be scaled")
        affine = _affine(node)
        weight = conv.inputs[1]
        bias = small_constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
        has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
        kernel = weight.const_value.numpy() if weight is not None and weight.const_value is not None else None
        if kernel is None or affine is None or (has_bias and bias is None):
            return self.refused(node, "its parameters or those of the convolution are not constant")
        scale, offset = affine
        if conv.op_type == "Conv":
            shape = (-1, *(1,) * (kernel.ndim - 1))
            folded = kernel * scale.reshape(shape)
        else:  # (C, M / groups, ...): output channels of group g are channels g M/groups ...
            groups = int(attribute(conv, "group", 1))
            per_group = scale.reshape(groups, 1, -1, *(1,) * (kernel.ndim - 2))
            grouped = kernel.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
            folded = (grouped * per_group).reshape(kernel.shape)
        name = weight.name or "weight" if weight is not None else "weight"
        if weight is not None and is_weight(weight, kernel.ndim) and sole_use(weight) is conv:
            weight.name = f"{name}.before_fold"
        first = 0.0 if bias is None else bias.astype(np.float64)
        inputs = [
            conv.inputs[0],
            emit_constant(node, folded.astype(kernel.dtype), name),
            emit_constant(node, (first * scale + offset).astype(kernel.dtype), f"{name.removesuffix('.weight')}.bias"),
        ]
        attributes = {key: attr.value for key, attr in conv.attributes.items()}
        substitute(node.outputs[0], emit(node, conv.op_type, inputs, attributes, like=node.outputs[0]))
        return self.found(node)


class FoldBatchNormLinear(Rule):
    """Folds BatchNormalization on (batch, channels) into the ``MatMul`` (and ``Add``) that only it reads."""

    kind = "BatchNorm folded"
    anchors = ("BatchNormalization",)

    def apply(self, node: ir.Node) -> Found | Refused | None:
        x = node.inputs[0]
        last = x.producer() if x is not None else None
        bias = None
        if last is not None and last.op_type == "Add" and sole_use(last.outputs[0]) is node:
            bias = small_constant(last.inputs[1])
            last = last.inputs[0].producer() if bias is not None and last.inputs[0] is not None else None
        if last is None or last.op_type != "MatMul" or symbols.rank(x) != 2 or not is_weight(last.inputs[1]):
            return None
        if _training(node):
            return self.refused(node, "is in training mode")
        if sole_use(last.outputs[0]) is None:
            return self.refused(
                node, f"'{last.outputs[0].name}' is used elsewhere, so the linear operator cannot be scaled"
            )
        affine, weight = _affine(node), last.inputs[1]
        if affine is None or weight is None or weight.const_value is None:
            return self.refused(node, "its parameters are not constant")
        scale, offset = affine
        matrix = weight.const_value.numpy()
        name = weight.name or "weight"
        if sole_use(weight) is last:
            weight.name = f"{name}.before_fold"
        folded = emit_constant(node, (matrix * scale).astype(matrix.dtype), name)
        shift = offset if bias is None else offset + bias.astype(np.float64) * scale
        constant = emit_constant(node, shift.astype(matrix.dtype), f"{name.removesuffix('.weight')}.bias")
        product = emit(node, "MatMul", [last.inputs[0], folded], like=x)
        substitute(node.outputs[0], emit(node, "Add", [product, constant], like=node.outputs[0]))
        return self.found(node)
