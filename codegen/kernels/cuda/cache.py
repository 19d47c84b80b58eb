"""Attention of one new token over a quantized cache of keys and values.

    y[b, h] = sum_j softmax_j(scale q[b, h] . k[b, h', j]) v[b, h', j],   j < length[b],   h' = h kv_heads / heads

    k[j, c] = s[j / 64, c] u[j, c] + l[j / 64, c]      keys by channel, in groups of 64 tokens
    v[j, c] = s[j] u[j, c] + l[j]                      values by token
    u in 0 .. 2^bits - 1

Scales stay out of the inner loops: ``q . k = (q s) . u + q . l`` per group of tokens, and ``sum_j p_j v_j = sum_j (p_j s_j) u_j
+ sum_j p_j l_j``. A block owns one key head of one sequence and a part of its tokens, for all query heads that read it; a
second kernel merges the parts. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024); Dao et
al., "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.codegen.kernels.cuda import build
from qcompile.errors import TargetError
from qcompile.targets.cuda import CudaTarget

TOKENS = 64
"""Of a group of keys, and of a step."""


@dataclass(frozen=True)
class CudaCacheAttention:
    """A pair of kernels.

    Parameters of the first PrimFunc, S a multiple of 64 that all sequences fit, G = S / 64: ``q (B, heads, d)`` fp16;
    ``k (B, kv_heads, S, d bits / 8)`` uint8; ``k_meta (B, kv_heads, G, 2, d)`` fp16, scales and lows; ``v`` like k;
    ``v_meta (B, kv_heads, S, 2)`` fp16; ``lengths (B,)`` int32; ``parts (splits, B, heads, d + 2)`` float32 to be written:
    sums, largest score (base 2), sum of powers. The second: ``parts``, ``y (B, heads, d)`` fp16. Codes of a byte lie in the
    order of the channels, lowest bits first.

    Attributes:
        heads, kv_heads, head_dim: multiple of 32, up to 256. bits: 2, 4 or 8.
        scale: of scores. splits: parts a sequence is divided into.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bits: int
    scale: float
    splits: int = 8

    def __post_init__(self) -> None:
        if self.head_dim % 32 or self.head_dim > 256 or self.bits not in (2, 4, 8) or self.heads % self.kv_heads:
            raise TargetError(
                f"no CUDA kernel for a cache of {self.bits} bits with heads of {self.head_dim}: heads are multiples of 32 up "
                "to 256 channels, codes have 2, 4 or 8 bits"
            )

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def row_words(self) -> int:
        """32-bit words of the codes of a token."""
        return self.head_dim * self.bits // 32

    def functions(self, target: CudaTarget, name: str) -> dict[str, Any]:
        """The PrimFuncs ``name`` and ``name_merge``."""
        from qcompile.codegen.kernels.cuda.cache_code import emit, emit_merge

        return {name: emit(self, name), f"{name}_merge": emit_merge(self, f"{name}_merge")}

    def encode(self, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        """``k``, ``k_meta``, ``v`` and ``v_meta`` of float keys and values ``(B, kv_heads, S, d)``, rounded to nearest."""
        b, h, s, d = k.shape
        groups = k.reshape(b, h, s // TOKENS, TOKENS, d)
        k_codes, k_meta = self._codes(groups, 3)
        v_codes, v_meta = self._codes(v, 3)
        return [self._pack(k_codes.reshape(k.shape)), k_meta[..., 0, :, :], self._pack(v_codes), v_meta[..., 0]]

    def decode(self, k: np.ndarray, k_meta: np.ndarray, v: np.ndarray, v_meta: np.ndarray) -> tuple[Any, Any]:
        """Inverse of `encode`: float64 keys and values."""
        meta = np.repeat(k_meta.astype(np.float64), TOKENS, axis=2)
        keys = self._unpack(k) * meta[..., 0, :] + meta[..., 1, :]
        values = self._unpack(v) * v_meta[..., :1].astype(np.float64) + v_meta[..., 1:].astype(np.float64)
        return keys, values

    def _codes(self, x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes, and scales and lows stacked before the last axis: over ``axis`` for keys, the last one for values."""
        by_token = x.ndim == 4
        axis = -1 if by_token else axis
        low = x.min(axis, keepdims=True).astype(np.float16)
        scale = ((x.max(axis, keepdims=True) - low) / ((1 << self.bits) - 1)).astype(np.float16)
        scale = np.where(scale == 0, np.float16(1), scale)
        codes = np.clip(np.rint((x - low) / scale), 0, (1 << self.bits) - 1).astype(np.uint8)
        if by_token:
            return codes, np.stack([scale, low], -2)
        return codes, np.concatenate([scale, low], axis)[..., None, :, :]

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        per = 8 // self.bits
        parts = codes.reshape(*codes.shape[:-1], -1, per)
        return np.bitwise_or.reduce([parts[..., i] << self.bits * i for i in range(per)]).astype(np.uint8)

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        parts = [packed >> self.bits * i & (1 << self.bits) - 1 for i in range(8 // self.bits)]
        return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)

    def reference(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """In float64: ``(B, heads, d)``; zeros for a sequence without tokens."""
        y = np.zeros(q.shape)
        for b, length in enumerate(lengths):
            for h in range(self.heads if length else 0):
                scores = keys[b, h // self.group, :length] @ q[b, h].astype(np.float64) * self.scale
                p = np.exp(scores - scores.max())
                y[b, h] = p @ values[b, h // self.group, :length] / p.sum()
        return y


def source(kernels: Mapping[str, CudaCacheAttention], target: CudaTarget) -> Path:
    """One cached CUDA source with kernels by name."""
    described = {name: repr(kernel) for name, kernel in kernels.items()}

    def make() -> dict[str, Any]:
        return {n: f for name, kernel in kernels.items() for n, f in kernel.functions(target, name).items()}

    return build.source({"cache attention": described}, make, target)
