"""The code of `rowwise.CudaRowwise`: a row in the registers of a block, reductions, rotation, quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.butterflies_code import Butterflies
from qcompile.codegen.kernels.cuda.rotation_code import WarpRotate
from qcompile.codegen.kernels.cuda.rowwise import SCRATCH, CudaRowwise

MAGIC = 12582912.0
"""1.5 2^23: adding it to a number below 2^22 rounds that to an integer, half to even, in the low bits of the sum."""

NEAR = 2.0**-14
"""More than what ``v (1 / s)`` can differ from ``v / s`` where that is below 2^7: four roundings, 2^7 2 2^-23. Not much more:
one element of a warp that is nearer to a tie makes all of it divide."""


def emit(kind: CudaRowwise, name: str, multiprocessors: int) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        _Kernel(kind, kind.resident * multiprocessors).emit()
    return builder.get()


class _Kernel(WarpRotate, Butterflies):
    """Names of one kernel while it is written; ``most`` blocks at once, if each takes several rows."""

    def __init__(self, kind: CudaRowwise, most: int) -> None:
        self.k, self.dtype, self.most = kind, kind.dtype, most

    def emit(self) -> None:
        k = self.k
        m = T.int32()
        self.x = e.argument("x", (m, k.width * (2 if k.gated else 1)), k.dtype)
        self.gamma = e.argument("gamma", (k.width,), "float32") if k.gamma else None
        self.beta = e.argument("beta", (k.width,), "float32") if k.beta else None
        self.static = e.argument("static_scale", (1,), "float32") if k.quantize == "tensor" else None
        self.y = e.argument("y", (m, k.width), k.out) if k.out else None
        self.codes = e.argument("codes", (m, k.width), "int8") if k.quantize else None
        self.scale = e.argument("scale", (m,), "float32") if k.quantize else None
        T.device_entry()
        launched = T.min(m, self.most) if k.persistent else m
        self.row = T.cta_id([launched])
        self.tx = T.thread_id([k.threads])
        e.start()
        self.arena = e.shared(k.shared_bytes)
        self.reductions, self.parity = 0, T.int32(0)
        self.value = e.Registers((k.chunks, k.vector), "float32")
        if k.rotation:
            self.rotation = k.rotation
            self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
            self._prepare_signs(k.direct)
            if k.direct:
                self._rotate_rows(m, launched)
                return
        self._load()
        self._normalise()
        if self.y is not None:
            self._each(lambda c, at: self._write(self.y, at, [self.value[c, i] for i in range(k.vector)], k.out))
        if k.rotation:
            self._rotate_warps(None)
        elif k.quantize:
            if k.hadamard:
                self._rotate()
            self._quantize(self.value, self._each, self._store_vector, 1.0)

    # Elements

    def _each(self, use: Any, otherwise: Any = None) -> None:
        """Call ``use(chunk, column)`` for every vector of this thread inside the row."""
        for c in range(self.k.chunks):
            place, inside = self.k.place(c, self.tx)
            at = e.let(place)
            if inside is True:
                use(c, at)
                continue
            with T.If(inside):
                with T.Then():
                    use(c, at)
                if otherwise is not None:
                    with T.Else():
                        otherwise(c)

    def _read(self, buffer: Any, index: list[Any], dtype: str) -> list[Any]:
        """A vector as float32."""
        k = self.k
        if k.vector == 1:
            return [T.cast(buffer[tuple(index)], "float32")]
        words = self._read_words(buffer, index, k.vector if dtype == "float32" else k.vector // 2)
        if dtype == "float32":
            return [T.reinterpret("float32", w) for w in words]
        if dtype == "bfloat16":
            halves = [
                (words[i // 2] << e.u32(16)) if i % 2 == 0 else words[i // 2] & e.u32(0xFFFF0000)
                for i in range(k.vector)
            ]
            return [T.reinterpret("float32", h) for h in halves]
        halves = [T.cast(words[i // 2] >> e.u32(16 * (i % 2)), "uint16") for i in range(k.vector)]
        return [T.cast(T.reinterpret("float16", h), "float32") for h in halves]

    def _read_words(self, buffer: Any, index: list[Any], count: int) -> list[Any]:
        """``count`` words from an element on, up to four at a time."""
        words = e.Registers((count,), "uint32")
        size = min(count, 4)
        elements = self.k.vector * size // count
        for part in range(count // size):
            place = buffer.ptr_to([*index[:-1], index[-1] + part * elements])
            e.ptx(f"ld.global.nc.v{size}.b32", *[words[part * size + i] for i in range(size)], place)
        return [words[i] for i in range(count)]

    def _write(self, buffer: Any, at: Any, values: list[Any], dtype: str) -> None:
        if self.k.vector == 1:
            B.buffer_store(buffer, T.cast(values[0], dtype), [self.row, at])
            return
        if dtype == "float32":
            words = [T.reinterpret("uint32", v) for v in values]
        else:
            words = [e.pair(values[i], values[i + 1], dtype) for i in range(0, len(values), 2)]
        for start in range(0, len(words), 4):
            part = words[start : start + 4]
            place = buffer.ptr_to([self.row, at + start * len(values) // len(words)])
            e.ptx(f"st.global.v{len(part)}.b32", place, *part)

    def _load(self) -> None:
        k = self.k
        gate = e.Registers((1,), "float32")
        nothing = Epilogue(activation=k.activation)

        def zero(c: int) -> None:
            for i in range(k.vector):
                self.value[c, i] = T.float32(0)

        def load(c: int, at: Any) -> None:
            values = self._read(self.x, [self.row, at], k.dtype)
            others = self._read(self.x, [self.row, at + k.width], k.dtype) if k.gated else None
            for i, v in enumerate(values):
                gate[0] = v
                if not k.norm:
                    gate[0] = e.activate(gate[0], nothing)
                self.value[c, i] = gate[0] * others[i] if others is not None else gate[0]

        self._each(load, zero)

    def _reduce(self, value: Any, operator: str) -> Any:
        """Over the block; zero must be neutral. Every reduction has scratch of its own, and those of two rows that follow each
        other have, so that one barrier is enough."""
        warps = self.k.threads // 32
        value = e.let(T.cuda.warp_reduce(value, operator))
        if warps == 1:
            return value
        place = (self.reductions + self.parity) * SCRATCH
        self.reductions += 1
        lane = self.tx % 32
        with T.If(lane == 0), T.Then():
            B.buffer_store(self.arena, T.reinterpret("uint32", value), [place + self.tx // 32])
        T.evaluate(T.cuda.cta_sync())
        part = e.Registers((1,), "float32")
        part[0] = T.float32(0)
        with T.If(lane < warps), T.Then():
            part[0] = T.reinterpret("float32", self.arena[place + lane])
        return e.let(T.cuda.warp_reduce(part[0], operator))

    def _sum(self, term: Any) -> Any:
        """Of ``term(value)`` over the row."""
        k = self.k
        total = e.Registers((1,), "float32")
        total[0] = T.float32(0)

        def add(c: int, at: Any) -> None:
            for i in range(k.vector):
                total[0] = total[0] + term(self.value[c, i])

        self._each(add)
        return self._reduce(total[0], "sum")

    def _normalise(self) -> None:
        k = self.k
        if not k.norm:
            return
        inverse = T.float32(1.0 / k.width)
        if k.norm == "layer":
            mean = e.let(self._sum(lambda v: v) * inverse)
            for c in range(k.chunks):
                for i in range(k.vector):
                    self.value[c, i] = self.value[c, i] - mean
        factor = e.let(T.float32(1) / T.sqrt(self._sum(lambda v: v * v) * inverse + T.float32(k.epsilon)))

        def scale(c: int, at: Any) -> None:
            gamma = self._read(self.gamma, [at], "float32") if self.gamma is not None else None
            beta = self._read(self.beta, [at], "float32") if self.beta is not None else None
            for i in range(k.vector):
                v = self.value[c, i] * factor
                v = v * gamma[i] if gamma is not None else v
                self.value[c, i] = v + beta[i] if beta is not None else v
                self.value[c, i] = e.activate(self.value[c, i], Epilogue(activation=k.activation))

        self._each(scale)

    # Rotation by tensor cores

    def _rotate_rows(self, m: Any, launched: Any) -> None:
        """Rows of this block one after another; the next one is loaded while the one before is finished."""
        k = self.k
        words = e.Registers((k.chunks, 4), "uint32")

        def load(c: int, at: Any) -> None:
            for i, word in enumerate(self._read_words(self.x, [self.following, at], 4)):
                words[c, i] = word

        def zero(c: int) -> None:
            for i in range(4):
                words[c, i] = e.u32(0)

        first = self.following = self.row
        self._each(load, zero)
        if not k.persistent:
            self._rotate_warps(words)
            return
        count = e.let((m - first + (launched - 1)) // launched)
        with T.serial(count) as turn:
            self.row = e.let(first + turn * launched)
            self.following = e.let(self.row + launched)
            self.parity = e.let(turn % 2)

            def load_next() -> None:
                with T.If(self.following < m), T.Then():
                    self._each(load)

            self.reductions = 0
            self._rotate_warps(words, load_next)

    def _rotate_warps(self, words: Any, loaded: Callable[[], None] = lambda: None) -> None:
        """Rotate and quantize; the scale of the orthonormal transform is that of the steps, not of every element. ``loaded`` is
        called where ``words`` are free again."""
        k, w = self.k, self.rotation
        factor = float(1 / np.sqrt(w.order))
        scratch = 3 * SCRATCH
        for turn in range(w.rounds):
            start = turn * w.held
            for c in range(start, start + w.held):
                self._transform(e.View(self.value, c), None if words is None else e.View(words, c))
            self._butterflies(self.value, start)
            if w.radix > 1:
                for c in range(start, start + w.held):
                    place, inside = k.place(c, self.tx)
                    values = [self.value[c, i] for i in range(8)]
                    if inside is True:
                        self._put(place, values, scratch)
                    else:
                        with T.If(inside), T.Then():
                            self._put(place, values, scratch)
        loaded()
        if w.radix == 1:
            self._quantize(self.value, self._each, self._store_vector, factor)
            return
        T.evaluate(T.cuda.cta_sync())
        column = self._column()
        points = self._pass_columns(column, scratch)

        def every(use: Any, otherwise: Any = None) -> None:
            for r in range(w.radix):
                use(r, column + r * w.stride)

        def store(code: e.Registers, r: int, at: Any) -> None:
            self._store_bytes(self.codes, self.row, at, [code[r, v] for v in range(w.neighbours)])

        self._quantize(points, every, store, factor)

    # Quantizer

    def _quantize(self, value: e.Registers, each: Any, store: Any, factor: float) -> None:
        """Codes from products with 1 / step; where one is near a tie, the whole thread divides, as ``QuantizePerToken``
        does, and stores again: the products differ from quotients by less than `NEAR`.

        Args:
            value: registers ``[piece, element]``. each: calls a function with every piece inside the row and its column.
            store: of the codes of a piece.
            factor: what values have yet to be multiplied with.
        """
        k = self.k
        pieces, size = value.shape
        top = (1 << k.bits - 1) - 1
        step, inverse = e.Registers((1,), "float32"), e.Registers((1,), "float32")
        if self.static is not None:
            step[0] = self.static[0]
            low, high, zero = -top - 1 - k.zero_point, top - k.zero_point, k.zero_point
        else:
            low, high, zero = -top, top, 0
            largest = e.Registers((1,), "float32")
            largest[0] = T.float32(0)

            def grow(c: int, at: Any) -> None:
                for i in range(size):
                    largest[0] = T.max(largest[0], T.abs(value[c, i]))

            each(grow)
            most = self._reduce(largest[0], "max") * T.float32(factor)
            e.ptx("div.rn.f32", step[0], most * T.float32(k.clip), T.float32(top))
            step[0] = T.Select(step[0] == T.float32(0), T.float32(1), step[0])
        with T.If(self.tx == 0), T.Then():
            B.buffer_store(self.scale, step[0], [self.row])
        e.ptx("div.rn.f32", inverse[0], T.float32(factor), step[0])
        bounded = self.static is not None or k.clip < 1
        code = e.Registers((pieces, size), "uint32")
        farthest = e.Registers((1,), "float32")
        farthest[0] = T.float32(0)
        rounded, q = e.Registers((1,), "float32"), e.Registers((1,), "float32")

        def bound(number: Any) -> Any:
            return T.max(T.min(number, T.float32(high)), T.float32(low)) if bounded else number

        def multiply(c: int, at: Any) -> None:
            for i in range(size):
                q[0] = bound(value[c, i] * inverse[0])
                rounded[0] = q[0] + T.float32(MAGIC)
                code[c, i] = T.reinterpret("uint32", rounded[0]) + e.u32(zero & 0xFFFFFFFF)
                farthest[0] = T.max(farthest[0], T.abs(q[0] - (rounded[0] - T.float32(MAGIC))))
            store(code, c, at)

        def divide(c: int, at: Any) -> None:
            for i in range(size):
                e.ptx("div.rn.f32", q[0], value[c, i] * T.float32(factor), step[0])
                rounded[0] = bound(q[0]) + T.float32(MAGIC)
                code[c, i] = T.reinterpret("uint32", rounded[0]) + e.u32(zero & 0xFFFFFFFF)
            store(code, c, at)

        each(multiply)
        with T.If(farthest[0] > T.float32(0.5 - NEAR)), T.Then():
            each(divide)

    def _store_vector(self, code: e.Registers, c: int, at: Any) -> None:
        """Codes of neighbours, one byte each."""
        if self.k.vector == 1:
            B.buffer_store(self.codes, T.cast(T.cast(code[c, 0], "int32"), "int8"), [self.row, at])
            return
        self._store_bytes(self.codes, self.row, at, [code[c, i] for i in range(self.k.vector)])
