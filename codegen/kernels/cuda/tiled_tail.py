"""How a block of `tiled.TiledLinear` ends: sums over splits of K, epilogue, and the stored tile."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.linear_code import LinearCode
from qcompile.codegen.kernels.cuda.tiled import TiledShape


class Tail(LinearCode):
    """The end of a kernel; `tiled_code` sets the names it uses."""

    s: TiledShape
    sum_type: str
    total: e.Registers
    tile: list[Any]
    dequantizers: list[Any]
    m: Any
    bx: Any
    by: Any
    tx: Any
    lane: Any
    base: Any
    rows: Any
    first_row: Any
    first_tile: Any
    arena: Any
    partial: Any
    arrived: Any
    column: Any
    bias: Any
    residual: Any
    x_scale: Any
    out: Any

    def _reduce(self) -> None:
        """Partial sums to memory; the last block to arrive adds them in order and stores the tile."""
        s = self.s
        span = s.threads * s.sums
        place = e.let(self.bx * (s.split * span) + self.tx)
        for j in range(s.mt):
            for c in range(s.rows // 2):
                value = self.total[j, c]
                if self.sum_type == "uint32":
                    value = T.reinterpret("float32", value)
                at = place + self.by * span + (j * (s.rows // 2) + c) * s.threads
                B.buffer_store(self.partial, value, [at])
        T.evaluate(T.cuda.thread_fence())
        T.evaluate(T.cuda.cta_sync())
        ticket = e.Registers((1,), "int32")
        ticket[0] = T.int32(0)
        with T.If(self.tx == 0), T.Then():
            ticket[0] = T.cuda.atomic_add(self.arrived.ptr_to([self.bx]), T.int32(1))
        last = e.let(T.cast(T.cuda.syncthreads_or(T.cast(ticket[0] == s.split - 1, "int32")), "int32"))
        with T.If(last != 0), T.Then():
            T.evaluate(T.cuda.thread_fence())
            with T.If(self.tx == 0), T.Then():
                B.buffer_store(self.arrived, T.int32(0), [self.bx])
            zero = T.uint32(0) if self.sum_type == "uint32" else T.float32(0)
            for j in range(s.mt):
                for c in range(s.rows // 2):
                    self.total[j, c] = zero
            with T.serial(s.split) as part:
                for j in range(s.mt):
                    for c in range(s.rows // 2):
                        word = e.Registers((1,), "uint32")
                        at = place + part * span + (j * (s.rows // 2) + c) * s.threads
                        e.ptx("ld.global.cg.b32", word[0], self.partial.ptr_to([at]))
                        value = word[0] if self.sum_type == "uint32" else T.reinterpret("float32", word[0])
                        self.total[j, c] = self.total[j, c] + value
            self._store()

    def _reduce_cluster(self) -> None:
        """Sums to shared memory; every block of the cluster adds up and stores its share of the tile."""
        s = self.s
        T.evaluate(T.cuda.cta_sync())
        self.first_channel = e.let(self.first_tile * 16)
        for j in range(s.mt):
            for c in range(s.rows // 2):
                i, octet, a, h = c // 8, c // 4 % 2, c // 2 % 2, c % 2
                value = self.total[j, c]
                if self.sum_type == "float32":
                    value = T.reinterpret("uint32", value)
                channel = self._channel(j, a) - self.first_channel
                B.buffer_store(self.arena, value, [self.base + self._row(i, octet, h) * s.sum_pitch + channel])
        self._meet()
        mine = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([self.base]))
        places = e.Registers((s.split,), "uint32")
        for part in range(s.split):
            e.ptx("mapa.shared::cluster.u32", places[part], mine, e.u32(part))
        across = s.columns // 4
        share = -(-s.rows * across // s.split)
        with T.serial(-(-share // s.threads)) as p:
            within = e.let(p * s.threads + self.tx)
            index = e.let(self.by * share + within)
            row, channel = e.let(index // across), e.let(index % across * 4)
            n = e.let(self.first_channel + channel)
            with T.If(T.And(within < share, T.And(row < self.rows, n < s.n))), T.Then():
                self._add_up(places, row, channel, n)
        self._meet()  # the others may still be reading

    def _meet(self) -> None:
        """Of all threads of the cluster."""
        e.ptx("barrier.cluster.arrive.release.aligned")
        e.ptx("barrier.cluster.wait.acquire.aligned")

    def _add_up(self, places: Any, row: Any, channel: Any, n: Any) -> None:
        """Four neighbouring channels of one row of the tile."""
        s = self.s
        sums, words = e.Registers((4,), self.sum_type), e.Registers((4,), "uint32")
        at = e.let(T.cast((row * s.sum_pitch + channel) * 4, "uint32"))
        for part in range(s.split):
            e.ptx("ld.shared::cluster.v4.b32", *[words[c] for c in range(4)], places[part] + at)
            for c in range(4):
                value = words[c] if self.sum_type == "uint32" else T.reinterpret("float32", words[c])
                sums[c] = value if part == 0 else sums[c] + value
        here = e.let(self.first_row + row)
        values = []
        for c in range(4):
            own = e.let(T.min(n + c, s.n - 1))
            bias = self.bias[own] if self.bias is not None else None
            values.append(self._finished(sums[c], here, own, self._factor(own), bias))
        if s.n % 4:
            for c in range(4):
                with T.If(n + c < s.n), T.Then():
                    B.buffer_store(self.out, T.cast(values[c], s.out), [here, n + c])
        elif s.out == "float32":
            e.ptx("st.global.v4.b32", self.out.ptr_to([here, n]), *[T.reinterpret("uint32", v) for v in values])
        else:
            pairs = [e.pair(values[c], values[c + 1], s.out) for c in (0, 2)]
            e.ptx("st.global.v2.b32", self.out.ptr_to([here, n]), *pairs)

    def _sync(self) -> None:
        """Wait for all threads that hold sums."""
        T.evaluate(T.cuda.cta_sync())

    def _store(self, groups: range | None = None) -> None:
        """Scale, add, round; transpose 16-bit results through shared memory; store. ``groups`` of 16 rows: all by default."""
        s = self.s
        groups = range(s.rows // 16) if groups is None else groups
        self._sync()
        self.first_channel = e.let(self.first_tile * 16)
        for j in range(s.mt):
            column = e.Registers((2,), "float32")
            bias = e.Registers((2,), "float32")
            for a in range(2):
                n = T.min(self._channel(j, a), s.n - 1)
                column[a] = self._factor(n)
                if self.bias is not None:
                    bias[a] = self.bias[n]
            for i in groups:
                words = e.Registers((4,), "uint32")
                for octet in range(2):
                    for a in range(2):
                        values = [self._value(j, i, octet, a, h, column, bias) for h in range(2)]
                        if s.out == "float32":
                            self._store_pair(j, i, octet, a, values)
                        else:
                            words[2 * octet + a] = e.pair(*values, s.out)
                if s.out != "float32":
                    self._transpose(j, i - groups.start, words)
        if s.out != "float32":
            self._sync()
            self._write(16 * groups.start, 16 * len(groups))

    def _channel(self, j: int, a: int) -> Any:
        """Of this thread's sums in channel tile j."""
        return self.first_channel + self.tile[j] * 16 + a * 8 + self.lane // 4

    def _row(self, i: int, octet: int, h: int) -> Any:
        """Of this thread's sums, counted in the block."""
        return (16 * i + 8 * octet + h) + self.lane % 4 * 2

    def _store_pair(self, j: int, i: int, octet: int, a: int, values: list[Any]) -> None:
        """Float32 results: eight lanes hold 32 neighbouring bytes, which memory takes as they are."""
        n = self._channel(j, a)
        for h in range(2):
            row = self._row(i, octet, h)
            with T.If(T.And(row < self.rows, n < self.s.n)), T.Then():
                B.buffer_store(self.out, values[h], [self.first_row + row, n])

    def _value(self, j: int, i: int, octet: int, a: int, h: int, column: Any, bias: Any) -> Any:
        """One finished element, float32."""
        s = self.s
        value = self.total[j, (2 * i + octet) * 4 + 2 * a + h]
        row = T.min(self.first_row + self._row(i, octet, h), self.m - 1)
        return self._finished(value, row, T.min(self._channel(j, a), s.n - 1), column[a], bias[a])

    def _finished(self, value: Any, row: Any, n: Any, column: Any, bias: Any) -> Any:
        """A sum of channel ``n`` scaled, with its epilogue."""
        if self.sum_type == "uint32":
            value = T.cast(T.reinterpret("int32", value), "float32")
        value = value * column
        if self.x_scale is not None:
            value = value * self._row_factor(row)
        if self.bias is not None:
            value = value + bias
        y = e.Registers((1,), "float32")
        y[0] = value
        y[0] = e.activate(y[0], self.epilogue)
        if self.residual is not None:
            y[0] = y[0] + T.cast(self.residual[row, n], "float32")
        return y[0]

    def _factor(self, n: Any) -> Any:
        """Of the sums of a channel."""
        return self.column[n] * T.float32(1 if self.s.narrow else 2.0 ** self.dequantizers[0].exponent)

    def _row_factor(self, row: Any) -> Any:
        """Of the sums of a row."""
        return self.x_scale[row]

    def _transpose(self, j: int, i: int, words: Any) -> None:
        """16 channels x 16 rows, the i-th that are stored, into rows of the tile in shared memory."""
        s = self.s
        channel = self.tile[j] * 16
        if s.wgmma:  # stmatrix is as old as wgmma
            row = self.lane // 16 * 8 + self.lane % 8 + 16 * i
            at = self.base + row * (s.pitch // 4) + (channel + self.lane // 8 % 2 * 8) // 2
            e.ptx(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
                self.arena.ptr_to([at]),
                *[words[c] for c in range(4)],
            )
            return
        # Two lanes with neighbouring channels (g, g ^ 1) exchange halves, so that each stores whole words.
        odd = e.let(self.lane // 4 % 2)
        for c in range(4):
            octet, a = c // 2, c % 2
            mine = words[c]
            other = e.Registers((1,), "uint32")
            e.ptx("shfl_sync.bfly.b32", other[0], mine, e.u32(4), e.u32(31), e.u32(0xFFFFFFFF))
            word = e.Registers((1,), "uint32")
            select = T.Select(odd == 1, e.u32(0x3276), e.u32(0x5410))
            e.ptx("prmt.b32", word[0], mine, other[0], select)
            row = self.lane % 4 * 2 + odd + (16 * i + 8 * octet)
            at = self.base + row * (s.pitch // 4) + (channel + 8 * a) // 2 + self.lane // 8
            B.buffer_store(self.arena, word[0], [at])

    def _write(self, first: int, count: int) -> None:
        """``count`` rows of the block from ``first`` on; they begin the tile in shared memory."""
        s = self.s
        if s.n % 8 == 0:
            per = s.columns // 8
            with T.serial(-(-count * per // s.threads)) as p:
                index = e.let(p * s.threads + self.tx)
                row, n = e.let(index // per), e.let(self.first_channel + index % per * 8)
                with T.If(T.And(T.And(row < count, first + row < self.rows), n < s.n)), T.Then():
                    words = e.Registers((4,), "uint32")
                    at = self.base + row * (s.pitch // 4) + index % per * 4
                    e.read_shared([words[c] for c in range(4)], self.arena.ptr_to([at]))
                    target = self.out.ptr_to([self.first_row + first + row, n])
                    e.ptx("st.global.v4.b32", target, *[words[c] for c in range(4)])
            return
        with T.serial(-(-count * s.columns // s.threads)) as p:
            index = e.let(p * s.threads + self.tx)
            row, column = e.let(index // s.columns), e.let(index % s.columns)
            inside = T.And(row < count, first + row < self.rows)
            with T.If(T.And(inside, self.first_channel + column < s.n)), T.Then():
                word = self.arena[self.base + row * (s.pitch // 4) + column // 2]
                half = T.cast(T.Select(column % 2 == 1, word >> e.u32(16), word), "uint16")
                value = T.reinterpret(s.out, half)
                B.buffer_store(self.out, value, [self.first_row + first + row, self.first_channel + column])
