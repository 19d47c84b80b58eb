"""Lowering: from explicit quantization to fused kernel operators.

Everything before this pass runs in ONNX Runtime; its result does not. The operators of the domain `qcompile.kernel`
are what kernels compute in one go:

| operator | inputs | outputs |
|---|---|---|
| `Linear` | x or codes, scale?, weight codes, weight scale, weight zero point?, bias?, residual? | y |
| `Experts` | x or codes, scale?, weight codes (K, experts, N), weight scale, weight zero point?, ids | y (ids, N) |
| `Rowwise` | x, gamma?, beta?, static scale?, factor?, left and right? | y?, codes?, scale? |
| `Rope` | merged projections, cos, sin | same shape as the first input |
| `Attention` | q, k, v or one merged matrix, mask? | y (batch, sequence, heads x head_dim) |
| `Embedding` | codes, scale, ids | y |
| `Quantize` | x (batch, ..., channels), static scale? | codes, scale (batch) |
| `Conv` | x or codes (batch, ..., channels), scale?, weight codes, weight scale, weight zero point?, bias?, limits? | y, channels last; with limits (step, lowest, highest code): codes, scale (batch) |

Activation codes are uint8 here: the signed code plus 128. Weights that are no integers have further operands from the eighth
on, whose names are the attribute `weight_aux`.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.passes.graph import remove_unused_initializers
from qcompile.passes.lower.attention import lower_attention
from qcompile.passes.lower.convolution import lower_convolutions
from qcompile.passes.lower.embedding import lower_embeddings
from qcompile.passes.lower.experts import lower_experts
from qcompile.passes.lower.kernel_ops import KERNEL_DOMAIN
from qcompile.passes.lower.layout import sink_transposes
from qcompile.passes.lower.linear import lower_linears
from qcompile.passes.lower.requantize import store_codes
from qcompile.passes.lower.rowwise import Mixes, lower_rowwise

__all__ = ["KERNEL_DOMAIN", "lower"]


def lower(
    model: ir.Model,
    *,
    codes: bool = False,
    factors: bool = False,
    mixes: Mixes | None = None,
    experts: bool = False,
) -> ir.Model:
    """Return a lowered copy of ``model`` (weights shared).

    Args:
        model: the quantized stage.
        codes: whether the target's convolutions can store codes instead of floats.
        factors: whether the target's row kernels can multiply by a vector, and by a Kronecker product of any matrices,
            before they quantize.
        mixes: which Kronecker products, by width of the row and rows of the two matrices; all by default.
        experts: whether the target has kernels for experts. Without, the codes that are picked become floats.
    """
    lowered = model.clone()
    lower_linears(lowered)
    if experts:
        lower_experts(lowered)
    lower_convolutions(lowered)
    common.RemoveUnusedNodesPass()(lowered)  # a dequantizer nothing reads must not look like a reader of the codes
    lower_attention(lowered)
    lower_rowwise(lowered, factors=factors, mixes=mixes)
    lower_embeddings(lowered)
    sink_transposes(lowered)
    if codes:
        common.RemoveUnusedNodesPass()(lowered)
        store_codes(lowered)
    common.RemoveUnusedNodesPass()(lowered)
    remove_unused_initializers(lowered.graph)
    lowered.opset_imports[KERNEL_DOMAIN] = 1
    return lowered
