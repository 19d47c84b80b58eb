"""Attention over a quantized cache on a CUDA device against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import build, cache
from qcompile.targets.cuda import TARGETS, for_capability

from .cases import CACHES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", list(CACHES))
@pytest.mark.parametrize("lengths", [(1,), (64, 65), (0, 37, 500), (2047,)], ids=str)
def test_matches_float64(name: str, lengths: tuple[int, ...]) -> None:
    kernel = CACHES[name]
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    module = build.load(build.compile_library(cache.source(CACHES, target), target))
    rng = np.random.default_rng(len(lengths))
    batch, size = len(lengths), (max(lengths) // cache.TOKENS + 1) * cache.TOKENS
    k, v = rng.standard_normal((2, batch, kernel.kv_heads, size, kernel.head_dim)).astype(np.float32)
    k += rng.standard_normal(kernel.head_dim) * 2
    q = rng.standard_normal((batch, kernel.heads, kernel.head_dim)).astype(np.float16)
    packed = kernel.encode(k, v)
    want = kernel.reference(q, *kernel.decode(*packed), np.array(lengths))
    parts = torch.full((kernel.splits, batch, kernel.heads, kernel.head_dim + 2), torch.nan, device="cuda")
    y = torch.full((batch, kernel.heads, kernel.head_dim), torch.nan, device="cuda", dtype=torch.float16)
    tensors = [torch.from_numpy(np.ascontiguousarray(a)).cuda() for a in (q, *packed)]
    module[name](*tensors, torch.tensor(lengths, dtype=torch.int32, device="cuda"), parts)
    module[f"{name}_merge"](parts, y)
    got = y.double().cpu().numpy()
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
    assert not got[np.array(lengths) == 0].any()
