"""Rows that tensor cores rotate, in the order of `rowwise_code`: loads, the steps of `rotation`, the largest element, codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.rotation import ARRIVED
from qcompile.codegen.kernels.cuda.rotation_code import WarpRotate
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise

MAGIC = 12582912.0
"""1.5 2^23: adding it to a number below 2^22 rounds that to an integer, half to even, in the low bits of the sum."""

LEAST, TRIES = 2.0**-10, 12
"""Rows whose largest element is less than that, times what it is multiplied with, are multiplied with more; how often at most."""


class RotatedRows(WarpRotate):
    """The loop over rows of a block; `rowwise_code` sets the names it uses."""

    k: CudaRowwise
    blocks: int
    row: Any
    parity: Any
    reductions: int
    value: e.Registers
    words: e.Registers
    x: Any
    codes: Any
    scale: Any
    static: Any
    _load: Callable[[], None]
    _normalise: Callable[[], None]
    _store_values: Callable[[], None]
    _each: Any
    _read_words: Any
    _reduce: Any

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
