"""The code of `attention.CudaAttention`: scores, running softmax and product with the values, key tile by key tile."""

from __future__ import annotations

from math import log2
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.attention import KEYS, QUERIES, CudaAttention

THREADS = 128
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
LOWEST = -1e30
"""Stands for minus infinity where two of them would be subtracted."""


def emit(kind: CudaAttention, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        _Kernel(kind).emit()
    return builder.get()


class AttentionLoop:
    """The loop over tiles of keys. Kernels say how operands come into shared memory and become scores."""

    k: Any
    value_depth: int
    batch: Any
    length: Any
    keys: Any
    out: Any
    pitch: int
    value_pitch: int
    place: dict[str, int]

    def emit(self) -> None:
        k = self.k
        self._parameters()
        T.device_entry()
        blocks = (self.length + (QUERIES - 1)) // QUERIES
        self.block, self.head, self.batch_index = T.cta_id([blocks, k.heads, self.batch])
        self.tx = T.thread_id([THREADS])
        e.start()
        self.arena = e.shared(k.shared_bytes)
        self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
        self.first = e.let(self.block * QUERIES)
        self._lay_out()
        self.total = e.Registers((self.value_depth // 8, 4), "float32")
        self.peak, self.sum = e.Registers((2,), "float32"), e.Registers((2,), "float32")
        for i in range(self.value_depth // 8):
            for c in range(4):
                self.total[i, c] = T.float32(0)
        for a in range(2):
            self.peak[a], self.sum[a] = T.float32(LOWEST), T.float32(0)
        self._prepare()
        keys = T.min(self.keys, self.first + QUERIES) if k.causal else self.keys
        with T.serial((keys + (KEYS - 1)) // KEYS) as step:
            start = e.let(step * KEYS)
            T.evaluate(T.cuda.cta_sync())
            self._load_tile(start)
            T.evaluate(T.cuda.cta_sync())
            self._step(start)
        self._store()

    def _parameters(self) -> None:
        raise NotImplementedError

    def _lay_out(self) -> None:
        """Places and pitches of operands in shared memory, words."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """What comes before the loop: queries into shared memory."""
        raise NotImplementedError

    def _load_tile(self, start: Any) -> None:
        """Keys and values of a tile into shared memory."""
        raise NotImplementedError

    def _step(self, start: Any) -> None:
        """A tile: scores, `_normalise`, product with the values."""
        raise NotImplementedError

    def _value_factor(self, column: Any) -> Any:
        """What an output channel is multiplied with, or None."""
        return None

    def _products(self, scores: Any, steps: int, instruction: str) -> None:
        """Queries of a warp by the keys of a tile, 32 bytes of a row at a time."""
        q, b = e.Registers((4,), "uint32"), e.Registers((4,), "uint32")
        row = self.lane % 8
        for depth in range(steps):
            # Matrices of q: rows 0..7 and 8..15, then the same eight columns on.
            at = (self.warp * 16 + self.lane // 8 % 2 * 8 + row) * self.pitch + depth * 8 + self.lane // 16 * 4
            e.read_matrices([q[c] for c in range(4)], self.arena.ptr_to([self.place["q"] + at]))
            for n in range(KEYS // 16):
                # Matrices of k: two halves of K of eight keys, then of the next eight.
                at = (n * 16 + self.lane // 16 * 8 + row) * self.pitch + depth * 8 + self.lane // 8 % 2 * 4
                e.read_matrices([b[c] for c in range(4)], self.arena.ptr_to([self.place["k"] + at]))
                for h in range(2):
                    sums = [scores[2 * n + h, c] for c in range(4)]
                    e.ptx(instruction, *sums, *[q[c] for c in range(4)], b[2 * h], b[2 * h + 1], *sums)

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
            for i in range(self.value_depth // 8):
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
            for d in range(self.value_depth // 16):
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
                    values = []
                    for h in range(2):
                        factor = self._value_factor(n * 8 + self.lane % 4 * 2 + h)
                        values.append(self.total[n, 2 * a + h] * (share if factor is None else share * factor))
                    at = self.out.ptr_to([self.batch_index, i, column])
                    if k.out == "float32":
                        e.ptx("st.global.v2.b32", at, *[T.reinterpret("uint32", v) for v in values])
                    else:
                        e.ptx("st.global.b32", at, e.pair(*values, k.out))


class _Kernel(AttentionLoop):
    """Names of one kernel while it is written."""

    def __init__(self, kind: CudaAttention) -> None:
        self.k = kind
        self.value_depth = kind.value_depth

    def _lay_out(self) -> None:
        k = self.k
        self.pitch, self.value_pitch = (2 * k.depth + 16) // 4, (2 * k.value_depth + 16) // 4
        self.place = {"q": 0, "k": QUERIES * self.pitch, "v": (QUERIES + KEYS) * self.pitch}

    def _prepare(self) -> None:
        self._clear_padding()
        self._load("q", self.head, self.first, self.length, self.k.head_dim, self.pitch)

    def _load_tile(self, start: Any) -> None:
        k = self.k
        kv_head = e.let(self.head // (k.heads // k.kv_heads))
        self._load("k", kv_head, start, self.keys, k.head_dim, self.pitch)
        self._load("v", kv_head, start, self.keys, k.value_dim, self.value_pitch)

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

        def move(index: Any) -> None:
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

        e.spread(total, THREADS, self.tx, move)

    # One tile of keys

    def _step(self, start: Any) -> None:
        k = self.k
        scores = e.Registers((KEYS // 8, 4), "float32")
        for n in range(KEYS // 8):
            for c in range(4):
                scores[n, c] = T.float32(0)
        self._products(scores, k.depth // 16, MMA)
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
