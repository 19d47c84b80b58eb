"""Attention over many queries with quantized scores and values, for prefill.

    y[b, i, h] = sum_j softmax_j(scale sq[i] sk[j] (cq[i] . ck[j])) v[j],      one head; sq, sk: a scale per token

* ``int8``, ``int4``: integer codes of queries and keys. The mean key is taken off before keys are quantized: it adds the same
  to all scores of a query, which softmax does not see, and most of the outliers of keys are in it. Four-bit codes are
  stored one to a byte: from Hopper on tensor cores multiply no integers of four bits.
* ``binary``: signs; a scale is the mean magnitude. A row is stored as its sign bits and multiplied as bits and complements,
  side by side: for signs a, b in {-1, 1}^d, a . b = 2 (popc(a & b) + popc(~a & ~b)) - d.

The product with the values is float16, or e4m3 with a scale per channel and probabilities times 448; then values lie
transposed, keys in the order in which the accumulators of the scores hold them, so that probabilities need not move.

Sources: Zhang et al., "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration" (2024) and
"SageAttention2" (2024); "BinaryAttention: One-Bit QK-Attention for Vision and Diffusion Transformers" (2026); the loop is
that of `attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.codegen.kernels.cuda import build
from qcompile.codegen.kernels.cuda.attention import KEYS, QUERIES
from qcompile.errors import TargetError
from qcompile.targets.cuda import CudaTarget

TOP = 448.0
"""The largest e4m3 number."""


@dataclass(frozen=True)
class CudaQuantizedAttention:
    """A kernel.

    Parameters of the PrimFunc: ``q (B, heads, L, bytes)`` int8, ``q_scale (B, heads, L)`` float32, ``k (B, kv_heads, S, bytes)``,
    ``k_scale (B, kv_heads, S)``; values ``v (B, kv_heads, S, dv)`` float16, or ``v (B, kv_heads, dv, S')`` int8 holding e4m3
    bits and ``v_scale (B, kv_heads, dv)``, S' the next multiple of 64; the output ``y (B, L, heads dv)`` in `out`.

    Attributes:
        scores: ``int8``, ``int4`` or ``binary``. values: ``float16`` or ``e4m3``.
        causal: query i attends keys up to i.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    scores: str = "int8"
    values: str = "float16"
    causal: bool = False
    out: str = "float16"

    def __post_init__(self) -> None:
        if self.scores not in ("int8", "int4", "binary") or self.values not in ("float16", "e4m3"):
            raise TargetError(
                f"quantized attention has scores int8, int4 or binary and values float16 or e4m3, "
                f"not {self.scores!r} and {self.values!r}"
            )
        least = 64 if self.scores == "binary" else 32
        if self.head_dim % least or self.head_dim > 256 or self.value_dim % 16 or self.value_dim > 128:
            raise TargetError(
                f"quantized attention takes heads of multiples of {least} up to 256 and values of multiples of 16 up to 128, "
                f"not {self.head_dim} and {self.value_dim}"
            )
        if self.heads % self.kv_heads:
            raise TargetError(f"{self.kv_heads} key heads do not divide {self.heads} heads")

    @property
    def row_bytes(self) -> int:
        """Of a query or key in memory."""
        return self.head_dim // 8 if self.scores == "binary" else self.head_dim

    @property
    def depth_bytes(self) -> int:
        """In shared memory: whole products of 32 bytes."""
        return -(-2 * self.row_bytes // 32) * 32 if self.scores == "binary" else self.row_bytes

    @property
    def shared_bytes(self) -> int:
        """Queries, keys and values of a step; 16 bytes of padding keep eight rows in different banks."""
        value = KEYS * (2 * self.value_dim + 16) if self.values == "float16" else self.value_dim * (KEYS + 16)
        return (QUERIES + KEYS) * (self.depth_bytes + 16) + value

    def build(self, target: CudaTarget, name: str) -> Any:
        """The PrimFunc.

        Raises:
            TargetError: the chip lacks the instructions.
        """
        if self.values == "e4m3" and not target.has("fp8"):
            raise TargetError(f"e4m3 values need tensor cores for them, which {target} lacks")
        from qcompile.codegen.kernels.cuda.quantized_attention_code import emit

        return emit(self, name)

    # Operands, in numpy

    def encode(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        """Quantize ``q (B, heads, L, d)``, ``k (B, kv_heads, S, d)``, ``v (B, kv_heads, S, dv)``: the kernel's operands."""
        q, k = (np.asarray(a, np.float32) for a in (q, k))
        if self.scores != "binary":
            k = k - k.mean(2, keepdims=True)
        return (*self._rows(q), *self._rows(k), *self._values(np.asarray(v, np.float32)))

    def _rows(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.scores == "binary":
            bits = np.packbits(x >= 0, -1, bitorder="little")
            return bits.view(np.int8), np.abs(x).mean(-1)
        top = np.float32(127 if self.scores == "int8" else 7)
        scale = np.abs(x).max(-1) / top
        scale = np.where(scale == 0, np.float32(1), scale)
        return np.rint(x / scale[..., None]).astype(np.int8), scale

    def _values(self, v: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.values == "float16":
            return (v.astype(np.float16),)
        import ml_dtypes

        scale = np.abs(v).max(2) / np.float32(TOP)
        scale = np.where(scale == 0, np.float32(1), scale)
        codes = (v / scale[:, :, None]).astype(ml_dtypes.float8_e4m3fn).view(np.int8)
        batch, heads, keys, width = v.shape
        padded = np.zeros((batch, heads, -(-keys // KEYS) * KEYS, width), np.int8)
        padded[:, :, :keys] = codes
        return np.ascontiguousarray(padded[:, :, key_order(padded.shape[2])].swapaxes(2, 3)), scale

    def decode(
        self, q: np.ndarray, q_scale: np.ndarray, k: np.ndarray, k_scale: np.ndarray, *values: np.ndarray
    ) -> Any:
        """What operands stand for: queries, keys and values, float64."""
        real = [self._real(a, s) for a, s in ((q, q_scale), (k, k_scale))]
        if self.values == "float16":
            return (*real, values[0].astype(np.float64))
        import ml_dtypes

        codes, scale = values
        v = np.empty_like(codes)
        v[..., key_order(codes.shape[3])] = codes
        v = v[..., : k.shape[2]].view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale[..., None]
        return (*real, v.swapaxes(2, 3))

    def _real(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        if self.scores == "binary":
            codes = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little").astype(np.int8) * 2 - 1
        return codes.astype(np.float64) * scale[..., None]

    def reference(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention of what `decode` returns in float64, ``(B, L, heads dv)``."""
        group = self.heads // self.kv_heads
        k, v = (np.repeat(a, group, axis=1) for a in (k, v))
        s = np.einsum("bhid,bhjd->bhij", q, k) * self.scale
        if self.causal:
            s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        y = np.einsum("bhij,bhjd->bihd", p / p.sum(-1, keepdims=True), v)
        return y.reshape(*y.shape[:2], -1)


def key_order(count: int) -> np.ndarray:
    """Which key lies at each of ``count`` places (a multiple of 32) along the rows of e4m3 values.

    Of 32 keys the product takes bytes 4 t .. 4 t + 3 and 16 + 4 t .. from lane t of four, which holds the scores of keys
    8 n + 2 t and 8 n + 2 t + 1 for n = 0 .. 3.
    """
    place = np.arange(32)
    half, t, pair, e = place // 16, place // 4 % 4, place // 2 % 2, place % 2
    key = 16 * half + 8 * pair + 2 * t + e
    return (np.arange(0, count, 32)[:, None] + key).reshape(-1)


def source(kernels: Mapping[str, CudaQuantizedAttention], target: CudaTarget) -> Path:
    """One cached CUDA source with kernels by name."""
    described = {name: repr(kernel) for name, kernel in kernels.items()}
    make = lambda: {name: kernel.build(target, name) for name, kernel in kernels.items()}  # noqa: E731
    return build.source({"quantized attention": described}, make, target)
