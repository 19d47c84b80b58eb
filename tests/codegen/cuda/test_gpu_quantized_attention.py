"""Attention with quantized scores on a CUDA device against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import build, quantized_attention
from qcompile.kernels import attention
from qcompile.targets.cuda import TARGETS, for_capability

from .cases import ATTENTION_CALLS, QUANTIZED_ATTENTION

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", list(QUANTIZED_ATTENTION))
@pytest.mark.parametrize("batch, length, more", [(1, 1, 0), (2, 7, 13), (1, 64, 0), (2, 65, 130), (1, 257, 3)])
def test_matches_float64(name: str, batch: int, length: int, more: int) -> None:
    kernel = QUANTIZED_ATTENTION[name]
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    function = build.load(build.compile_library(quantized_attention.source(QUANTIZED_ATTENTION, target), target))[name]
    rng = np.random.default_rng(length)
    keys = length + more
    q = rng.standard_normal((batch, kernel.heads, length, kernel.head_dim)).astype(np.float32)
    k = rng.standard_normal((batch, kernel.kv_heads, keys, kernel.head_dim)).astype(np.float32)
    v = rng.standard_normal((batch, kernel.kv_heads, keys, kernel.value_dim)).astype(np.float32)
    packed = kernel.encode(q, k, v)
    shape = (batch, length, kernel.heads * kernel.value_dim)
    y = torch.full(shape, torch.nan, device="cuda", dtype=getattr(torch, kernel.out))
    function(*(torch.from_numpy(np.ascontiguousarray(a)).cuda() for a in packed), y)
    want = kernel.reference(*kernel.decode(*packed))
    # Probabilities are rounded to float16, or to three bits of mantissa; the result to its type.
    bound = {"float16": 1e-3, "e4m3": 4e-2}[kernel.values] + (4e-3 if kernel.out == "bfloat16" else 0)
    assert np.linalg.norm(y.double().cpu().numpy() - want) <= bound * np.linalg.norm(want)


@pytest.mark.parametrize("scores, values", ATTENTION_CALLS)
def test_function_is_near_that_of_torch(scores: str, values: str) -> None:
    bound = {"float16": 0.02, "e4m3": 0.05}[values] if scores == "int8" else 0.3
    torch.manual_seed(0)
    q = torch.randn(2, 8, 200, 128, device="cuda", dtype=torch.float16)
    k = torch.randn(2, 2, 200, 128, device="cuda", dtype=torch.float16) + 3
    v = torch.randn(2, 2, 200, 128, device="cuda", dtype=torch.float16)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).float()
    got = attention(q, k, v, scores, values, causal=True).float()
    assert got.shape == want.shape and (got - want).norm() <= bound * want.norm()
