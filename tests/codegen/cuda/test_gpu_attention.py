"""Attention kernels on a CUDA device against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import attention, build
from qcompile.codegen.kernels.cuda.attention import CudaAttention
from qcompile.targets.cuda import TARGETS, for_capability

from .cases import ATTENTION

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def packed(kernel: CudaAttention, t: torch.Tensor) -> torch.Tensor:
    """``(batch, heads, length, size)`` as the kernel takes it."""
    return t.contiguous() if kernel.layout == "heads" else t.transpose(1, 2).flatten(2).contiguous()


@pytest.mark.parametrize("name", list(ATTENTION))
@pytest.mark.parametrize("batch, length", [(1, 1), (2, 7), (1, 64), (3, 65), (2, 200)])
def test_matches_float64(name: str, batch: int, length: int) -> None:
    kernel = ATTENTION[name]
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    function = build.load(build.compile_library(attention.source(ATTENTION, target), target))[name]
    keys = length if kernel.layout == "merged" else length + 13
    dtype = getattr(torch, kernel.dtype)
    torch.manual_seed(length)
    q = torch.randn(batch, kernel.heads, length, kernel.head_dim, device="cuda", dtype=dtype)
    k = torch.randn(batch, kernel.kv_heads, keys, kernel.head_dim, device="cuda", dtype=dtype)
    v = torch.randn(batch, kernel.kv_heads, keys, kernel.value_dim, device="cuda", dtype=dtype)
    parts = [packed(kernel, t) for t in (q, k, v)]
    tensors = [torch.cat(parts, -1)] if kernel.layout == "merged" else parts
    mask = None
    if kernel.mask:
        shape = [n if own else 1 for own, n in zip(kernel.mask_axes, (batch, kernel.heads, length))]
        mask = torch.randn(*shape, keys, device="cuda")
        mask = mask > -0.8 if kernel.mask == "bool" else mask
        tensors.append(mask)
    y = torch.full(
        (batch, length, kernel.heads * kernel.value_dim), torch.nan, device="cuda", dtype=getattr(torch, kernel.out)
    )
    function(*tensors, y)
    arrays = [t.float().cpu().numpy() for t in (q, k, v)]
    want = kernel.reference(*arrays, None if mask is None else mask.cpu().numpy())
    got = y.double().cpu().numpy()
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)  # operands are rounded to float16
