"""How a block of `stream.StreamLinear` ends: sums over warps and splits of K, epilogue, stored elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import TILE
from qcompile.codegen.kernels.cuda.linear_code import LinearCode
from qcompile.codegen.kernels.cuda.stream import ROWS
from qcompile.codegen.kernels.cuda.tables import FLOAT8_EXPONENT


class Tail(LinearCode):
    """The end of a kernel; `stream_code` sets the names it uses."""

    sum_type: str
    total: e.Registers
    m: Any
    bx: Any
    by: Any
    bz: Any
    tx: Any
    lane: Any
    warp: Any
    rows: Any
    first_row: Any
    arena: Any
    x_scale: Any
    fetched = False
    """Whether factors of channels and rows are in shared memory."""

    def _finish(self) -> None:
        s = self.s
        T.evaluate(T.cuda.cta_sync())
        per_warp = s.tn * s.mt * 4 * 32
        base = e.let(self.warp * per_warp + self.lane)
        for j in range(s.tn):
            for i in range(s.mt):
                for c in range(4):
                    value = self.total[j, i, c]
                    if self.sum_type == "float32":
                        value = T.reinterpret("uint32", value)
                    B.buffer_store(self.arena, value, [base + ((j * s.mt + i) * 4 + c) * 32])
        T.evaluate(T.cuda.cta_sync())
        rows = self.rows
        passes = e.let((rows * s.columns + (s.threads - 1)) // s.threads)
        if s.split == 1:
            with T.serial(passes) as p:
                self._element(p, rows, lambda row, n, at: self._store(row, n, self._block_sum(at)))
            return
        size = self.m * s.n
        with T.serial(passes) as p:
            self._element(
                p,
                rows,
                lambda row, n, at: B.buffer_store(
                    self.partial, self._bits_to_float(self._block_sum(at)), [self.by * size + row * s.n + n]
                ),
            )
        T.evaluate(T.cuda.thread_fence())
        T.evaluate(T.cuda.cta_sync())
        ticket = e.Registers((1,), "int32")
        ticket[0] = T.int32(0)
        index = self.bz * s.grid_n + self.bx
        with T.If(self.tx == 0), T.Then():
            ticket[0] = T.cuda.atomic_add(self.arrived.ptr_to([index]), T.int32(1))
        last = e.let(T.cast(T.cuda.syncthreads_or(T.cast(ticket[0] == s.split - 1, "int32")), "int32"))
        with T.If(last != 0), T.Then():
            T.evaluate(T.cuda.thread_fence())
            with T.If(self.tx == 0), T.Then():
                B.buffer_store(self.arrived, T.int32(0), [index])
            with T.serial(passes) as p:
                self._element(p, rows, lambda row, n, at: self._store(row, n, self._splits_sum(row, n, size)))

    def _fetch_column(self, count: int, channel: Callable[[Any], Any]) -> None:
        """Start copying the scales of ``count`` channels, which the end of the kernel then need not wait for."""

        def copy(index: Any) -> None:
            n = e.let(channel(index))
            with T.If(n < self.s.n), T.Then():
                e.copy_async(self.arena.ptr_to([self.s.factor_place // 4 + index]), self.column.ptr_to([n]), 4)

        e.spread(count, self.s.threads, self.tx, copy)

    def _element(self, p: Any, rows: Any, use: Any) -> None:
        """Call ``use(row, n, place of the sum in shared memory)`` for one element per thread."""
        s = self.s
        index = e.let(p * s.threads + self.tx)
        r = e.let(index // s.columns)
        column = e.let(index % s.columns)
        n = e.let(self.bx * s.columns + column)
        with T.If(T.And(r < rows, n < s.n)), T.Then():
            wn, j, channel = column // (TILE * s.tn), column // TILE % s.tn, column % TILE
            lane = channel % 8 * 4 + r % ROWS // 2
            c = channel // 8 * 2 + r % 2
            at = (wn * (s.tn * s.mt * 4) + (j * s.mt + r // ROWS) * 4 + c) * 32 + lane
            use(e.let(self.first_row + r), n, e.let(at))

    def _block_sum(self, at: Any) -> Any:
        """Sum over the K warps, as stored by them."""
        s = self.s
        stride = s.nw * s.tn * s.mt * 4 * 32
        total = e.Registers((1,), self.sum_type)
        for wk in range(s.kw):
            word = self.arena[at + wk * stride]
            value = word if self.sum_type == "uint32" else T.reinterpret("float32", word)
            total[0] = value if wk == 0 else total[0] + value
        return total[0]

    def _bits_to_float(self, value: Any) -> Any:
        """Partial sums travel as float32 words; integers keep their bits."""
        return T.reinterpret("float32", value) if self.sum_type == "uint32" else value

    def _splits_sum(self, row: Any, n: Any, size: Any) -> Any:
        s = self.s
        total = e.Registers((1,), self.sum_type)
        for part in range(s.split):
            word = e.Registers((1,), "uint32")
            e.ptx("ld.global.cg.b32", word[0], self.partial.ptr_to([part * size + row * s.n + n]))
            value = word[0] if self.sum_type == "uint32" else T.reinterpret("float32", word[0])
            total[0] = value if part == 0 else total[0] + value
        return total[0]

    def _store(self, row: Any, n: Any, value: Any) -> None:
        s = self.s
        if self.sum_type == "uint32":
            value = T.cast(T.reinterpret("int32", value), "float32")
        value = value * self._factor(0, self.column, n, self.bx * s.columns)
        if s.float8 and s.dtype == "float16":
            value = value * T.float32(2.0**FLOAT8_EXPONENT)
        if self.x_scale is not None:
            value = value * self._factor(s.columns, self.x_scale, row, self.first_row)
        if self.bias is not None:
            value = value + self.bias[n]
        y = e.Registers((1,), "float32")
        y[0] = value
        y[0] = e.activate(y[0], self.epilogue)
        value = y[0]
        if self.residual is not None:
            value = value + T.cast(self.residual[row, n], "float32")
        B.buffer_store(self.out, T.cast(value, s.out), [row, n])

    def _factor(self, place: int, source: Any, index: Any, first: Any) -> Any:
        """Of a channel or row."""
        if not self.fetched:
            return source[index]
        return T.reinterpret("float32", self.arena[self.s.factor_place // 4 + place + index - first])
