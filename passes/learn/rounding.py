"""Rounding to integers as a function with useful gradients.

    y = s clip(round(x / s), -q, q)     the derivative of round is taken as 1 (straight through)

The gradient reaches ``s`` too: through what is clipped and through the rounding error itself. Scales are dynamic, from
the largest magnitude of a token or of a group of weights, times a learned share: *clipping* gives up the few largest
entries for finer steps.

Sources: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013); Shao et al.,
"OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models" (2023), learnable weight clipping.
"""

from __future__ import annotations

import math

import torch

from qcompile.errors import FormatError
from qcompile.formats import ActivationFormat, Format, IntFormat

Tensor = torch.Tensor


class _Snap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward((x >= low) & (x <= high))
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def snap(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Round half to even and clip to integers from ``low`` to ``high``; the derivative is 1 inside and 0 outside."""
    return _Snap.apply(x, low, high)


def round_tokens(x: Tensor, fmt: ActivationFormat, clip: Tensor | float = 1.0) -> Tensor:
    """What ``DequantizePerToken(QuantizePerToken(x))`` computes on ``(..., K)``, or a static quantizer with its own range.

    Args:
        x: activations.
        fmt: ``int<b>/token`` or ``int<b>/tensor``.
        clip: share of the largest magnitude that is still represented.
    """
    top = (1 << (fmt.bits - 1)) - 1
    largest = x.abs().amax(-1, keepdim=True) if fmt.granularity == "token" else x.abs().amax()
    scale = largest * clip / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return snap(x / scale, -top, top) * scale


def round_weight(weight: Tensor, fmt: Format, clip: Tensor | float = 1.0) -> Tensor:
    """Round to nearest in groups along K as ``fmt`` does, on the grid that covers ``clip`` of each group's range.

    Args:
        weight: ``(K, N)``.
        fmt: an integer format.
        clip: share of the range, broadcastable to ``(groups, 1, N)``.

    Raises:
        FormatError: the format is not an integer format.
    """
    if not isinstance(fmt, IntFormat):
        raise FormatError(f"{fmt}: only rounding to integer formats can be learned through")
    k, n = weight.shape
    length, groups = fmt.group_length(k), fmt.groups(k)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, groups * length - k))
    blocks = padded.reshape(groups, length, n)
    if fmt.symmetric:
        scale = blocks.abs().amax(1, keepdim=True) * clip / max(fmt.qmax, 0.5)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        rounded = snap(blocks / scale, fmt.qmin, fmt.qmax) * scale
    else:
        low, high = (
            (blocks.amin(1, keepdim=True) * clip).clamp(max=0),
            (blocks.amax(1, keepdim=True) * clip).clamp(min=0),
        )
        scale = (high - low) / fmt.qmax
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = snap(-low / scale)
        rounded = (torch.clamp(snap(blocks / scale) + zero, 0, fmt.qmax) - zero) * scale
    return rounded.reshape(-1, n)[:k]
