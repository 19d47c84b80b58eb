"""The code of `rowwise.CudaRowwise`: a row in the registers of a block, reductions, rotation, quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.butterflies_code import Butterflies
from qcompile.codegen.kernels.cuda.rotation import ARRIVED
from qcompile.codegen.kernels.cuda.rotation_code import WarpRotate
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise
from qcompile.targets.cuda import CudaTarget

MAGIC = 12582912.0
"""1.5 2^23: adding it to a number below 2^22 rounds that to an integer, half to even, in the low bits of the sum."""

NEAR = 2.0**-14
"""More than what ``v (1 / s)`` can differ from ``v / s`` where that is below 2^7: four roundings, 2^7 2 2^-23. Not much more:
one element of a warp that is nearer to a tie makes all of it divide."""

LEAST, TRIES = 2.0**-10, 12
"""Rows whose largest element is less than that, times what it is multiplied with, are multiplied with more; how often at most."""


def emit(kind: CudaRowwise, name: str, target: CudaTarget) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        _Kernel(kind, target).emit()
    return builder.get()


class _Kernel(WarpRotate, Butterflies):
    """Names of one kernel while it is written; ``most`` rows at once, if blocks take several."""

    def __init__(self, kind: CudaRowwise, target: CudaTarget) -> None:
        self.k, self.dtype = kind, kind.dtype
        self.blocks = kind.shares
        self.most = max(1, kind.resident * target.multiprocessors // self.blocks)
        self.stmatrix = target.has("cluster")

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
        launched = T.min(m, self.most) if k.rotation else m
        self.rank: Any = 0
        if self.blocks > 1:
            self.row, self.rank = T.cta_id([launched, self.blocks])
        else:
            self.row = T.cta_id([launched])
        self.tx = T.thread_id([k.threads])
        self.arena, self.row_at = e.shared(k.shared_bytes), k.row_at
        self.reductions, self.parity = 0, 0
        if k.rotation:
            self._rotate_rows(m, launched)
            return
        e.start()
        self.value = e.Registers((k.chunks, k.vector), "float32")
        self._load()
        self._normalise()
        self._store_values()
        if k.quantize:
            if k.hadamard:
                self._rotate()
            self._quantize()

    def _store_values(self) -> None:
        k = self.k
        if self.y is not None:
            self._each(lambda c, at: self._write(self.y, at, [self.value[c, i] for i in range(k.vector)], k.out))

    # Elements

    def _each(self, use: Any, otherwise: Any = None) -> None:
        """Call ``use(chunk, column)`` for every vector of this thread inside the row."""
        for c in range(self.k.chunks):
            place, conditions = self.k.place(c, self.tx, self.rank)
            at = e.let(place)
            if not conditions:
                use(c, at)
                continue
            with T.If(e.all_of(conditions)):
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
        """Over the block, or all blocks of the row; zero must be neutral, and maxima not negative. Every reduction has scratch of
        its own, and those of two rows that follow each other have, so that one barrier is enough."""
        warps = self.k.threads // 32
        used = warps * self.blocks
        if operator == "max":
            value = T.reinterpret("float32", e.largest_of_warp(T.reinterpret("uint32", value)))
        value = e.let(value if operator == "max" else T.cuda.warp_reduce(value, operator))
        if used == 1:
            return value
        place = self.k.scratch_at + self.reductions * self.k.slots
        if self.k.rotation:
            place = self.k.scratch_at + (2 * self.reductions + self.parity) * self.k.slots
        self.reductions += 1
        lane, word = self.tx % 32, T.reinterpret("uint32", value)
        if self.blocks > 1:
            with T.If(lane < self.blocks), T.Then():
                there = e.let(self._remote(lane))
                slot = T.cast((place + self.rank * warps + self.tx // 32) * 4, "uint32")
                e.store_remote(there + slot, word, there + e.u32(8 * (ARRIVED + self.reductions)))
            T.evaluate(T.cuda.mbarrier_wait(self._barrier(ARRIVED + self.reductions), self.parity))
        else:
            with T.If(lane == 0), T.Then():
                B.buffer_store(self.arena, word, [place + self.tx // 32])
            T.evaluate(T.cuda.cta_sync())
        if operator == "max":  # of words: NaN counts as largest
            part, zero = e.Registers((1,), "uint32"), e.u32(0)
        else:
            part, zero = e.Registers((1,), "float32"), T.float32(0)
        part[0] = zero
        for start in range(0, used, 32):

            def add(start: int = start) -> None:
                other = self.arena[place + lane + start]
                part[0] = T.max(part[0], other) if operator == "max" else part[0] + T.reinterpret("float32", other)

            if start + 32 <= used:
                add()
            else:
                with T.If(lane < used - start), T.Then():
                    add()
        if operator == "max":
            return e.let(T.reinterpret("float32", e.largest_of_warp(part[0])))
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
        """Rows of this block one after another. A row whose sums leave float16's range, or come near its lower end, is computed
        again, times another power of two."""
        k = self.k
        w = self.rotation = k.rotation
        e.share_device()
        self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
        if self.blocks > 1:
            self._start_barriers(k.barriers)
        self._prepare_signs()
        self.value = e.Registers((k.chunks, 8), "float32")
        self.words = e.Registers((k.chunks, 4), "uint32")
        row, parity, tries = (e.Registers((1,), "int32") for _ in range(3))
        scale = e.Registers((1,), "float32")
        row[0], parity[0], tries[0], scale[0] = self.row, T.int32(0), T.int32(0), T.float32(1)
        e.await_previous()
        if w.config.ahead:
            self._load_words(row[0])
        if self.blocks > 1:
            self._await_others()
        with T.While(row[0] < m):
            self.row, self.parity, self.reductions = e.let(row[0]), e.let(parity[0]), 0
            following = e.let(self.row + launched)
            parity[0] = 1 - self.parity
            if self.blocks > 1:
                self._expect(k.barriers)
            if not k.direct:
                self._load()
                self._normalise()
                self._store_values()
            elif not w.config.ahead:
                self._load_words(self.row)
            self._rotate_vectors(scale[0])
            if w.config.ahead:
                with T.If(following < m), T.Then():
                    self._load_words(following)
            largest = self._largest()
            with T.If(self._again(largest, scale, tries)):
                with T.Then():
                    if w.config.ahead:
                        self._load_words(self.row)
                with T.Else():
                    self._quantize_rotated(largest, scale[0])
                    row[0], tries[0], scale[0] = following, T.int32(0), T.float32(1)
            if w.radix > 1 and w.config.twice:
                T.evaluate(T.cuda.cta_sync())

    def _load_words(self, row: Any) -> None:
        """Elements as they are."""

        def load(c: int, at: Any) -> None:
            for i, word in enumerate(self._read_words(self.x, [row, at], 4)):
                self.words[c, i] = word

        self._each(load)

    def _rotate_vectors(self, scale: Any) -> None:
        """All but the third product."""
        k, w = self.k, self.rotation
        words = self.words
        if k.direct:
            with T.If(scale != T.float32(1)), T.Then():
                factor = e.pair(scale, scale, "float16")
                for c in range(k.chunks):
                    for i in range(4):
                        e.ptx("mul.rn.f16x2", words[c, i], words[c, i], factor)

        def rotate(turn: int, task: Any) -> None:
            start = turn * w.held
            for c in range(start, start + w.held):
                if not k.direct:
                    scaled = [self.value[c, i] * scale for i in range(8)]
                    for i in range(4):
                        words[c, i] = e.pair(scaled[2 * i], scaled[2 * i + 1], "float16")
            self._butterflies(words, start)
            for c in range(w.held):
                result = self._transform([words[start + c, i] for i in range(4)])
                if w.radix > 1:
                    self._put(task * w.held + c, [result[i] for i in range(4)])
                else:
                    for i in range(8):
                        self.value[start + c, i] = result[i]

        for turn in range(w.rounds):
            _, conditions = k.place(turn * w.held, self.tx, self.rank)
            task = e.let(self.rank * w.share + turn * w.config.warps + self.warp)
            if not conditions:
                rotate(turn, task)
            else:
                with T.If(e.all_of(conditions)), T.Then():
                    rotate(turn, task)
        if w.radix > 1:
            if self.blocks > 1:
                T.evaluate(T.cuda.mbarrier_wait(self._barrier(ARRIVED), self.parity))
            else:
                T.evaluate(T.cuda.cta_sync())
            turns = 1 if w.config.twice else w.piece_rounds
            self.products = e.Registers((turns * 2 * w.tiles, 8), "float32")

    def _multiply_points(self, turn: int, block: Any, part: Any, quad: Any) -> int:
        """The third product of a piece; the first index of its results."""
        w = self.rotation
        first = 0 if w.config.twice else turn * 2 * w.tiles
        self._product(self.products, first, block, part, quad)
        return first

    def _largest(self) -> Any:
        """The row's largest absolute value, before the factors that are left."""
        w = self.rotation
        largest = e.Registers((4,), "float32")
        for i in range(4):
            largest[i] = T.float32(0)

        def grow(values: e.Registers, index: int) -> None:
            for i in range(8):  # NaN counts as largest
                e.ptx("max.NaN.f32", largest[i % 4], largest[i % 4], T.abs(values[index, i]))

        def piece(turn: int, block: Any, part: Any, quad: Any) -> None:
            first = self._multiply_points(turn, block, part, quad)
            for h in range(-(-w.radix // 8)):
                grow(self.products, first + h)

        if w.radix > 1:
            self._pieces(piece)
        else:
            self._each(lambda c, at: grow(self.value, c))
        for i, other in ((0, 1), (2, 3), (0, 2)):
            e.ptx("max.NaN.f32", largest[i], largest[i], largest[other])
        return self._reduce(largest[0], "max")

    def _again(self, largest: Any, scale: e.Registers, tries: e.Registers) -> Any:
        """Whether the row must be computed again, and with which factor. Float16 rows leave the range upwards only: their small
        elements lose no more than they had lost. A row of zeros is known by being zero times 2^64, too."""
        bits = e.let(T.reinterpret("uint32", largest))  # in the order of the numbers, NaN last
        infinite = bits >= e.u32(0x7F800000)
        factor = T.float32(2.0**-8)
        again = e.Registers((1,), "int32")
        if self.k.direct:
            again[0] = T.Select(T.And(tries[0] == 0, infinite), T.int32(1), T.int32(0))
        else:
            zero, small = bits == e.u32(0), bits < e.u32(int(np.float32(LEAST).view(np.uint32)))
            unknown = T.And(small, T.Not(T.And(zero, scale[0] > T.float32(1))))
            again[0] = T.Select(T.And(tries[0] < TRIES, T.Or(infinite, unknown)), T.int32(1), T.int32(0))
            factor = T.Select(zero, T.float32(2.0**64), T.Select(small, T.float32(2.0**20), T.float32(2.0**-20)))
        factor = e.let(factor)
        with T.If(again[0] == 1), T.Then():
            scale[0] = scale[0] * factor
            tries[0] = tries[0] + 1
        return again[0] == 1

    def _quantize_rotated(self, largest: Any, scale: Any) -> None:
        """Codes from one rounding of products with the inverse of the step."""
        k, w = self.k, self.rotation
        exponent = self.exponent + (self.point_exponent if w.radix > 1 else 0)
        undone = T.reinterpret(
            "float32", e.u32(0x7F000000) - T.reinterpret("uint32", scale)
        )  # 1 / scale, a power of two
        factor = e.let(T.float32(2.0**exponent / np.sqrt(w.order)) * undone)
        top = (1 << k.bits - 1) - 1
        step, inverse = e.Registers((1,), "float32"), e.Registers((1,), "float32")
        if self.static is not None:
            low, high, zero = -top - 1 - k.zero_point, top - k.zero_point, k.zero_point
            step[0] = self.static[0]
            e.ptx("div.rn.f32", inverse[0], factor, step[0])
        else:
            low, high, zero = -top, top, 0
            e.ptx("rcp.approx.ftz.f32", inverse[0], largest)
            inverse[0] = T.Select(largest == T.float32(0), T.float32(0), inverse[0] * T.float32(top / k.clip))
        bounded = self.static is not None or k.clip < 1
        number = e.Registers((1,), "float32")

        def store(values: e.Registers, index: int, at: Any) -> None:
            codes = e.Registers((8,), "uint32")
            for i in range(8):
                if bounded:
                    number[0] = T.max(T.min(values[index, i] * inverse[0], T.float32(high)), T.float32(low))
                    number[0] = number[0] + T.float32(MAGIC)
                else:
                    e.ptx("fma.rn.f32", number[0], values[index, i], inverse[0], T.float32(MAGIC))
                codes[i] = T.reinterpret("uint32", number[0]) + e.u32(zero & 0xFFFFFFFF)
            self._store_bytes(self.codes, self.row, at, [codes[i] for i in range(8)])

        def piece(turn: int, block: Any, part: Any, quad: Any) -> None:
            first = self._multiply_points(turn, block, part, quad) if w.config.twice else turn * 2 * w.tiles
            start = e.let(w.column(block, self.lane // 4, part, quad) + self.lane % 4 * 8)
            for h in range(-(-w.radix // 8)):
                if 8 * h + 8 <= w.radix:
                    store(self.products, first + h, start + 8 * h * w.stride)
                    continue
                with T.If(self.lane // 4 < w.radix - 8 * h), T.Then():
                    store(self.products, first + h, start + 8 * h * w.stride)

        if w.radix > 1:
            self._pieces(piece)
        else:
            self._each(lambda c, at: store(self.value, c, at))
        with T.If(self.tx == 0 if self.blocks == 1 else T.And(self.tx == 0, self.rank == 0)), T.Then():
            if self.static is None:
                e.ptx("div.rn.f32", step[0], largest * factor * T.float32(k.clip), T.float32(top))
                step[0] = T.Select(step[0] == T.float32(0), T.float32(1), step[0])
            B.buffer_store(self.scale, step[0], [self.row])

    # Quantizer

    def _quantize(self) -> None:
        """Codes from products with 1 / step; where one is near a tie, the whole thread divides, as ``QuantizePerToken``
        does, and stores again: the products differ from quotients by less than `NEAR`."""
        k, value = self.k, self.value
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

            self._each(grow)
            most = self._reduce(largest[0], "max")
            e.ptx("div.rn.f32", step[0], most * T.float32(k.clip), T.float32(top))
            step[0] = T.Select(step[0] == T.float32(0), T.float32(1), step[0])
        with T.If(self.tx == 0), T.Then():
            B.buffer_store(self.scale, step[0], [self.row])
        e.ptx("div.rn.f32", inverse[0], T.float32(1), step[0])
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
            self._store_vector(code, c, at)

        def divide(c: int, at: Any) -> None:
            for i in range(size):
                e.ptx("div.rn.f32", q[0], value[c, i], step[0])
                rounded[0] = bound(q[0]) + T.float32(MAGIC)
                code[c, i] = T.reinterpret("uint32", rounded[0]) + e.u32(zero & 0xFFFFFFFF)
            self._store_vector(code, c, at)

        self._each(multiply)
        with T.If(farthest[0] > T.float32(0.5 - NEAR)), T.Then():
            self._each(divide)

    def _store_vector(self, code: e.Registers, c: int, at: Any) -> None:
        """Codes of neighbours, one byte each."""
        if self.k.vector == 1:
            B.buffer_store(self.codes, T.cast(T.cast(code[c, 0], "int32"), "int8"), [self.row, at])
            return
        self._store_bytes(self.codes, self.row, at, [code[c, i] for i in range(self.k.vector)])
