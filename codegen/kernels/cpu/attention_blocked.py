"""Attention of many queries: blocks of scores in cache, register-tiled products.

For each batch entry and key head, K is first packed into panels of one vector of keys, ``[panel][d][lane]``, so that
the score of a query against a vector of keys is a chain of multiply-adds with a broadcast element of q; V is packed
into contiguous rows, and the output row is a chain of multiply-adds with a broadcast probability. Keys are taken in
blocks of `_BLOCK`; the running maximum, the running sum and the output row are rescaled when a block raises the
maximum (Milakov and Gimelshein, 2018; Dao et al., 2022).
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.attention_parts import LOWEST, Parts, exp2
from qcompile.targets.target import Target

if TYPE_CHECKING:
    from qcompile.codegen.kernels.cpu.attention import Attention

_BLOCK = 256


class BlockedAttention(Parts):
    """Writes one kernel. Row tile and vector tile sizes keep the accumulators in registers."""

    def __init__(self, spec: Attention, target: Target, names: dict[str, Any]) -> None:
        super().__init__(spec, target, names)
        # Accumulators: rows x vectors, plus one register per vector and one broadcast, out of 32 or 16 registers.
        self.rows, self.vectors = (8, 3) if self.lanes == 16 else (6, 2)
        self.query_block = 4 * self.rows
        self.stride = _BLOCK + self.lanes  # of a row of scores; not a power of two, to spread over cache sets
        self.value_width = -(-spec.dv // self.lanes) * self.lanes
        self.row_bias = spec.mask in ("float", "bool") and spec.mask_axes[2]

    def emit(self) -> None:
        """One task is a batch entry, a key head and a range of queries."""
        spec = self.spec
        heads = self.batch * spec.kh
        blocks = T.floordiv(self.s + (self.query_block - 1), T.int64(self.query_block))
        if self.cores > 1:
            # Split the queries only as far as it takes to occupy the cores: every task packs the keys anew.
            splits = v.let(T.min(blocks, T.floordiv(T.int64(2 * self.cores - 1) + heads, T.max(heads, T.int64(1)))))
        else:
            splits = v.let(T.min(blocks, T.int64(1)))
        work = self.s * self.t * (self.group * (spec.head_dim + spec.dv))
        # About 20 microseconds of multiply-adds per piece of parallel work.
        grain = T.max(
            T.int64(1), T.floordiv(T.int64(1 << 20), T.max(T.floordiv(work, T.max(splits, T.int64(1))), T.int64(1)))
        )
        per_split = v.let(T.floordiv(blocks + (splits - 1), T.max(splits, T.int64(1))) * self.query_block)

        def tasks(begin: Any, end: Any) -> None:
            padded = T.floordiv(self.t + (self.lanes - 1), T.int64(self.lanes)) * self.lanes
            keys = B.alloc_buffer((padded * spec.head_dim,), "float32")
            values = B.alloc_buffer((padded * self.value_width,), "float32")
            bias = B.alloc_buffer((padded,), "float32")
            with v.span(begin, end) as task:
                head = v.let(T.floordiv(task, splits))
                b, kv = v.let(T.floordiv(head, T.int64(spec.kh))), v.let(T.floormod(head, T.int64(spec.kh)))
                first = v.let(T.floormod(task, splits) * per_split)
                self._pack_keys(b, kv, keys)
                self._pack_values(b, kv, values)
                with T.serial(self.group) as g:
                    h = kv * self.group + g
                    if not self.row_bias:
                        self.fill_bias(bias, T.int64(0), b, h, T.int64(0), T.int64(0), self.t)
                    self._queries(b, h, first, v.let(T.min(self.s, first + per_split)), keys, values, bias)

        v.parallel_ranges(heads * splits, grain, self.cores, tasks)

    def _pack_keys(self, b: Any, kv: Any, keys: Any) -> None:
        """``keys[panel][d][lane] = k[panel * lanes + lane][d]``; lanes past the end repeat the last key."""
        n, d = self.lanes, self.spec.head_dim
        with T.serial(T.floordiv(self.t + (n - 1), T.int64(n))) as panel:
            rows = [T.min(panel * n + lane, self.t - 1) for lane in range(n)]

            def square(start: Any) -> None:
                block = v.transpose([v.let(self.load("k", b, kv, row, start, n)) for row in rows], n)
                for i, column in enumerate(block):
                    v.store(keys, [(panel * d + start + i) * n], column, n)

            with T.serial(d // n) as chunk:
                square(chunk * n)
            if d % n and d > n:
                square(d - n)  # overlaps the chunk before, with the same values
            elif d % n:
                for lane, row in enumerate(rows):
                    for i in range(d):
                        v.store(keys, [(panel * d + i) * n + lane], self.load("k", b, kv, row, i, 1), 1)

    def _pack_values(self, b: Any, kv: Any, values: Any) -> None:
        w, dv = self.value_width, self.spec.dv
        with T.serial(self.t) as row:
            if w != dv:
                v.store(values, [row * w + (w - self.lanes)], v.const(0, self.lanes), self.lanes)
            v.sweep(dv, self.lanes, lambda s, n, _: v.store(values, [row * w + s], self.load("v", b, kv, row, s, n), n))

    def _queries(self, b: Any, h: Any, begin: Any, end: Any, keys: Any, values: Any, bias: Any) -> None:
        spec, qb, w = self.spec, self.query_block, self.value_width
        q = B.alloc_buffer((qb * spec.head_dim,), "float32")
        scores = B.alloc_buffer((qb * self.stride,), "float32")
        out = B.alloc_buffer((qb * w,), "float32")
        highs = B.alloc_buffer((qb * self.lanes,), "float32")
        top = B.alloc_buffer((qb,), "float32")
        total = B.alloc_buffer((qb,), "float32")
        shrink = B.alloc_buffer((qb,), "float32")
        own_bias = B.alloc_buffer((qb * self.stride,), "float32") if self.row_bias else None
        offset = self.t - self.s if spec.causal == "lower_right" else T.int64(0)
        with T.serial(T.floordiv(end - begin + (qb - 1), T.int64(qb))) as block:
            q0 = v.let(begin + block * qb)
            count = v.let(T.min(T.int64(qb), end - q0))
            tiles = v.let(T.floordiv(count + (self.rows - 1), T.int64(self.rows)))
            with T.serial(tiles * self.rows) as r:
                row = T.min(q0 + r, self.s - 1)
                v.sweep(
                    spec.head_dim,
                    self.lanes,
                    lambda s, n, _: v.store(q, [r * spec.head_dim + s], self.load("q", b, h, row, s, n), n),
                )
                v.sweep(w, self.lanes, lambda s, n, _: v.store(out, [r * w + s], v.const(0, n), n))
                v.store(top, [r], T.float32(LOWEST), 1)
                v.store(total, [r], T.float32(0), 1)
            visible = v.let(T.max(T.min(self.t, q0 + count + offset), T.int64(0)) if spec.causal else self.t)
            with T.serial(T.floordiv(visible + (_BLOCK - 1), T.int64(_BLOCK))) as key_block:
                k0 = v.let(key_block * _BLOCK)
                width = v.let(T.min(T.int64(_BLOCK), visible - k0))
                if self.row_bias:
                    with T.serial(tiles * self.rows) as r:
                        row = T.min(q0 + r, self.s - 1)
                        self.fill_bias(own_bias, r * self.stride, b, h, row, k0, width)
                self._multiply_keys(tiles, q, keys, q0 + offset, k0, width, scores, highs, bias, own_bias)
                self._softmax(tiles, width, scores, highs, top, total, shrink)
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

    def _multiply_keys(
        self, tiles: Any, q: Any, keys: Any, q0: Any, k0: Any, width: Any, scores: Any, highs: Any, bias: Any, own: Any
    ) -> None:
        """``scores[r][j] = factor q[r] . k[k0 + j] + mask``, and per row and lane their maximum over the block."""
        n, d, nv = self.lanes, self.spec.head_dim, self.vectors
        panels = v.let(T.floordiv(width + (n - 1), T.int64(n)))
        first = v.let(T.floordiv(k0, T.int64(n)))
        factor = self.spec.scale_value * math.log2(math.e)

        def finished(product: Any, row: Any, j: Any) -> Any:
            term = v.load(bias, [k0 + j], n) if own is None else v.load(own, [row * self.stride + j], n)
            s = v.fma(product, v.const(factor, n), term)
            if not self.spec.causal:
                return v.let(s)
            # Compare small distances, in 32 bits: the lanes of key k0 + j against the last visible key.
            left = T.cast(T.max(T.min(q0 + row - (k0 + j), T.int64(n)), T.int64(-1)), "int32")
            return v.let(T.Select(T.ramp(0, 1, n) <= v.splat(left, n), s, v.const(-math.inf, n)))

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
                row = r0 + r
                high = v.load(highs, [row * n], n)
                for c in range(vectors):
                    s = finished(v.load(acc, [(r * vectors + c) * n], n), row, (panel + c) * n)
                    v.store(scores, [row * self.stride + (panel + c) * n], s, n)
                    high = v.let(T.max(high, s))
                v.store(highs, [row * n], high, n)

        with T.serial(tiles * self.rows) as r:
            v.store(highs, [r * n], v.const(LOWEST, n), n)
        wide = v.let(T.floordiv(panels, T.int64(nv)))
        with T.serial(wide) as p, T.serial(tiles) as r:
            tile(r * self.rows, p * nv, nv)
        with T.serial(panels - wide * nv) as p, T.serial(tiles) as r:
            tile(r * self.rows, wide * nv + p, 1)

    def _softmax(self, tiles: Any, width: Any, scores: Any, highs: Any, top: Any, total: Any, shrink: Any) -> None:
        """Scores become probabilities relative to the running maximum; the earlier sums shrink accordingly."""
        n, rows = self.lanes, 4 if self.rows % 4 == 0 else 3
        panels = T.floordiv(width + (n - 1), T.int64(n))
        with T.serial(tiles * (self.rows // rows)) as tile:
            acc = B.alloc_buffer((rows * n,), "float32")
            high = []
            for r in range(rows):
                best = v.reduce_lanes(v.let(v.load(highs, [(tile * rows + r) * n], n)), n, T.max)
                high.append(v.let(T.max(best, top[tile * rows + r])))
            for r in range(rows):
                at = tile * rows + r
                v.store(shrink, [at], exp2(top[at] - high[r], 1), 1)
                v.store(top, [at], high[r], 1)
                v.store(acc, [r * n], v.const(0, n), n)
            with T.serial(panels) as j:
                for r in range(rows):
                    at = (tile * rows + r) * self.stride + j * n
                    p = exp2(v.let(v.load(scores, [at], n) - v.splat(high[r], n)), n)
                    v.store(scores, [at], p, n)
                    v.store(acc, [r * n], v.load(acc, [r * n], n) + p, n)
            for r in range(rows):
                at = tile * rows + r
                add = v.reduce_lanes(v.let(v.load(acc, [r * n], n)), n, v.add)
                v.store(total, [at], v.fma(total[at], shrink[at], add), 1)

    def _multiply_values(
        self, tiles: Any, scores: Any, values: Any, k0: Any, width: Any, shrink: Any, out: Any
    ) -> None:
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
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]
