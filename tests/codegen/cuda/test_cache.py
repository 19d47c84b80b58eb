"""Quantized caches of keys and values: the codes, and sources without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cuda import cache
from qcompile.codegen.kernels.cuda.cache import TOKENS, CudaCacheAttention
from qcompile.errors import TargetError
from qcompile.targets.cuda import TARGETS


@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.sampled_from([32, 96, 128]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_codes_are_nearest(bits: int, groups: int, d: int, seed: int) -> None:
    kernel = CudaCacheAttention(4, 2, d, bits, 0.1)
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 1, 2, groups * TOKENS, d)).astype(np.float32)
    k_codes, k_meta, v_codes, v_meta = kernel.encode(k, v)
    assert k_codes.shape == v_codes.shape == (1, 2, groups * TOKENS, d * bits // 8)
    assert k_meta.shape == (1, 2, groups, 2, d) and v_meta.shape == (1, 2, groups * TOKENS, 2)
    keys, values = kernel.decode(k_codes, k_meta, v_codes, v_meta)
    steps = np.repeat(k_meta[:, :, :, 0].astype(np.float64), TOKENS, 2)
    # Half a step, and what rounding scales and lows to float16 adds.
    assert (np.abs(keys - k) <= steps * (0.5 + (1 << bits) * 2.0**-11) + 2.0**-8).all()
    assert (np.abs(values - v) <= v_meta[..., :1].astype(np.float64) * (0.5 + (1 << bits) * 2.0**-11) + 2.0**-8).all()


def test_factors_outside_the_sums_change_nothing() -> None:
    """``(q s) . u + q . l`` is ``q . k``, and likewise for values: what the kernel relies on."""
    kernel = CudaCacheAttention(2, 2, 32, 4, 0.1)
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, TOKENS, 32))
    packed = kernel.encode(k, v)
    keys, values = kernel.decode(*packed)
    q, p = rng.standard_normal(32), rng.random(TOKENS)
    codes = kernel._unpack(packed[0])[0, 0]
    s, low = packed[1][0, 0, 0].astype(np.float64)
    assert np.allclose(codes @ (q * s) + q @ low, keys[0, 0] @ q)
    codes, meta = kernel._unpack(packed[2])[0, 0], packed[3][0, 0].astype(np.float64)
    assert np.allclose((p * meta[:, 0]) @ codes + p @ meta[:, 1], p @ values[0, 0])


def test_sources_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    text = cache.source({"two": CudaCacheAttention(6, 3, 64, 2, 0.1)}, TARGETS["sm_80"]).read_text()
    assert "two_kernel" in text and "two_merge_kernel" in text
    with pytest.raises(TargetError, match="multiples of 32"):
        CudaCacheAttention(6, 3, 40, 4, 0.1)
