"""Softmax attention without the score matrix in memory.

    y[b, i, h] = sum_j softmax_j(scale q[b, h, i] . k[b, h', j] + mask[b, h, i, j]) v[b, h', j],    h' = h kv_heads / heads

A block of four warps owns 64 queries of one head, 16 to a warp, and walks over the keys in tiles of 64. Operands are
rounded to float16 on the way into shared memory; sums, maxima and the output stay float32 in registers. Dao, "FlashAttention-2:
Faster attention with better parallelism and work partitioning" (2023); the running maximum and sum are those of Milakov and
Gimelshein, "Online normalizer calculation for softmax" (2018). The accumulators of the scores are, register by register,
the first operand of the product with the values.

A query that may attend nothing gives zeros.
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

QUERIES, KEYS = 64, 64
"""Of a block, and of one of its steps."""


@dataclass(frozen=True)
class CudaAttention:
    """A kernel.

    Parameters of the PrimFunc by `layout`, all of `dtype`:

    * ``merged``: ``x (B, L, heads d + kv_heads d + kv_heads dv)``, queries, keys and values side by side;
    * ``rows``: ``q (B, L, heads d)``, ``k (B, S, kv_heads d)``, ``v (B, S, kv_heads dv)``;
    * ``heads``: ``q (B, heads, L, d)``, ``k (B, kv_heads, S, d)``, ``v (B, kv_heads, S, dv)``;

    then ``mask``, bool or float32, ``(B, heads, L, S)`` with 1 where `mask_axes` says so, if there is one; then the output
    ``(B, L, heads dv)`` in `out`.

    Attributes:
        mask: ``""``, ``"bool"`` (True: attend) or ``"float"`` (added). mask_axes: whether it differs by batch, head, query.
        causal: query i attends keys up to i.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    layout: str = "merged"
    mask: str = ""
    mask_axes: tuple[bool, bool, bool] = (True, False, False)
    causal: bool = False
    dtype: str = "float32"
    out: str = "float32"

    @staticmethod
    def takes(head_dim: int, value_dim: int) -> bool:
        """Whether heads of these sizes have a kernel."""
        return head_dim % 8 == 0 and value_dim % 8 == 0 and head_dim <= 256 and value_dim <= 128

    @property
    def depth(self) -> int:
        """Head size, padded to what one product takes."""
        return -(-self.head_dim // 16) * 16

    @property
    def value_depth(self) -> int:
        """Size of a value, padded likewise."""
        return -(-self.value_dim // 16) * 16

    @property
    def shared_bytes(self) -> int:
        """Queries, keys and values of a step; 16 bytes of padding keep eight rows in different banks."""
        return (QUERIES + KEYS) * (2 * self.depth + 16) + KEYS * (2 * self.value_depth + 16)

    def build(self, target: CudaTarget, name: str) -> Any:
        """The PrimFunc.

        Raises:
            TargetError: heads of this size have no kernel.
        """
        if not self.takes(self.head_dim, self.value_dim) or self.shared_bytes > target.shared:
            raise TargetError(f"no CUDA attention kernel for heads of {self.head_dim} and values of {self.value_dim}")
        from qcompile.codegen.kernels.cuda.attention_code import emit

        return emit(self, name)

    def reference(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """In float64, operands as in layout ``heads``."""
        group = self.heads // self.kv_heads
        k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
        s = np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k) * self.scale
        if mask is not None:
            s = np.where(mask, s, -np.inf) if self.mask == "bool" else s + mask
        if self.causal:
            s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, -np.inf)
        peak = s.max(-1, keepdims=True)
        p = np.exp(s - np.where(np.isfinite(peak), peak, 0))
        total = p.sum(-1, keepdims=True)
        y = np.einsum("bhij,bhjd->bihd", p / np.where(total == 0, 1, total), v)
        return y.reshape(*y.shape[:2], -1)


def source(kernels: Mapping[str, CudaAttention], target: CudaTarget) -> Path:
    """One cached CUDA source with kernels by name."""
    described = {name: repr(kernel) for name, kernel in kernels.items()}
    make = lambda: {name: kernel.build(target, name) for name, kernel in kernels.items()}  # noqa: E731
    return build.source({"attention": described}, make, target)
