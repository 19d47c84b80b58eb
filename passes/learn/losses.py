"""How far the results of a rounded model are from those of the float model.

    kl       KL(p || q) of the softmax over the last axis, mean over rows: for logits
    kl-top   the same over the k most likely classes of the float model, both renormalised: the long tail is noise that
             a few calibration samples cannot teach
    mse      |y - z|^2 / |y|^2, for hidden states

Source of kl-top: Hu et al., "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling
Transformations for Better Distribution Fitting" (2025), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from qcompile.errors import RecipeError

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor], Tensor]
"""``(float result, rounded result) -> scalar``."""

TOP = 1000


def kl(exact: Tensor, rounded: Tensor) -> Tensor:
    """Mean over rows of ``KL(softmax(exact) || softmax(rounded))``."""
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(rounded, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def kl_top(exact: Tensor, rounded: Tensor) -> Tensor:
    """`kl` over the `TOP` largest logits of each row of ``exact``."""
    if exact.shape[-1] <= TOP:
        return kl(exact, rounded)
    values, index = exact.topk(TOP, -1)
    return kl(values, rounded.gather(-1, index))


def mse(exact: Tensor, rounded: Tensor) -> Tensor:
    """Squared error relative to the exact result's own size."""
    return (rounded - exact).square().sum() / exact.square().sum().clamp_min(1e-30)


LOSSES: dict[str, Loss] = {"kl": kl, "kl-top": kl_top, "mse": mse}


def choose(name: str, output: ir.Value) -> Loss:
    """Return a loss by name; ``auto`` means kl for logits and mse for anything else.

    Logits are results that a linear operator writes, perhaps with a bias, more channels than it reads.

    Raises:
        RecipeError: there is no such loss.
    """
    if name == "auto":
        return kl if _is_logits(output) else mse
    if name not in LOSSES:
        raise RecipeError(f"unknown loss {name!r}; known: auto, {', '.join(LOSSES)}")
    return LOSSES[name]


def _is_logits(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "Add":
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return False
    shape = node.inputs[1].shape
    if shape is None or len(shape) != 2:
        return False
    transposed = "transB" in node.attributes and node.attributes["transB"].value
    k, n = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return isinstance(k, int) and isinstance(n, int) and n > k
