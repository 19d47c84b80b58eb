"""The code of `quantized_attention.CudaQuantizedAttention`: the loop of `attention_code`, operands of bytes."""

from __future__ import annotations

from math import log2
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.attention import KEYS, QUERIES
from qcompile.codegen.kernels.cuda.attention_code import LOWEST, THREADS, AttentionLoop
from qcompile.codegen.kernels.cuda.quantized_attention import TOP, CudaQuantizedAttention

PRODUCT = {
    "int8": "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    "binary": "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc",
}
"""Both take 32 bytes of a row."""

FLOAT8 = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"


def emit(kind: CudaQuantizedAttention, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        _Kernel(kind).emit()
    return builder.get()


class _Kernel(AttentionLoop):
    """Names of one kernel while it is written."""

    def __init__(self, kind: CudaQuantizedAttention) -> None:
        self.k = kind
        self.value_depth = kind.value_dim

    def _lay_out(self) -> None:
        k = self.k
        self.pitch = (k.depth_bytes + 16) // 4
        self.value_pitch = (2 * k.value_dim + 16) // 4 if k.values == "float16" else (KEYS + 16) // 4
        self.place = {"q": 0, "k": QUERIES * self.pitch, "v": (QUERIES + KEYS) * self.pitch}

    def _parameters(self) -> None:
        k = self.k
        self.batch, self.length, self.keys = T.int32(), T.int32(), T.int32()
        shapes = {"q": (self.batch, k.heads, self.length), "k": (self.batch, k.kv_heads, self.keys)}
        self.codes, self.steps = {}, {}
        for name, shape in shapes.items():
            self.codes[name] = e.argument(name, (*shape, k.row_bytes), "int8")
            self.steps[name] = e.argument(f"{name}_scale", shape, "float32")
        if k.values == "float16":
            self.v = e.argument("v", (self.batch, k.kv_heads, self.keys, k.value_dim), "float16")
        else:
            self.v = e.argument("v", (self.batch, k.kv_heads, k.value_dim, T.int32()), "int8")
            self.v_scale = e.argument("v_scale", (self.batch, k.kv_heads, k.value_dim), "float32")
        self.out = e.argument("y", (self.batch, self.length, k.heads * k.value_dim), k.out)

    # Shared memory

    def _prepare(self) -> None:
        """Queries of the block, and the scales of this thread's two."""
        k = self.k
        unused = (k.depth_bytes - 2 * k.row_bytes) // 4 if k.scores == "binary" else 0
        if unused:  # zeros behind the queries make what lies behind the keys not count
            for p in range(-(-QUERIES * unused // THREADS)):
                index = e.let(p * THREADS + self.tx)
                with T.If(index < QUERIES * unused), T.Then():
                    at = index // unused * self.pitch + k.row_bytes // 2 + index % unused
                    B.buffer_store(self.arena, e.u32(0), [at])
        self.kv_head = e.let(self.head // (k.heads // k.kv_heads))
        self._load_rows("q", self.head, self.first, self.length)
        self.query_step = e.Registers((2,), "float32")
        for a in range(2):
            i = T.min(self.first + self.warp * 16 + self.lane // 4 + a * 8, self.length - 1)
            factor = T.float32(k.scale * log2(2.718281828459045))
            self.query_step[a] = self.steps["q"][self.batch_index, self.head, i] * factor

    def _load_tile(self, start: Any) -> None:
        self._load_rows("k", self.kv_head, start, self.keys)
        if self.k.values == "float16":
            source = lambda row, c: self.v.ptr_to([self.batch_index, self.kv_head, start + row, c // 2])  # noqa: E731
            self._pieces(KEYS, 2 * self.k.value_dim, "v", self.value_pitch, source, lambda row: start + row < self.keys)
        else:
            source = lambda row, c: self.v.ptr_to([self.batch_index, self.kv_head, row, start + c])  # noqa: E731
            self._pieces(self.k.value_dim, KEYS, "v", self.value_pitch, source, None)

    def _load_rows(self, name: str, head: Any, first: Any, count: Any) -> None:
        """64 queries or keys; bits with their complements behind them."""
        buffer = self.codes[name]
        source = lambda row, c: buffer.ptr_to([self.batch_index, head, first + row, c])  # noqa: E731
        self._pieces(KEYS, self.k.row_bytes, name, self.pitch, source, lambda row: first + row < count)

    def _pieces(self, rows: int, width: int, name: str, pitch: int, source: Any, inside: Any) -> None:
        """Rows of ``width`` bytes in pieces of 16 or 8; zeros where they are not ``inside``."""
        size = 16 if width % 16 == 0 else 8
        per, words = width // size, size // 4
        total = rows * per

        def move(index: Any) -> None:
            row, column = e.let(index // per), e.let(index % per * size)
            piece = e.Registers((words,), "uint32")
            for c in range(words):
                piece[c] = e.u32(0)
            load = lambda: e.ptx(  # noqa: E731
                f"ld.global.nc.v{words}.b32", *[piece[c] for c in range(words)], source(row, column)
            )
            if inside is None:
                load()
            else:
                with T.If(inside(row)), T.Then():
                    load()
            at = e.let(self.place[name] + row * pitch + column // 4)
            store = f"st.shared.v{words}.b32"
            e.ptx(store, self.arena.ptr_to([at]), *[piece[c] for c in range(words)])
            if name != "v" and self.k.scores == "binary":
                for c in range(words):
                    piece[c] = T.bitwise_xor(piece[c], e.u32(0xFFFFFFFF))
                e.ptx(store, self.arena.ptr_to([at + width // 4]), *[piece[c] for c in range(words)])

        e.spread(total, THREADS, self.tx, move)

    # One tile of keys

    def _step(self, start: Any) -> None:
        k = self.k
        sums = e.Registers((KEYS // 8, 4), "uint32")
        for n in range(KEYS // 8):
            for c in range(4):
                sums[n, c] = e.u32(0)
        name = PRODUCT["binary" if k.scores == "binary" else "int8"]
        self._products(sums, k.depth_bytes // 32, name)
        scores = e.Registers((KEYS // 8, 4), "float32")
        for n in range(KEYS // 8):
            for h in range(2):
                j = e.let(start + n * 8 + self.lane % 4 * 2 + h)
                step = e.let(self.steps["k"][self.batch_index, self.kv_head, T.min(j, self.keys - 1)])
                for a in range(2):
                    i = self.first + self.warp * 16 + self.lane // 4 + a * 8
                    dot = T.reinterpret("int32", sums[n, 2 * a + h])
                    if k.scores == "binary":
                        dot = dot * 2 - k.head_dim
                    allowed = T.And(j < self.keys, j <= i) if k.causal else j < self.keys
                    value = T.cast(dot, "float32") * step * self.query_step[a]
                    scores[n, 2 * a + h] = T.Select(allowed, value, T.float32(LOWEST))
        self._normalise(scores)
        if k.values == "float16":
            self._add_values(scores)
        else:
            self._add_values_float8(scores)

    def _add_values_float8(self, powers: Any) -> None:
        """Probabilities times 448 as e4m3, by transposed values."""
        p, v = e.Registers((4,), "uint32"), e.Registers((4,), "uint32")
        half = e.Registers((2,), "uint16")
        top = T.float32(TOP)
        for s in range(KEYS // 32):
            for r in range(4):
                a, second = r % 2, r // 2
                for pair in range(2):
                    n = 4 * s + 2 * second + pair
                    low, high = powers[n, 2 * a] * top, powers[n, 2 * a + 1] * top
                    e.ptx("cvt.rn.satfinite.e4m3x2.f32", half[pair], high, low)
                p[r] = T.cast(half[0], "uint32") | T.cast(half[1], "uint32") << e.u32(16)
            for d in range(self.value_depth // 16):
                # Matrices of eight channels: bytes 0..15 and 16..31 of the keys, then of the next eight channels.
                row = d * 16 + self.lane // 16 * 8 + self.lane % 8
                at = self.place["v"] + row * self.value_pitch + s * 8 + self.lane // 8 % 2 * 4
                e.read_matrices([v[c] for c in range(4)], self.arena.ptr_to([at]))
                for h in range(2):
                    sums = [self.total[2 * d + h, c] for c in range(4)]
                    e.ptx(FLOAT8, *sums, *[p[c] for c in range(4)], v[2 * h], v[2 * h + 1], *sums)

    def _value_factor(self, column: Any) -> Any:
        """What an output channel is multiplied with, or None."""
        if self.k.values == "float16":
            return None
        return self.v_scale[self.batch_index, self.kv_head, column] * T.float32(1 / TOP)
