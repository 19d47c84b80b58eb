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
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import build
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.errors import TargetError
from qcompile.targets.cuda import CudaTarget

QUERIES, KEYS, THREADS = 64, 64, 128
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
LOWEST = -1e30
"""Stands for minus infinity where two of them would be subtracted."""


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
        with e.kernel(name) as builder:
            _Kernel(self).emit()
        return builder.get()

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


class _Kernel:
    """Names of one kernel while it is written."""

    def __init__(self, kind: CudaAttention) -> None:
        self.k = kind

    def emit(self) -> None:
        k = self.k
        self._parameters()
        T.device_entry()
        blocks = (self.length + (QUERIES - 1)) // QUERIES
        self.block, self.head, self.batch_index = T.cta_id([blocks, k.heads, self.batch])
        self.tx = T.thread_id([THREADS])
        self.arena = e.shared(k.shared_bytes)
        self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
        self.first = e.let(self.block * QUERIES)
        self.pitch, self.value_pitch = (2 * k.depth + 16) // 4, (2 * k.value_depth + 16) // 4  # words
        self.place = {"q": 0, "k": QUERIES * self.pitch, "v": (QUERIES + KEYS) * self.pitch}
        self.total = e.Registers((k.value_depth // 8, 4), "float32")
        self.peak, self.sum = e.Registers((2,), "float32"), e.Registers((2,), "float32")
        for i in range(k.value_depth // 8):
            for c in range(4):
                self.total[i, c] = T.float32(0)
        for a in range(2):
            self.peak[a], self.sum[a] = T.float32(LOWEST), T.float32(0)
        self._clear_padding()
        self._load("q", self.head, self.first, self.length, k.head_dim, self.pitch)
        keys = T.min(self.keys, self.first + QUERIES) if k.causal else self.keys
        with T.serial((keys + (KEYS - 1)) // KEYS) as step:
            start = e.let(step * KEYS)
            T.evaluate(T.cuda.cta_sync())
            kv_head = e.let(self.head // (k.heads // k.kv_heads))
            self._load("k", kv_head, start, self.keys, k.head_dim, self.pitch)
            self._load("v", kv_head, start, self.keys, k.value_dim, self.value_pitch)
            T.evaluate(T.cuda.cta_sync())
            self._step(start)
        self._store()

    def _parameters(self) -> None:
        k = self.k
        self.batch, self.length = T.int32(), T.int32()
        self.keys = self.length if k.layout == "merged" else T.int32()
        d, dv = k.head_dim, k.value_dim
        if k.layout == "merged":
            width = k.heads * d + k.kv_heads * (d + dv)
            x = e.argument("x", (self.batch, self.length, width), k.dtype)
            self.operands = {"q": (x, 0), "k": (x, k.heads * d), "v": (x, (k.heads + k.kv_heads) * d)}
        elif k.layout == "rows":
            self.operands = {
                "q": (e.argument("q", (self.batch, self.length, k.heads * d), k.dtype), 0),
                "k": (e.argument("k", (self.batch, self.keys, k.kv_heads * d), k.dtype), 0),
                "v": (e.argument("v", (self.batch, self.keys, k.kv_heads * dv), k.dtype), 0),
            }
        else:
            self.operands = {
                "q": (e.argument("q", (self.batch, k.heads, self.length, d), k.dtype), 0),
                "k": (e.argument("k", (self.batch, k.kv_heads, self.keys, d), k.dtype), 0),
                "v": (e.argument("v", (self.batch, k.kv_heads, self.keys, dv), k.dtype), 0),
            }
        self.mask = None
        if k.mask:
            axes = [size if own else 1 for own, size in zip(k.mask_axes, (self.batch, k.heads, self.length))]
            self.mask = e.argument("mask", (*axes, self.keys), "bool" if k.mask == "bool" else "float32")
        self.out = e.argument("y", (self.batch, self.length, k.heads * dv), k.out)

    # Shared memory

    def _clear_padding(self) -> None:
        """Zeros where a head is shorter than what one product takes; nothing is written there later."""
        k = self.k
        words = (k.depth - k.head_dim) // 2
        if not words:
            return
        rows = QUERIES + KEYS
        with T.serial(-(-rows * words // THREADS)) as p:
            index = e.let(p * THREADS + self.tx)
            with T.If(index < rows * words), T.Then():
                at = index // words * self.pitch + k.head_dim // 2 + index % words
                B.buffer_store(self.arena, e.u32(0), [at])

    def _load(self, name: str, head: Any, first: Any, count: Any, width: int, pitch: int) -> None:
        """64 rows of an operand into shared memory as float16; zeros beyond ``count``."""
        buffer, offset = self.operands[name]
        half = self.k.dtype == "float16"
        per = 8 if half else 4  # elements of a 16-byte piece
        pieces = width // per
        total = KEYS * pieces
        for i in range(-(-total // THREADS)):
            index = e.let(i * THREADS + self.tx)

            def move(index: Any = index) -> None:
                row, column = e.let(index // pieces), e.let(index % pieces * per)
                words = e.Registers((4,), "uint32")
                for c in range(4):
                    words[c] = e.u32(0)
                if self.k.layout == "heads":
                    source = [self.batch_index, head, first + row, column]
                else:
                    source = [self.batch_index, first + row, offset + head * width + column]
                with T.If(first + row < count), T.Then():
                    e.ptx("ld.global.nc.v4.b32", *[words[c] for c in range(4)], buffer.ptr_to(source))
                at = self.arena.ptr_to([self.place[name] + row * pitch + column // 2])
                if half:
                    e.ptx("st.shared.v4.b32", at, *[words[c] for c in range(4)])
                    return
                values = [T.reinterpret("float32", words[c]) for c in range(4)]
                e.ptx("st.shared.v2.b32", at, e.pair(*values[:2], "float16"), e.pair(*values[2:], "float16"))

            if (i + 1) * THREADS > total:
                with T.If(index < total), T.Then():
                    move()
            else:
                move()

    # One tile of keys

    def _step(self, start: Any) -> None:
        k = self.k
        scores = e.Registers((KEYS // 8, 4), "float32")
        for n in range(KEYS // 8):
            for c in range(4):
                scores[n, c] = T.float32(0)
        q, b = e.Registers((4,), "uint32"), e.Registers((4,), "uint32")
        row = self.lane % 8
        for depth in range(k.depth // 16):
            # Matrices of q: rows 0..7 and 8..15, then the same eight columns on.
            at = (self.warp * 16 + self.lane // 8 % 2 * 8 + row) * self.pitch + depth * 8 + self.lane // 16 * 4
            e.read_matrices([q[c] for c in range(4)], self.arena.ptr_to([self.place["q"] + at]))
            for n in range(KEYS // 16):
                # Matrices of k: two halves of K of eight keys, then of the next eight.
                at = (n * 16 + self.lane // 16 * 8 + row) * self.pitch + depth * 8 + self.lane // 8 % 2 * 4
                e.read_matrices([b[c] for c in range(4)], self.arena.ptr_to([self.place["k"] + at]))
                for h in range(2):
                    sums = [scores[2 * n + h, c] for c in range(4)]
                    e.ptx(MMA, *sums, *[q[c] for c in range(4)], b[2 * h], b[2 * h + 1], *sums)
        self._mask_scores(scores, start)
        self._normalise(scores)
        self._add_values(scores)

    def _mask_scores(self, scores: Any, start: Any) -> None:
        """Scale to powers of two; keys that are masked or beyond the end to `LOWEST`."""
        k = self.k
        factor = T.float32(k.scale * log2(2.718281828459045))
        for n in range(KEYS // 8):
            for c in range(4):
                i = self.first + self.warp * 16 + self.lane // 4 + c // 2 * 8
                j = start + n * 8 + self.lane % 4 * 2 + c % 2
                allowed = j < self.keys
                if k.causal:
                    allowed = T.And(allowed, j <= i)
                value = e.Registers((1,), "float32")
                value[0] = scores[n, c] * factor
                if self.mask is not None:
                    inside = T.And(allowed, i < self.length)
                    at = [self.batch_index, self.head, i]
                    at = [*(p if own else 0 for p, own in zip(at, k.mask_axes)), j]
                    with T.If(inside), T.Then():
                        entry = self.mask[tuple(at)]
                        if k.mask == "bool":
                            value[0] = T.Select(entry, value[0], T.float32(LOWEST))
                        else:
                            value[0] = value[0] + entry * T.float32(log2(2.718281828459045))
                scores[n, c] = T.Select(allowed, T.max(value[0], T.float32(LOWEST)), T.float32(LOWEST))

    def _normalise(self, scores: Any) -> None:
        """Scores to powers relative to the running maximum of their row, which moves on."""
        k = self.k
        for a in range(2):
            peak = e.Registers((1,), "float32")
            peak[0] = self.peak[a]
            for n in range(KEYS // 8):
                for h in range(2):
                    peak[0] = T.max(peak[0], scores[n, 2 * a + h])
            peak[0] = T.cuda.warp_reduce(peak[0], "max", 4)
            fade = e.Registers((1,), "float32")
            e.ptx("ex2.approx.ftz.f32", fade[0], self.peak[a] - peak[0])
            self.peak[a] = peak[0]
            self.sum[a] = self.sum[a] * fade[0]
            for i in range(k.value_depth // 8):
                for h in range(2):
                    self.total[i, 2 * a + h] = self.total[i, 2 * a + h] * fade[0]
            for n in range(KEYS // 8):
                for h in range(2):
                    power = e.Registers((1,), "float32")
                    e.ptx("ex2.approx.ftz.f32", power[0], scores[n, 2 * a + h] - peak[0])
                    # Where all so far is masked, the maximum is LOWEST as well and the power would be 1.
                    masked = scores[n, 2 * a + h] <= T.float32(LOWEST)
                    scores[n, 2 * a + h] = T.Select(masked, T.float32(0), power[0])
                    self.sum[a] = self.sum[a] + scores[n, 2 * a + h]

    def _add_values(self, powers: Any) -> None:
        k = self.k
        p, v = e.Registers((4,), "uint32"), e.Registers((4,), "uint32")
        for n in range(KEYS // 16):
            for r in range(4):
                half, a = r // 2, r % 2
                p[r] = e.pair(powers[2 * n + half, 2 * a], powers[2 * n + half, 2 * a + 1], "float16")
            for d in range(k.value_depth // 16):
                # Matrices of v, transposed: keys 0..7 and 8..15 of eight columns, then of the next eight.
                row = n * 16 + self.lane // 8 % 2 * 8 + self.lane % 8
                at = self.place["v"] + row * self.value_pitch + d * 8 + self.lane // 16 * 4
                e.ptx(
                    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
                    *[v[c] for c in range(4)],
                    self.arena.ptr_to([at]),
                )
                for h in range(2):
                    sums = [self.total[2 * d + h, c] for c in range(4)]
                    e.ptx(MMA, *sums, *[p[c] for c in range(4)], v[2 * h], v[2 * h + 1], *sums)

    def _store(self) -> None:
        k = self.k
        for a in range(2):
            whole = T.cuda.warp_reduce(self.sum[a], "sum", 4)
            share = e.let(T.float32(1) / T.max(whole, T.float32(1e-37)))
            i = e.let(self.first + self.warp * 16 + self.lane // 4 + a * 8)
            with T.If(i < self.length), T.Then():
                for n in range(k.value_dim // 8):
                    column = self.head * k.value_dim + n * 8 + self.lane % 4 * 2
                    values = [self.total[n, 2 * a + h] * share for h in range(2)]
                    at = self.out.ptr_to([self.batch_index, i, column])
                    if k.out == "float32":
                        e.ptx("st.global.v2.b32", at, *[T.reinterpret("uint32", v) for v in values])
                    else:
                        e.ptx("st.global.b32", at, e.pair(*values, k.out))
