"""The code of `persistent.PersistentLinear`: a pipeline over groups of tiles, and the sums of a group."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.persistent import PersistentShape
from qcompile.codegen.kernels.cuda.stream_code import Kernel

ALL = 0xFFFFFFFF


def emit(shape: PersistentShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        PersistentKernel(shape, epilogue).emit()
    return builder.get()


class PersistentKernel(Kernel):
    """Names of one kernel while it is written."""

    s: PersistentShape
    multiply_ones = False

    def emit(self) -> None:
        s = self.s
        self._parameters()
        T.device_entry()
        self.bx, self.bz = T.cta_id([s.launched, self.m])
        self._threads(s.threads, s.overlap)
        self.first_row = self.bz
        self._divide()
        self._fetch_column(s.turns * s.tn * TILE, self._channel)
        self._first_copies()
        self._registers()
        if self.s.overlap:
            e.await_previous()
        self._load_x()
        with T.serial(self.turns) as turn:
            self._clear()
            with T.serial(self.count) as i:
                self.block = e.let(self.start + i)
                self._stage()
            self._keep(turn)
        e.wait(0)
        self._finish()

    def _divide(self) -> None:
        """What this block and this warp take."""
        s = self.s
        self.start = e.let(self.warp * s.per_warp)
        self.count = e.let(T.max(T.min(s.blocks - self.start, s.per_warp), 0))
        self.turns = e.let((s.grid_n - self.bx + (s.launched - 1)) // s.launched)
        self.slots = e.let(self.warp * (s.stages * s.stage_bytes // 4))
        self.matrix = [e.let(half * 16 + self.lane // 8 * 4) for half in range(2)]
        # The next stage to copy: its group of tiles, its block of K, and how many there are left.
        self.next = e.Registers((4,), "int32")
        self.next[0], self.next[1], self.next[2], self.next[3] = (
            self.bx,
            self.start,
            self.turns * self.count,
            T.int32(0),
        )
        self.slot = e.Registers((1,), "int32")
        self.slot[0] = T.int32(0)

    # Pipeline

    def _copy_next(self) -> None:
        """Start copying the next stage, if there is one, and close its group of copies."""
        s = self.s
        with T.If(self.next[2] > 0), T.Then():
            group, block = e.let(self.next[0]), e.let(self.next[1])
            self.tile = [e.let(T.min(group * s.tn + j, s.tiles - 1)) for j in range(s.tn)]
            self._issue_weights(e.let(self.next[3]), block)
            last = e.let(block + 1 == self.start + self.count)
            self.next[0] = T.Select(last, group + s.launched, group)
            self.next[1] = T.Select(last, self.start, block + 1)
            self.next[2] = self.next[2] - 1
            self.next[3] = self._following(self.next[3])
        e.commit()

    def _following(self, slot: Any) -> Any:
        return T.Select(slot == self.s.stages - 1, T.int32(0), slot + 1)

    def _first_copies(self) -> None:
        for _ in range(self.s.stages - 1):
            self._copy_next()

    def _stage(self) -> None:
        s = self.s
        e.wait(s.stages - 2)
        T.evaluate(T.cuda.warp_sync())
        slot = e.let(self.slots + self.slot[0] * (s.stage_bytes // 4))
        self.slot[0] = self._following(self.slot[0])
        self._read_stage(slot)
        self._copy_next()
        self._multiply(slot)

    # The row of x

    def _load_x(self) -> None:
        """x to shared memory, zeros beyond K; with `raw` the sums this warp needs."""
        s = self.s
        pieces = s.row_bytes // 16
        elements = BLOCK // s.chunks
        with T.serial(-(-pieces // s.threads)) as p:
            piece = e.let(p * s.threads + self.tx)
            with T.If(piece < pieces), T.Then():
                words = e.Registers((4,), "uint32")
                for c in range(4):
                    words[c] = e.u32(0)
                with T.If(piece * elements < s.x_width), T.Then():
                    address = self.x.ptr_to([self.first_row, piece * elements])
                    e.ptx("ld.global.v4.b32", *[words[c] for c in range(4)], address)
                at = self.arena.ptr_to([s.row_place // 4 + piece * 4])
                e.ptx("st.shared.v4.b32", at, *[words[c] for c in range(4)])
        T.evaluate(T.cuda.cta_sync())
        if s.raw:
            with T.serial(self.count) as i:
                self._sum_x(e.let(self.start + i))
            T.evaluate(T.cuda.warp_sync())

    def _sum_x(self, block: Any) -> None:
        """Four elements to a lane; a scale group is 8, 16 or 32 lanes."""
        s = self.s
        words = e.Registers((2,), "uint32")
        at = s.row_place // 4 + block * (BLOCK // 2) + self.lane * 2
        e.read_shared([words[c] for c in range(2)], self.arena.ptr_to([at]))
        total, other = e.Registers((1,), "float32"), e.Registers((1,), "float32")
        halves = [T.cast(words[c] >> e.u32(16 * h), "uint16") for c in range(2) for h in range(2)]
        values = [T.cast(T.reinterpret("float16", half), "float32") for half in halves]
        total[0] = (values[0] + values[1]) + (values[2] + values[3])
        lanes = s.chunk // 4
        distance = lanes // 2
        while distance:
            e.ptx("shfl_sync.bfly.b32", other[0], total[0], e.u32(distance), e.u32(31), e.u32(ALL))
            total[0] = total[0] + other[0]
            distance //= 2
        with T.If(self.lane % lanes == 0), T.Then():
            place = s.sums_place // 4 + block * (BLOCK // s.chunk) + self.lane // lanes
            B.buffer_store(self.arena, T.reinterpret("uint32", total[0]), [place])

    def _read_x(self, slot: Any, unit: int) -> None:
        s = self.s
        at = s.row_place // 4 + self.block * (s.chunks * 4) + self.matrix[unit % 2] + unit // 2 * 32
        e.read_matrices([self.xr[unit % self.ahead, 0, c] for c in range(4)], self.arena.ptr_to([at]))

    def _begin_chunk(self, chunk: int) -> None:
        if self.sum_x is not None:
            place = self.s.sums_place // 4 + self.block * (BLOCK // self.s.chunk) + chunk
            value = e.let(T.reinterpret("float32", self.arena[place]))
            for c in range(2):
                self.sum_x[0, c] = value

    # Sums

    def _keep(self, turn: Any) -> None:
        """The sums of this warp to shared memory. All columns of a product are the same row, so the first lane of four has what
        there is."""
        s = self.s
        width = s.tn * TILE
        place = e.let(s.totals_place // 4 + (turn * s.kw + self.warp) * width + self.lane // 4)
        with T.If(self.lane % 4 == 0), T.Then():
            for j in range(s.tn):
                for a in range(2):
                    value = self.total[j, 0, 2 * a]
                    if self.sum_type == "float32":
                        value = T.reinterpret("uint32", value)
                    B.buffer_store(self.arena, value, [place + j * TILE + a * 8])

    def _finish(self) -> None:
        """Add the warps up, in order."""
        s = self.s
        width = s.tn * TILE
        T.evaluate(T.cuda.cta_sync())
        with T.serial(-(-s.turns * width // s.threads)) as p:
            index = e.let(p * s.threads + self.tx)
            turn, channel = e.let(index // width), e.let(index % width)
            n = e.let((self.bx + turn * s.launched) * width + channel)
            with T.If(T.And(turn < self.turns, n < s.n)), T.Then():
                total = e.Registers((1,), self.sum_type)
                for warp in range(s.kw):
                    word = self.arena[s.totals_place // 4 + (turn * s.kw + warp) * width + channel]
                    value = word if self.sum_type == "uint32" else T.reinterpret("float32", word)
                    total[0] = value if warp == 0 else total[0] + value
                self.index = index
                self._store(self.first_row, n, total[0])

    def _channel(self, index: Any) -> Any:
        """The channel of this block's ``index``-th sum."""
        width = self.s.tn * TILE
        return (self.bx + index // width * self.s.launched) * width + index % width

    def _factor(self, place: int, source: Any, index: Any, first: Any) -> Any:
        if place:
            return source[index]  # of the row
        return T.reinterpret("float32", self.arena[self.s.factor_place // 4 + self.index])
