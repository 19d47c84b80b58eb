"""Softmax attention over float32 heads, without ever writing the score matrix to memory.

    o[b, i, h] = sum_j p_ij v[b, j, h'] / sum_j p_ij,   p_ij = exp(scale q[b, i, h] . k[b, j, h'] + mask_ij - m_i)

with ``h' = h // (heads / kv_heads)``. Keys are taken in blocks of ``_BLOCK``; the running maximum ``m_i``, the running
sum and the output row are rescaled when a block raises the maximum. Exponentials are taken to the base 2, with
``log2 e`` folded into the scale.

For each batch entry and key head, K is first packed into panels of one vector of keys, ``[panel][d][lane]``, so that
the score of a query against a vector of keys is a chain of multiply-adds with a broadcast element of q; V is packed
into contiguous rows, and the output row is a chain of multiply-adds with a broadcast probability.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention:
Fast and Memory-Efficient Exact Attention with IO-Awareness" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.x86 import vector as v
from qcompile.errors import TargetError
from qcompile.targets.target import Target

_BLOCK = 256
_LOWEST = -3.0e38
"""Stands for a masked score; low enough to absorb any real one, far enough from -inf to leave room for sums."""

_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
"""``2^f`` for ``|f| <= 1/2``, least maximum relative error (9e-8) with the constant term fixed."""
_ROUND = 12582912.0


@dataclass(frozen=True)
class Attention:
    """Multi-head or grouped-query attention; any batch size and any lengths at run time.

    Parameters of the PrimFunc, float32 unless said; ``H`` heads, ``KH`` key/value heads, ``D`` = head_dim, ``DV`` =
    value_dim, query length ``S``, key length ``T``:

    * ``qkv (B, S, (H + KH) D + KH DV)`` = [q | k | v] if `layout` is "merged" (then ``T = S``); or
      ``q (B, S, H D), k (B, T, KH D), v (B, T, KH DV)`` if it is "rows"; or
      ``q (B, H, S, D), k (B, KH, T, D), v (B, KH, T, DV)`` if it is "heads";
    * ``mask (B or 1, H or 1, S or 1, T)`` if `mask` is "float" (added to the scaled scores) or "bool" (True = visible;
      dtype bool), or ``mask (B, T)`` if it is "keys" (not 0 = visible; dtype `keys_dtype`);
    * the output ``o (B, S, H DV)``.

    A query all of whose keys are masked alike, be it with -inf, the lowest float or False, attends to all of them
    uniformly. A query that precedes all keys of a causal attention (``T < S``) gives 0.

    Attributes:
        scale: factor of the scores; ``1 / sqrt(head_dim)`` if None.
        mask_axes: which of the batch, head and query axes of a 4-D mask are full; the others have extent 1.
        causal: ``""``; ``"upper_left"`` (key ``j`` visible to query ``i`` if ``j <= i``, as ONNX has it without a
            cache); or ``"lower_right"`` (``j <= i + T - S``, queries continue a sequence).
    """

    heads: int
    head_dim: int
    kv_heads: int = 0
    value_dim: int = 0
    scale: float | None = None
    layout: str = "merged"
    mask: str = ""
    mask_axes: tuple[bool, bool, bool] = (True, False, False)
    keys_dtype: str = "int64"
    causal: str = ""

    def __post_init__(self) -> None:
        problem = ""
        if self.heads < 1 or self.head_dim < 1 or self.heads % self.kh:
            problem = f"{self.heads} heads of {self.head_dim} with {self.kh} key/value heads"
        elif self.layout not in ("merged", "rows", "heads"):
            problem = f"unknown layout {self.layout!r}"
        elif self.mask not in ("", "float", "bool", "keys"):
            problem = f"unknown mask {self.mask!r}"
        elif self.causal not in ("", "upper_left", "lower_right"):
            problem = f"unknown causal alignment {self.causal!r}"
        if problem:
            raise TargetError(f"attention kernel: {problem}")

    @property
    def kh(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def dv(self) -> int:
        """Width of a value head."""
        return self.value_dim or self.head_dim

    @property
    def params(self) -> tuple[v.Param, ...]:
        """The buffers of the PrimFunc in order."""
        h, kh, d, dv = self.heads, self.kh, self.head_dim, self.dv
        if self.layout == "merged":
            inputs = [v.Param("qkv", ("B", "S", (h + kh) * d + kh * dv))]
        elif self.layout == "rows":
            inputs = [v.Param("q", ("B", "S", h * d)), v.Param("k", ("B", "T", kh * d)), v.Param("v", ("B", "T", kh * dv))]
        else:
            inputs = [v.Param("q", ("B", h, "S", d)), v.Param("k", ("B", kh, "T", d)), v.Param("v", ("B", kh, "T", dv))]
        length = "S" if self.layout == "merged" else "T"
        if self.mask == "keys":
            inputs.append(v.Param("mask", ("B", length), self.keys_dtype))
        elif self.mask:
            extents = tuple(e if full else 1 for e, full in zip(("B", h, "S"), self.mask_axes))
            inputs.append(v.Param("mask", (*extents, length), "bool" if self.mask == "bool" else "float32"))
        return (*inputs, v.Param("o", ("B", "S", h * dv), output=True))

    def build(self, target: Target, name: str = "attention") -> Any:
        """Return the ``tirx.PrimFunc`` with global symbol ``name``."""
        with v.kernel(name, self.params) as (builder, names):
            _Emitter(self, target, names).emit()
        return builder.get()

    def reference(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """``{"o": ...}`` in float64 numpy."""
        mask = inputs[-1] if self.mask else None
        h, kh, d, dv = self.heads, self.kh, self.head_dim, self.dv
        if self.layout == "merged":
            q, k, val = np.split(inputs[0], [h * d, (h + kh) * d], axis=2)
        else:
            q, k, val = inputs[:3]
        if self.layout != "heads":
            q, k, val = (a.reshape(*a.shape[:2], -1, w).transpose(0, 2, 1, 3) for a, w in ((q, d), (k, d), (val, dv)))
        k, val = (np.repeat(a, h // kh, 1).astype(np.float64) for a in (k, val))
        s, t = q.shape[2], k.shape[2]
        scores = q.astype(np.float64) @ k.swapaxes(2, 3) * self.scale_value
        if self.mask == "float":
            scores = scores + np.maximum(mask, _LOWEST / 1.5)
        elif self.mask:
            visible = mask[:, None, None, :] != 0 if self.mask == "keys" else mask
            scores = np.where(visible, scores, _LOWEST)
        scores = np.where(scores < _LOWEST / 2, _LOWEST, scores)
        limit = np.arange(s) + (t - s if self.causal == "lower_right" else 0)
        hidden = (np.arange(t) > limit[:, None]) if self.causal else np.zeros((s, t), bool)
        scores = np.where(hidden, -np.inf, scores)
        p = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), _LOWEST))
        total = p.sum(-1, keepdims=True)
        o = p @ val / np.where(total == 0, 1, total)
        return {"o": o.transpose(0, 2, 1, 3).reshape(len(o), s, h * dv).astype(np.float32)}

    @property
    def scale_value(self) -> float:
        """The factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


def _exp2(x: Any, n: int) -> Any:
    """``2^x`` for ``x <= 0``, at least ``2^-126``; relative error below 3e-7."""
    x = v.let(T.max(x, v.const(-126.0, n)))
    shifted = v.let(v.add_exactly(x, v.const(_ROUND, n), n))
    f = v.let(x - (shifted - v.const(_ROUND, n)))
    p = v.const(_EXP2[-1], n)
    for c in reversed(_EXP2[:-1]):
        p = v.let(v.fma(p, f, v.const(c, n)))
    bits = v.bits_of(p, "int32", n) + T.shift_left(v.bits_of(shifted, "int32", n), v.const(23, n, "int32"))
    return v.let(v.bits_of(bits, "float32", n))


class _Emitter:
    """Writes one kernel. Row tile and vector tile sizes keep the accumulators in registers."""

    def __init__(self, spec: Attention, target: Target, names: dict[str, Any]) -> None:
        self.spec, self.names = spec, names
        self.cores = target.cores
        self.lanes = v.lanes_of(target)
        # Accumulators: rows x vectors, plus one register per vector and one broadcast, out of 32 or 16 registers.
        self.rows, self.vectors = (8, 3) if self.lanes == 16 else (6, 2)
        self.query_block = 4 * self.rows
        self.stride = _BLOCK + self.lanes  # of a row of scores; not a power of two, to spread over cache sets
        self.value_width = -(-spec.dv // self.lanes) * self.lanes
        self.batch, self.s = names["B"], names["S"]
        self.t = names["S"] if spec.layout == "merged" else names["T"]
        self.group = spec.heads // spec.kh
        self.row_bias = spec.mask in ("float", "bool") and spec.mask_axes[2]

    # Addresses

    def _element(self, which: str, b: Any, head: Any, row: Any, d: Any) -> tuple[Any, list[Any]]:
        """Buffer and index of element ``d`` of a query, key or value."""
        spec = self.spec
        width = spec.dv if which == "v" else spec.head_dim
        if spec.layout == "heads":
            return self.names[which], [b, head, row, d]
        if spec.layout == "rows":
            return self.names[which], [b, row, head * width + d]
        start = {"q": 0, "k": spec.heads * spec.head_dim, "v": (spec.heads + spec.kh) * spec.head_dim}[which]
        return self.names["qkv"], [b, row, head * width + (start + d)]

    def _load(self, which: str, b: Any, head: Any, row: Any, d: Any, n: int) -> Any:
        buffer, index = self._element(which, b, head, row, d)
        return v.load(buffer, index, n)

    # Structure

    def emit(self) -> None:
        """One task is a batch entry, a key head and a range of queries."""
        spec = self.spec
        heads = self.batch * spec.kh
        blocks = T.floordiv(self.s + (self.query_block - 1), T.int64(self.query_block))
        if self.cores > 1:
            # Split the queries only as far as it takes to occupy the cores: every task packs the keys anew.
            splits = v.let_index(T.min(blocks, T.floordiv(T.int64(2 * self.cores - 1) + heads, T.max(heads, T.int64(1)))))
        else:
            splits = T.min(blocks, T.int64(1))
        work = self.s * self.t * (self.group * (spec.head_dim + spec.dv))
        # About 20 microseconds of multiply-adds per piece of parallel work.
        grain = T.max(T.int64(1), T.floordiv(T.int64(1 << 20), T.max(T.floordiv(work, T.max(splits, T.int64(1))), T.int64(1))))
        per_split = T.floordiv(blocks + (splits - 1), T.max(splits, T.int64(1))) * self.query_block

        def tasks(begin: Any, end: Any) -> None:
            padded = T.floordiv(self.t + (self.lanes - 1), T.int64(self.lanes)) * self.lanes
            keys = B.alloc_buffer((padded * spec.head_dim,), "float32")
            values = B.alloc_buffer((padded * self.value_width,), "float32")
            bias = B.alloc_buffer((padded,), "float32")
            with v.span(begin, end) as task:
                head = v.let_index(T.floordiv(task, splits))
                b, kv = v.let_index(T.floordiv(head, T.int64(spec.kh))), v.let_index(T.floormod(head, T.int64(spec.kh)))
                first = v.let_index(T.floormod(task, splits) * per_split)
                self._pack_keys(b, kv, keys)
                self._pack_values(b, kv, values)
                with T.serial(self.group) as g:
                    h = kv * self.group + g
                    if not self.row_bias:
                        self._fill_bias(bias, T.int64(0), b, h, T.int64(0), T.int64(0), self.t)
                    self._queries(b, h, first, T.min(self.s, first + per_split), keys, values, bias)

        v.parallel_ranges(heads * splits, grain, self.cores, tasks)

    def _pack_keys(self, b: Any, kv: Any, keys: Any) -> None:
        """``keys[panel][d][lane] = k[panel * lanes + lane][d]``; lanes past the end repeat the last key."""
        n, d = self.lanes, self.spec.head_dim
        with T.serial(T.floordiv(self.t + (n - 1), T.int64(n))) as panel:
            rows = [T.min(panel * n + lane, self.t - 1) for lane in range(n)]

            def square(start: Any) -> None:
                block = v.transpose([v.let(self._load("k", b, kv, row, start, n)) for row in rows], n)
                for i, column in enumerate(block):
                    v.store(keys, [(panel * d + start + i) * n], column, n)

            with T.serial(d // n) as chunk:
                square(chunk * n)
            if d % n and d > n:
                square(d - n)  # overlaps the chunk before, with the same values
            elif d % n:
                for lane, row in enumerate(rows):
                    for i in range(d):
                        v.store(keys, [(panel * d + i) * n + lane], self._load("k", b, kv, row, i, 1), 1)

    def _pack_values(self, b: Any, kv: Any, values: Any) -> None:
        w, dv = self.value_width, self.spec.dv
        with T.serial(self.t) as row:
            if w != dv:
                v.store(values, [row * w + (w - self.lanes)], v.const(0, self.lanes), self.lanes)
            v.sweep(
                dv, self.lanes, lambda s, n, _: v.store(values, [row * w + s], self._load("v", b, kv, row, s, n), n)
            )

    def _mask_terms(self, b: Any, h: Any, query: Any, start: Any, n: int) -> Any:
        """``n`` elements of the mask as terms added to scores in base 2."""
        spec = self.spec
        mask = self.names["mask"]
        if spec.mask == "keys":
            index = [b, start]
        else:
            index = [i if full else 0 for i, full in zip((b, h, query), spec.mask_axes)] + [start]
        m = v.load(mask, index, n)
        if spec.mask == "float":
            return T.max(m * v.const(math.log2(math.e), n), v.const(_LOWEST, n))
        visible = m if mask.dtype == "bool" else m != v.const(0, n, spec.keys_dtype)
        return T.Select(visible, v.const(0, n), v.const(_LOWEST, n))

    def _fill_bias(self, buffer: Any, at: Any, b: Any, h: Any, query: Any, start: Any, count: Any) -> None:
        """Mask terms of keys ``start .. start + count``; -inf from there to the end of the last vector."""
        n = self.lanes
        full = T.floordiv(count, T.int64(n))
        with T.serial(full) as i:
            value = self._mask_terms(b, h, query, start + i * n, n) if self.spec.mask else v.const(0, n)
            v.store(buffer, [at + i * n], value, n)
        with T.If(full * n < count), T.Then():
            v.store(buffer, [at + full * n], v.const(-math.inf, n), n)
            with T.serial(count - full * n) as i:
                key = full * n + i
                value = self._mask_terms(b, h, query, start + key, 1) if self.spec.mask else T.float32(0)
                v.store(buffer, [at + key], value, 1)

    def _queries(self, b: Any, h: Any, begin: Any, end: Any, keys: Any, values: Any, bias: Any) -> None:
        spec, qb, w = self.spec, self.query_block, self.value_width
        q = B.alloc_buffer((qb * spec.head_dim,), "float32")
        scores = B.alloc_buffer((qb * self.stride,), "float32")
        out = B.alloc_buffer((qb * w,), "float32")
        top = B.alloc_buffer((qb,), "float32")
        total = B.alloc_buffer((qb,), "float32")
        shrink = B.alloc_buffer((qb,), "float32")
        own_bias = B.alloc_buffer((qb * self.stride,), "float32") if self.row_bias else None
        offset = self.t - self.s if spec.causal == "lower_right" else T.int64(0)
        with T.serial(T.floordiv(end - begin + (qb - 1), T.int64(qb))) as block:
            q0 = v.let_index(begin + block * qb)
            count = v.let_index(T.min(T.int64(qb), end - q0))
            tiles = v.let_index(T.floordiv(count + (self.rows - 1), T.int64(self.rows)))
            with T.serial(tiles * self.rows) as r:
                row = T.min(q0 + r, self.s - 1)
                v.sweep(
                    spec.head_dim,
                    self.lanes,
                    lambda s, n, _: v.store(q, [r * spec.head_dim + s], self._load("q", b, h, row, s, n), n),
                )
                v.sweep(w, self.lanes, lambda s, n, _: v.store(out, [r * w + s], v.const(0, n), n))
                v.store(top, [r], T.float32(_LOWEST), 1)
                v.store(total, [r], T.float32(0), 1)
            visible = T.max(T.min(self.t, q0 + count + offset), T.int64(0)) if spec.causal else self.t
            with T.serial(T.floordiv(visible + (_BLOCK - 1), T.int64(_BLOCK))) as key_block:
                k0 = v.let_index(key_block * _BLOCK)
                width = v.let_index(T.min(T.int64(_BLOCK), visible - k0))
                if self.row_bias:
                    with T.serial(tiles * self.rows) as r:
                        row = T.min(q0 + r, self.s - 1)
                        self._fill_bias(own_bias, r * self.stride, b, h, row, k0, width)
                self._multiply_keys(tiles, q, keys, k0, width, scores)
                self._softmax(tiles, q0 + offset, k0, width, scores, bias, own_bias, top, total, shrink)
                self._multiply_values(tiles, scores, values, k0, width, shrink, out)
            with T.serial(count) as r:
                nothing = total[r] == T.float32(0)
                inverse = v.let(T.float32(1) / T.Select(nothing, T.float32(1), total[r]))
                if spec.causal:
                    inverse = v.let(T.Select(q0 + r + offset < 0, T.float32(0), inverse))

                def finish(s: Any, n: int, _: int, r: Any = r, inverse: Any = inverse) -> None:
                    value = v.load(out, [r * w + s], n) * v.splat(inverse, n)
                    v.store(self.names["o"], [b, q0 + r, h * spec.dv + s], value, n)

                v.sweep(spec.dv, self.lanes, finish)

    def _multiply_keys(self, tiles: Any, q: Any, keys: Any, k0: Any, width: Any, scores: Any) -> None:
        """``scores[r][j] = q[r] . k[k0 + j]`` for whole vectors of keys."""
        n, d, nv = self.lanes, self.spec.head_dim, self.vectors
        panels = v.let_index(T.floordiv(width + (n - 1), T.int64(n)))
        first = T.floordiv(k0, T.int64(n))

        def tile(r0: Any, panel: Any, vectors: int) -> None:
            acc = B.alloc_buffer((self.rows * vectors * n,), "float32")
            for i in range(self.rows * vectors):
                v.store(acc, [i * n], v.const(0, n), n)
            with T.serial(d) as i:
                k = [v.let(v.load(keys, [((first + panel + c) * d + i) * n], n)) for c in range(vectors)]
                for r in range(self.rows):
                    a = v.let(v.splat(q[(r0 + r) * d + i], n))
                    for c in range(vectors):
                        at = (r * vectors + c) * n
                        v.store(acc, [at], v.fma(a, k[c], v.load(acc, [at], n)), n)
            for r in range(self.rows):
                for c in range(vectors):
                    at = (r * vectors + c) * n
                    v.store(scores, [(r0 + r) * self.stride + (panel + c) * n], v.load(acc, [at], n), n)

        wide = T.floordiv(panels, T.int64(nv))
        with T.serial(wide) as p, T.serial(tiles) as r:
            tile(r * self.rows, p * nv, nv)
        with T.serial(panels - wide * nv) as p, T.serial(tiles) as r:
            tile(r * self.rows, wide * nv + p, 1)

    def _softmax(
        self, tiles: Any, q0: Any, k0: Any, width: Any, scores: Any, bias: Any, own: Any, top: Any, total: Any, shrink: Any
    ) -> None:
        """Scores become probabilities relative to the running maximum; the earlier sums shrink accordingly."""
        n, rows = self.lanes, 4 if self.rows % 4 == 0 else 3
        panels = T.floordiv(width + (n - 1), T.int64(n))
        factor = self.spec.scale_value * math.log2(math.e)

        def score(r: Any, j: Any) -> Any:
            term = v.load(bias, [k0 + j * n], n) if own is None else v.load(own, [r * self.stride + j * n], n)
            s = v.fma(v.load(scores, [r * self.stride + j * n], n), v.const(factor, n), term)
            if self.spec.causal:
                # Compare small distances, in 32 bits: key k0 + 16 j + lane against the last visible one.
                left = T.cast(T.max(T.min(q0 + r - (k0 + j * n), T.int64(n)), T.int64(-1)), "int32")
                s = T.Select(T.ramp(0, 1, n) <= v.splat(left, n), s, v.const(-math.inf, n))
            return s

        with T.serial(tiles * (self.rows // rows)) as tile:
            acc = B.alloc_buffer((rows * n,), "float32")
            for r in range(rows):
                v.store(acc, [r * n], v.const(_LOWEST, n), n)
            with T.serial(panels) as j:
                for r in range(rows):
                    v.store(acc, [r * n], T.max(v.load(acc, [r * n], n), score(tile * rows + r, j)), n)
            high = []
            for r in range(rows):
                at = tile * rows + r
                best = v.reduce_lanes(v.let(v.load(acc, [r * n], n)), n, T.max)
                high.append(v.let(T.max(best, top[at])))
            for r in range(rows):
                at = tile * rows + r
                v.store(shrink, [at], _exp2(top[at] - high[r], 1), 1)
                v.store(top, [at], high[r], 1)
                v.store(acc, [r * n], v.const(0, n), n)
            with T.serial(panels) as j:
                for r in range(rows):
                    at = tile * rows + r
                    p = _exp2(score(at, j) - v.splat(high[r], n), n)
                    v.store(scores, [at * self.stride + j * n], p, n)
                    v.store(acc, [r * n], v.load(acc, [r * n], n) + p, n)
            for r in range(rows):
                at = tile * rows + r
                add = v.reduce_lanes(v.let(v.load(acc, [r * n], n)), n, v.add)
                v.store(total, [at], v.fma(total[at], shrink[at], add), 1)

    def _multiply_values(self, tiles: Any, scores: Any, values: Any, k0: Any, width: Any, shrink: Any, out: Any) -> None:
        """``out[r] = shrink[r] out[r] + sum_j p[r][j] v[k0 + j]``."""
        n, w = self.lanes, self.value_width

        def tile(r0: Any, start: Any, vectors: int) -> None:
            acc = B.alloc_buffer((self.rows * vectors * n,), "float32")
            for r in range(self.rows):
                factor = v.let(v.splat(shrink[r0 + r], n))
                for c in range(vectors):
                    old = v.load(out, [(r0 + r) * w + (start + c * n)], n)
                    v.store(acc, [(r * vectors + c) * n], old * factor, n)
            with T.serial(width) as j:
                row = [v.let(v.load(values, [(k0 + j) * w + (start + c * n)], n)) for c in range(vectors)]
                for r in range(self.rows):
                    p = v.let(v.splat(scores[(r0 + r) * self.stride + j], n))
                    for c in range(vectors):
                        at = (r * vectors + c) * n
                        v.store(acc, [at], v.fma(p, row[c], v.load(acc, [at], n)), n)
            for r in range(self.rows):
                for c in range(vectors):
                    value = v.load(acc, [(r * vectors + c) * n], n)
                    v.store(out, [(r0 + r) * w + (start + c * n)], value, n)

        with T.serial(tiles) as r:
            for start, vectors in _groups(w // n, self.vectors):
                tile(r * self.rows, start * n, vectors)


def _groups(count: int, most: int) -> list[tuple[int, int]]:
    """``count`` vectors cut into (start, length) groups of nearly equal length, at most ``most``."""
    pieces = -(-count // most)
    bounds = [i * count // pieces for i in range(pieces + 1)]
    return [(a, b - a) for a, b in zip(bounds, bounds[1:])]
