"""Attention with quantized scores without a GPU: operands, and the code that is generated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import quantized_attention
from qcompile.codegen.kernels.cuda.quantized_attention import CudaQuantizedAttention, key_order
from qcompile.errors import InputError, TargetError
from qcompile.kernels import attention
from qcompile.targets.cuda import TARGETS

from .cases import QUANTIZED_ATTENTION


def exact(kernel: CudaQuantizedAttention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of floats."""
    return kernel.reference(*(a.astype(np.float64) for a in (q, k, v)))


def operands(kernel: CudaQuantizedAttention, keys: int, seed: int = 0) -> list[np.ndarray]:
    """Keys with a large mean, as those of language models have."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, kernel.heads, 9, kernel.head_dim)).astype(np.float32)
    k = rng.standard_normal((2, kernel.kv_heads, keys, kernel.head_dim)).astype(np.float32)
    k += 5 * rng.standard_normal(kernel.head_dim).astype(np.float32)
    v = rng.standard_normal((2, kernel.kv_heads, keys, kernel.value_dim)).astype(np.float32)
    return [q, k, v]


@pytest.mark.parametrize("name", list(QUANTIZED_ATTENTION))
@pytest.mark.parametrize("keys", [9, 64, 77])
def test_operands_mean_what_was_encoded(name: str, keys: int) -> None:
    kernel = QUANTIZED_ATTENTION[name]
    q, k, v = operands(kernel, keys)
    if kernel.scores == "binary":
        k -= k.mean(2, keepdims=True)
    real = kernel.decode(*kernel.encode(q, k, v))
    assert real[2].shape == v.shape and np.abs(real[2] - v).max() < 0.05 * np.abs(v).max()
    got, want = kernel.reference(*real), exact(kernel, q, k, v)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < {"int8": 0.03, "int4": 0.25, "binary": 0.8}[kernel.scores], error


def test_the_mean_key_does_not_cost_precision() -> None:
    kernel = CudaQuantizedAttention(2, 2, 64, 64, 0.125)
    q, k, v = operands(kernel, 200)
    shifted = kernel.reference(*kernel.decode(*kernel.encode(q, k + 100, v)))
    assert np.allclose(shifted, kernel.reference(*kernel.decode(*kernel.encode(q, k, v))), atol=2e-2)


def test_key_order_is_that_of_the_accumulators() -> None:
    order = key_order(64)
    assert sorted(order) == list(range(64))
    # Lane t holds scores of keys 8 n + 2 t, + 1; the product takes bytes 4 t .. 4 t + 3 and 16 + 4 t ..
    for t in range(4):
        held = {8 * n + 2 * t + e for n in range(4) for e in range(2)}
        assert set(order[4 * t : 4 * t + 4]) | set(order[16 + 4 * t : 20 + 4 * t]) == held


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    text = quantized_attention.source(QUANTIZED_ATTENTION, TARGETS["sm_90a"]).read_text()
    assert "b1.b1.s32.and.popc" in text and "s32.s8.s8.s32" in text and "f32.e4m3.e4m3.f32" in text


def test_refusals() -> None:
    with pytest.raises(TargetError, match="48"):
        CudaQuantizedAttention(4, 4, 48, 64, 0.1)
    with pytest.raises(TargetError, match="3 key heads"):
        CudaQuantizedAttention(4, 3, 64, 64, 0.1)
    with pytest.raises(TargetError, match="sm_80"):
        CudaQuantizedAttention(4, 4, 64, 64, 0.1, values="e4m3").build(TARGETS["sm_80"], "f")


def test_operands_that_do_not_fit_are_named() -> None:
    q, k = torch.zeros(1, 4, 3, 64, dtype=torch.float16), torch.zeros(1, 2, 5, 64, dtype=torch.float16)
    with pytest.raises(InputError, match="k must be float16 or bfloat16"):
        attention(q, k.float(), k)
    with pytest.raises(InputError, match="do not fit"):
        attention(q, k, k[:, :, :4])
    with pytest.raises(InputError, match="on one CUDA device"):
        attention(q, k, k)


def test_scores_and_values_without_a_kernel_are_refused() -> None:
    for scores, values in (("fp8", "float16"), ("int8", "e5m2")):
        with pytest.raises(TargetError, match="int8, int4 or binary"):
            CudaQuantizedAttention(2, 2, 64, 64, 0.125, scores, values)
