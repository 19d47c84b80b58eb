"""Attention of one query per batch entry: K and V are read once, in the layout they have.

A score is a dot product along the head, so a vector of scores starts as one vector of partial sums per key; pairs of
these are folded into each other until one vector holds one sum per key.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.attention_parts import LOWEST, Parts, exp2


class SingleQueryAttention(Parts):
    """Writes the kernel for ``S = 1``; one task is a batch entry and a key head with all query heads of its group."""

    def emit(self) -> None:
        """Emit the loop over tasks."""
        spec = self.spec
        work = T.max(self.t, T.int64(1)) * (self.group * (spec.head_dim + spec.dv))
        grain = T.max(T.int64(1), T.floordiv(T.int64(1 << 19), work))
        v.parallel_ranges(self.batch * spec.kh, grain, self.cores, self._tasks)

    def _tasks(self, begin: Any, end: Any) -> None:
        spec, n = self.spec, self.lanes
        # Extents of buffers are expressions of parameters: a buffer is allocated before any statement has run.
        extent = T.floordiv(self.t + (n - 1), T.int64(n)) * n
        vectors = v.let(T.floordiv(self.t + (n - 1), T.int64(n)))
        width = -(-spec.head_dim // n) * n
        query = B.alloc_buffer((self.group * width,), "float32")
        scores = B.alloc_buffer((self.group * extent,), "float32")
        bias = B.alloc_buffer((extent,), "float32")
        total = B.alloc_buffer((self.group,), "float32")
        visible = T.min(self.t, T.int64(1)) if spec.causal == "upper_left" else self.t
        panels = v.let(T.floordiv(visible + (n - 1), T.int64(n)))
        with v.span(begin, end) as task:
            b, kv = v.let(T.floordiv(task, T.int64(spec.kh))), v.let(T.floormod(task, T.int64(spec.kh)))
            for g in range(self.group):
                h = kv * self.group + g
                v.store(query, [g * width + width - n], v.const(0, n), n)
                v.sweep(
                    spec.head_dim,
                    n,
                    lambda s, m, _, g=g, h=h: v.store(query, [g * width + s], self.load("q", b, h, 0, s, m), m),
                )
            with T.serial(self.group) as g:
                h = kv * self.group + g
                self.fill_bias(bias, T.int64(0), b, h, T.int64(0), T.int64(0), visible)
                row = g * vectors * n
                high = self._scores(b, kv, query, g * width, panels, scores, row, bias)
                acc = B.alloc_buffer((n,), "float32")
                v.store(acc, [0], v.const(0, n), n)
                with T.serial(panels) as j:
                    p = exp2(v.let(v.load(scores, [row + j * n], n) - v.splat(high, n)), n)
                    v.store(scores, [row + j * n], p, n)
                    v.store(acc, [0], v.load(acc, [0], n) + p, n)
                v.store(total, [g], v.reduce_lanes(v.let(v.load(acc, [0], n)), n, v.add), 1)
            pieces = [(s, min(n, spec.dv - s)) for s in range(0, spec.dv, n)]
            # At most 8 accumulators at a time: AVX2 has 16 registers, and V's vectors need some of them.
            heads = min(self.group, 4)
            step = max(1, 8 // heads)
            for g in range(0, self.group, heads):
                for i in range(0, len(pieces), step):
                    self._values(
                        b, kv, g, min(heads, self.group - g), pieces[i : i + step], visible, vectors, scores, total
                    )

    def _scores(self, b: Any, kv: Any, query: Any, q0: Any, panels: Any, scores: Any, row: Any, bias: Any) -> Any:
        """Masked scores in base 2 of one query, and their maximum."""
        spec, n = self.spec, self.lanes
        d = spec.head_dim
        highs = B.alloc_buffer((n,), "float32")
        acc = B.alloc_buffer((n * n,), "float32")
        v.store(highs, [0], v.const(LOWEST, n), n)
        with T.serial(panels) as j:
            keys = [T.min(j * n + lane, self.t - 1) for lane in range(n)]
            for lane in range(n):
                v.store(acc, [lane * n], v.const(0, n), n)

            def chunk(start: Any, m: int) -> None:
                q = v.let(v.load(query, [q0 + start], n))
                for lane, key in enumerate(keys):
                    k = self.load("k", b, kv, key, start, m)
                    if m < n:
                        # The query is 0 beyond its end; what stands against it there does not matter.
                        k = T.Shuffle([v.let(k)] * -(-n // m), list(range(n)))
                    v.store(acc, [lane * n], v.fma(k, q, v.load(acc, [lane * n], n)), n)

            with T.serial(d // n) as c:
                chunk(c * n, n)
            if d % n:
                chunk(d - d % n, d % n)
            sums = [v.let(v.load(acc, [lane * n], n)) for lane in range(n)]
            parts = n
            while parts > 1:
                sums = [_fold(sums[i], sums[i + 1], n, parts) for i in range(0, len(sums), 2)]
                parts //= 2
            factor = v.const(spec.scale_value * math.log2(math.e), n)
            s = v.let(v.fma(sums[0], factor, v.load(bias, [j * n], n)))
            v.store(scores, [row + j * n], s, n)
            v.store(highs, [0], T.max(v.load(highs, [0], n), s), n)
        return v.reduce_lanes(v.let(v.load(highs, [0], n)), n, T.max)

    def _values(
        self, b: Any, kv: Any, g: int, heads: int, pieces: list, visible: Any, vectors: Any, scores: Any, total: Any
    ) -> None:
        """``o = sum_j p_j v_j / total`` for some heads of the group and some vectors of the value."""
        n = self.lanes
        # Few accumulators would wait for each other: take several keys at a time, each with its own.
        unroll = max(1, 8 // (heads * len(pieces)))
        acc = B.alloc_buffer((unroll * heads * len(pieces) * n,), "float32")

        def at(u: int, i: int, c: int) -> int:
            return ((u * heads + i) * len(pieces) + c) * n

        def key(j: Any, u: int) -> None:
            row = [v.let(self.load("v", b, kv, j, s, m)) for s, m in pieces]
            for i in range(heads):
                p = v.let(scores[(g + i) * vectors * n + j])
                for c, (_, m) in enumerate(pieces):
                    old = v.load(acc, [at(u, i, c)], m)
                    v.store(acc, [at(u, i, c)], v.fma(v.splat(p, m), row[c], old), m)

        for u in range(unroll):
            for i in range(heads):
                for c, (_, m) in enumerate(pieces):
                    v.store(acc, [at(u, i, c)], v.const(0, m), m)
        full = T.floordiv(visible, T.int64(unroll))
        with T.serial(full) as block:
            for u in range(unroll):
                key(block * unroll + u, u)
        if unroll > 1:
            with T.serial(visible - full * unroll) as rest:
                key(full * unroll + rest, 0)
        for i in range(heads):
            sum_p = total[g + i]
            inverse = v.let(T.float32(1) / T.Select(sum_p == T.float32(0), T.float32(1), sum_p))
            for c, (s, m) in enumerate(pieces):
                value = v.load(acc, [at(0, i, c)], m)
                for u in range(1, unroll):
                    value = value + v.load(acc, [at(u, i, c)], m)
                index = [b, 0, (kv * self.group + (g + i)) * self.spec.dv + s]
                v.store(self.names["o"], index, value * v.splat(inverse, m), m)


def _fold(a: Any, b: Any, lanes: int, parts: int) -> Any:
    """Halve the partial sums per key: ``parts`` of each of ``lanes / parts`` keys, those of ``a`` before those of ``b``."""
    half = parts // 2
    first = [key * parts + i for key in range(2 * lanes // parts) for i in range(half)]
    return v.let(T.Shuffle([a, b], first) + T.Shuffle([a, b], [i + half for i in first]))
