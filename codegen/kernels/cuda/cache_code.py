"""The code of `cache.CudaCacheAttention`: a part of the tokens per block, and the merge of the parts."""

from __future__ import annotations

from math import log2
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.attention_code import LOWEST
from qcompile.codegen.kernels.cuda.cache import TOKENS, CudaCacheAttention

THREADS = 128
"""Two for every token of a step, each with half of the channels."""


def emit(kind: CudaCacheAttention, name: str) -> Any:
    """The PrimFunc of the parts."""
    with e.kernel(name) as builder:
        _Kernel(kind).emit()
    return builder.get()


class _Kernel:
    """Names of one kernel while it is written."""

    def __init__(self, kind: CudaCacheAttention) -> None:
        self.k = kind

    def emit(self) -> None:
        k, g, d = self.k, self.k.group, self.k.head_dim
        batch, groups = T.int32(), T.int32()
        row = d * k.bits // 8
        self.q = e.argument("q", (batch, k.heads, d), "float16")
        self.keys = e.argument("k", (batch, k.kv_heads, groups * TOKENS, row), "uint8")
        self.k_meta = e.argument("k_meta", (batch, k.kv_heads, groups, 2, d), "float16")
        self.values = e.argument("v", (batch, k.kv_heads, groups * TOKENS, row), "uint8")
        self.v_meta = e.argument("v_meta", (batch, k.kv_heads, groups * TOKENS, 2), "float16")
        self.lengths = e.argument("lengths", (batch,), "int32")
        self.parts = e.argument("parts", (k.splits, batch, k.heads, d + 2), "float32")
        T.device_entry()
        self.split, self.head, self.b = T.cta_id([k.splits, k.kv_heads, batch])
        self.tx = T.thread_id([THREADS])
        e.start()
        self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
        # Shared memory, in words; a row of codes is padded by one, so that 32 rows are in different banks.
        self.pitch = k.row_words + 1
        sizes = {
            "q": g * d, "scaled": g * d, "k": TOKENS * self.pitch, "v": TOKENS * self.pitch,
            "score": 2 * g * TOKENS, "power": g * TOKENS, "constant": 4 * g, "fade": g, "shift": g,
        }  # fmt: skip
        self.place, end = {}, 0
        for name, size in sizes.items():
            self.place[name], end = end, end + size
        self.arena = e.shared(4 * end)
        self.channels = -(-d // THREADS)
        self.total = e.Registers((self.channels, g), "float32")
        self.peak, self.sum = e.Registers((-(-g // 4),), "float32"), e.Registers((-(-g // 4),), "float32")
        for i in range(self.channels):
            for h in range(g):
                self.total[i, h] = T.float32(0)
        for h in range(-(-g // 4)):
            self.peak[h], self.sum[h] = T.float32(LOWEST), T.float32(0)
        self.length = e.let(self.lengths[self.b])
        steps = e.let((self.length + (TOKENS - 1)) // TOKENS)
        per = e.let((steps + (k.splits - 1)) // k.splits)
        first = e.let(self.split * per)
        self._load_queries()
        with T.serial(T.max(T.min(steps - first, per), 0)) as i:
            self._step(e.let(first + i))
        self._store()

    def _floats(self, name: str, index: Any) -> Any:
        return T.reinterpret("float32", self.arena[self.place[name] + index])

    def _put(self, name: str, index: Any, value: Any) -> None:
        B.buffer_store(self.arena, T.reinterpret("uint32", value), [self.place[name] + index])

    def _load_queries(self) -> None:
        """Times the scale of scores, for powers of two."""
        k, d = self.k, self.k.head_dim
        factor = T.float32(k.scale * log2(2.718281828459045))

        def load(index: Any) -> None:
            value = T.cast(self.q[self.b, self.head * k.group + index // d, index % d], "float32")
            self._put("q", index, value * factor)

        e.spread(k.group * d, THREADS, self.tx, load)
        T.evaluate(T.cuda.cta_sync())

    def _step(self, step: Any) -> None:
        k, g, d = self.k, self.k.group, self.k.head_dim
        start = e.let(step * TOKENS)
        pieces = k.row_words // 4 if k.row_words % 4 == 0 else k.row_words // 2
        words = k.row_words // pieces
        for name, buffer in (("k", self.keys), ("v", self.values)):

            def copy(index: Any, name: str = name, buffer: Any = buffer) -> None:
                token, piece = e.let(index // pieces), e.let(index % pieces)
                loaded = e.Registers((words,), "uint32")
                address = buffer.ptr_to([self.b, self.head, start + token, piece * words * 4])
                e.ptx(f"ld.global.nc.v{words}.b32", *[loaded[c] for c in range(words)], address)
                for c in range(words):
                    at = self.place[name] + token * self.pitch + piece * words + c
                    B.buffer_store(self.arena, loaded[c], [at])

            e.spread(TOKENS * pieces, THREADS, self.tx, copy)
        self._scale_queries(step)
        T.evaluate(T.cuda.cta_sync())
        self._scores()
        T.evaluate(T.cuda.cta_sync())
        for turn in range(-(-g // 4)):
            h = e.let(self.warp + 4 * turn)
            if g % 4 == 0:
                self._normalise(h, turn, start)
            else:
                with T.If(h < g), T.Then():
                    self._normalise(h, turn, start)
        T.evaluate(T.cuda.cta_sync())
        self._add_values()
        T.evaluate(T.cuda.cta_sync())

    def _scale_queries(self, step: Any) -> None:
        """``q s`` of the group's channels, and ``q . l`` by warps."""
        k, g, d = self.k, self.k.group, self.k.head_dim
        sums = e.Registers((g,), "float32")
        for h in range(g):
            sums[h] = T.float32(0)

        def channel(c: Any) -> None:
            scale = e.let(T.cast(self.k_meta[self.b, self.head, step, 0, c], "float32"))
            low = e.let(T.cast(self.k_meta[self.b, self.head, step, 1, c], "float32"))
            for h in range(g):
                query = e.let(self._floats("q", h * d + c))
                self._put("scaled", h * d + c, query * scale)
                sums[h] = sums[h] + query * low

        e.spread(d, THREADS, self.tx, channel)
        for h in range(g):
            whole = e.let(T.cuda.warp_reduce(sums[h], "sum"))
            with T.If(self.lane == 0), T.Then():
                self._put("constant", h * 4 + self.warp, whole)

    def _scores(self) -> None:
        """Of one token per thread, over half of the channels."""
        k, g, d = self.k, self.k.group, self.k.head_dim
        token, half = e.let(self.tx % TOKENS), e.let(self.tx // TOKENS)
        sums = e.Registers((g,), "float32")
        for h in range(g):
            sums[h] = T.float32(0)
        per, count = 32 // k.bits, k.row_words // 2
        with T.serial(count) as i:
            word = e.let(half * count + i)
            codes = e.let(self.arena[self.place["k"] + token * self.pitch + word])
            for c in range(per):
                code = e.let(T.cast((codes >> e.u32(k.bits * c)) & e.u32((1 << k.bits) - 1), "float32"))
                for h in range(g):
                    sums[h] = sums[h] + code * self._floats("scaled", h * d + word * per + c)
        for h in range(g):
            self._put("score", (half * g + h) * TOKENS + token, sums[h])

    def _normalise(self, h: Any, turn: int, start: Any) -> None:
        """Scores of a query to powers relative to its running maximum, which moves on; two tokens to a lane."""
        k, g = self.k, self.k.group
        constant = self._floats("constant", h * 4)
        for w in range(1, 4):
            constant = constant + self._floats("constant", h * 4 + w)
        constant = e.let(constant)
        score = e.Registers((2,), "float32")
        for i in range(2):
            token = e.let(self.lane + 32 * i)
            both = self._floats("score", h * TOKENS + token) + self._floats("score", (g + h) * TOKENS + token)
            score[i] = T.Select(start + token < self.length, both + constant, T.float32(LOWEST))
        peak = e.let(T.max(self.peak[turn], T.cuda.warp_reduce(T.max(score[0], score[1]), "max")))
        fade = e.Registers((1,), "float32")
        e.ptx("ex2.approx.ftz.f32", fade[0], self.peak[turn] - peak)
        self.peak[turn] = peak
        shift, total = e.Registers((1,), "float32"), e.Registers((1,), "float32")
        shift[0], total[0] = T.float32(0), T.float32(0)
        for i in range(2):
            token = e.let(self.lane + 32 * i)
            power = e.Registers((1,), "float32")
            e.ptx("ex2.approx.ftz.f32", power[0], score[i] - peak)
            power[0] = T.Select(score[i] <= T.float32(LOWEST), T.float32(0), power[0])
            total[0] = total[0] + power[0]
            meta = [T.cast(self.v_meta[self.b, self.head, start + token, c], "float32") for c in range(2)]
            self._put("power", h * TOKENS + token, power[0] * meta[0])
            shift[0] = shift[0] + power[0] * meta[1]
        self.sum[turn] = self.sum[turn] * fade[0] + T.cuda.warp_reduce(total[0], "sum")
        whole = e.let(T.cuda.warp_reduce(shift[0], "sum"))
        with T.If(self.lane == 0), T.Then():
            self._put("fade", h, fade[0])
            self._put("shift", h, whole)

    def _add_values(self) -> None:
        """To the sums of one channel per thread."""
        k, g, d = self.k, self.k.group, self.k.head_dim
        per = 32 // k.bits
        for i in range(self.channels):
            channel = e.let(i * THREADS + self.tx)

            def add(i: int = i, channel: Any = channel) -> None:
                for h in range(g):
                    self.total[i, h] = self.total[i, h] * self._floats("fade", h) + self._floats("shift", h)
                word, bit = e.let(channel // per), e.let(T.cast(channel % per * k.bits, "uint32"))
                with T.serial(TOKENS) as token:
                    codes = self.arena[self.place["v"] + token * self.pitch + word]
                    code = e.let(T.cast((codes >> bit) & e.u32((1 << k.bits) - 1), "float32"))
                    for h in range(g):
                        self.total[i, h] = self.total[i, h] + code * self._floats("power", h * TOKENS + token)

            if (i + 1) * THREADS <= d:
                add()
            else:
                with T.If(channel < d), T.Then():
                    add()

    def _store(self) -> None:
        k, g, d = self.k, self.k.group, self.k.head_dim
        first = e.let(self.head * g)
        for i in range(self.channels):
            channel = e.let(i * THREADS + self.tx)
            with T.If(channel < d), T.Then():
                for h in range(g):
                    B.buffer_store(self.parts, self.total[i, h], [self.split, self.b, first + h, channel])
        for turn in range(-(-g // 4)):
            h = e.let(self.warp + 4 * turn)
            with T.If(T.And(h < g, self.lane == 0)), T.Then():
                B.buffer_store(self.parts, self.peak[turn], [self.split, self.b, first + h, d])
                B.buffer_store(self.parts, self.sum[turn], [self.split, self.b, first + h, d + 1])


def emit_merge(kind: CudaCacheAttention, name: str) -> Any:
    """The PrimFunc that merges the parts."""
    k, d = kind, kind.head_dim
    with e.kernel(name) as builder:
        batch = T.int32()
        parts = e.argument("parts", (k.splits, batch, k.heads, d + 2), "float32")
        y = e.argument("y", (batch, k.heads, d), "float16")
        T.device_entry()
        head, b = T.cta_id([k.heads, batch])
        tx = T.thread_id([d])
        e.start()
        peak, total, value, share = (e.Registers((1,), "float32") for _ in range(4))
        peak[0], total[0], value[0] = T.float32(LOWEST), T.float32(0), T.float32(0)
        for s in range(k.splits):
            peak[0] = T.max(peak[0], parts[s, b, head, d])
        for s in range(k.splits):
            e.ptx("ex2.approx.ftz.f32", share[0], parts[s, b, head, d] - peak[0])
            value[0] = value[0] + share[0] * parts[s, b, head, tx]
            total[0] = total[0] + share[0] * parts[s, b, head, d + 1]
        B.buffer_store(y, T.cast(value[0] / T.max(total[0], T.float32(1e-37)), "float16"), [b, head, tx])
    return builder.get()
