"""Rows that tensor cores transform in float16: the loop over rows of a block, what a row is multiplied with to stay in range, codes.

`rotated_code` and `kronecker_code` say how a row is transformed; `rowwise_code` reads, normalises and reduces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.cluster_code import Cluster
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise

MAGIC = 12582912.0
"""1.5 2^23: adding it to a number below 2^22 rounds that to an integer, half to even, in the low bits of the sum."""

LEAST, TRIES = 2.0**-10, 12
"""Rows whose largest element is less than that, times what it is multiplied with, are multiplied with more; how often at most."""

Store = Callable[[e.Registers, Any, list[Any], Any], None]
"""Takes codes from registers: eight results by register array and first index, what must hold, and their first column."""


class ScaledRows(Cluster, ABC):
    """The loop over rows of a block; `rowwise_code` sets the names it uses."""

    k: CudaRowwise
    row: Any
    row_at: int
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
    _multiply_factor: Callable[[], None]

    # What a transform does

    @abstractmethod
    def _begin(self) -> None:
        """Before anything that the kernel before wrote is read."""

    def _meet(self) -> None:
        """Before the first row is transformed."""

    def _incoming(self) -> Any:
        """Bytes of a row that blocks which share it exchange."""
        return e.u32(0)

    def _begin_row(self) -> None:
        """Before a row is loaded."""

    @abstractmethod
    def _take(self, scale: Any) -> None:
        """The part of the transform after which registers that held the row as it was are free."""

    @abstractmethod
    def _transformed(self, grow: Callable[[e.Registers, int], None]) -> None:
        """The rest; ``grow`` is given every eight results, by register array and first index."""

    @abstractmethod
    def _results(self, store: Store) -> None:
        """Give all results to ``store``, with their places."""

    def _end_row(self) -> None:
        """After the codes of a row."""

    @abstractmethod
    def _unit(self) -> Any:
        """What results are to be multiplied with, but for what the row was multiplied with."""

    # The loop

    def _transform_rows(self, m: Any, launched: Any) -> None:
        """Rows of this block one after another. A row whose sums leave float16's range, or come near its lower end, is computed
        again, times another power of two."""
        k = self.k
        e.share_device()
        self.lane, self.warp = e.let(self.tx % 32), e.let(self.tx // 32)
        if self.blocks > 1:
            self._start_barriers(k.barriers)
        self._begin()
        self.value = e.Registers((k.chunks, k.vector), "float32")
        self.words = e.Registers((k.chunks, max(1, k.vector // 2)), "uint32")
        row, turn, tries = (e.Registers((1,), "int32") for _ in range(3))
        scale = e.Registers((1,), "float32")
        row[0], turn[0], tries[0], scale[0] = self.row, T.int32(0), T.int32(0), T.float32(1)
        e.await_previous()
        if k.ahead:
            self._load_words(row[0])
        self._meet()
        if self.blocks > 1:
            self._await_others()
        with T.While(row[0] < m):
            self.row, self.parity, self.reductions = e.let(row[0]), e.let(turn[0] % 2), 0
            self.phase = e.let(turn[0] // 2 % 2)
            following = e.let(self.row + launched)
            turn[0] = turn[0] + 1
            if self.blocks > 1:
                self._expect(self._incoming(), k.common, k.told)
            self._begin_row()
            if not k.direct:
                self._load()
                self._normalise()
                self._store_values()
                self._multiply_factor()
            elif not k.ahead:
                self._load_words(self.row)
            if k.direct:
                self._scale_words(scale[0])
            self._take(scale[0])
            if k.ahead:
                with T.If(following < m), T.Then():
                    self._load_words(following)
            largest = self._largest()
            with T.If(self._again(largest, scale, tries)):
                with T.Then():
                    if k.ahead:
                        self._load_words(self.row)
                with T.Else():
                    self._quantize_scaled(largest, scale[0])
                    row[0], tries[0], scale[0] = following, T.int32(0), T.float32(1)
            self._end_row()

    def _load_words(self, row: Any) -> None:
        """Elements as they are."""

        def load(c: int, at: Any) -> None:
            for i, word in enumerate(self._read_words(self.x, [row, at], self.k.vector // 2)):
                self.words[c, i] = word

        self._each(load)

    def _scale_words(self, scale: Any) -> None:
        """Elements as they are, times a power of two."""
        with T.If(scale != T.float32(1)), T.Then():
            factor = e.pair(scale, scale, "float16")
            for c in range(self.k.chunks):
                for i in range(self.k.vector // 2):
                    e.ptx("mul.rn.f16x2", self.words[c, i], self.words[c, i], factor)

    def _half_words(self, chunk: int, scale: Any) -> list[Any]:
        """A vector of this thread as words of two float16, times ``scale``."""
        k = self.k
        if not k.direct:
            scaled = [self.value[chunk, i] * scale for i in range(k.vector)]
            for i in range(max(1, k.vector // 2)):
                self.words[chunk, i] = e.pair(scaled[2 * i], scaled[min(2 * i + 1, k.vector - 1)], "float16")
        return [self.words[chunk, i] for i in range(max(1, k.vector // 2))]

    def _largest(self) -> Any:
        """The row's largest absolute value, before the factors that are left."""
        largest = e.Registers((4,), "float32")
        for i in range(4):
            largest[i] = T.float32(0)

        def grow(values: e.Registers, index: int) -> None:
            for i in range(8):  # NaN counts as largest
                e.ptx("max.NaN.f32", largest[i % 4], largest[i % 4], T.abs(values[index, i]))

        self._transformed(grow)
        for i, other in ((0, 1), (2, 3), (0, 2)):
            e.ptx("max.NaN.f32", largest[i], largest[i], largest[other])
        return self._reduce(largest[0], "max")

    def _again(self, largest: Any, scale: e.Registers, tries: e.Registers) -> Any:
        """Whether the row must be computed again, and with which factor. Float16 rows leave the range upwards only: their small
        elements lose no more than they had lost. A row of zeros is known by being zero times 2^64, too."""
        bits = e.let(T.reinterpret("uint32", largest))  # in the order of the numbers, NaN last
        infinite = bits >= e.u32(0x7F800000)
        factor = T.float32(2.0**-10)
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

    # Codes

    def _quantize_scaled(self, largest: Any, scale: Any) -> None:
        """Codes from one rounding of products with the inverse of the step."""
        k = self.k
        undone = T.reinterpret(
            "float32", e.u32(0x7F000000) - T.reinterpret("uint32", scale)
        )  # 1 / scale, a power of two
        factor = e.let(self._unit() * undone)
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

        def store(values: e.Registers, index: Any, conditions: list[Any], at: Any) -> None:
            codes = e.Registers((8,), "uint32")
            for i in range(8):
                if bounded:
                    number[0] = T.max(T.min(values[index, i] * inverse[0], T.float32(high)), T.float32(low))
                    number[0] = number[0] + T.float32(MAGIC)
                else:
                    e.ptx("fma.rn.f32", number[0], values[index, i], inverse[0], T.float32(MAGIC))
                codes[i] = T.reinterpret("uint32", number[0]) + e.u32(zero & 0xFFFFFFFF)
            self._store_codes([codes[i] for i in range(8)], conditions, at)

        self._results(store)
        with T.If(self.tx == 0 if self.blocks == 1 else T.And(self.tx == 0, self.rank == 0)), T.Then():
            if self.static is None:
                e.ptx("div.rn.f32", step[0], largest * factor * T.float32(k.clip), T.float32(top))
                step[0] = T.Select(step[0] == T.float32(0), T.float32(1), step[0])
            B.buffer_store(self.scale, step[0], [self.row])

    def _store_codes(self, codes: list[Any], conditions: list[Any], at: Any) -> None:
        """Eight neighbours."""
        if conditions:
            with T.If(e.all_of(conditions)), T.Then():
                e.store_bytes(self.codes.ptr_to([self.row, at]), codes)
        else:
            e.store_bytes(self.codes.ptr_to([self.row, at]), codes)
