"""The code of `stream.StreamLinear`: pipeline, product, and the ordered reduction."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.dequant import ExactDequantizer, IntegerDequantizer, RawDequantizer, raw_place
from qcompile.codegen.kernels.cuda.layout import BLOCK
from qcompile.codegen.kernels.cuda.linear import FLOAT8
from qcompile.codegen.kernels.cuda.stream import StreamShape
from qcompile.codegen.kernels.cuda.stream_tail import Tail
from qcompile.codegen.kernels.cuda.tables import (
    DualDequantizer,
    Float8Dequantizer,
    PairDequantizer,
    TableDequantizer,
    pairs_of,
)

MMA = {
    "float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "int8": "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    FLOAT8: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
}

ONES = 0x3C003C00
"""A pair of fp16 ones."""


def emit(shape: StreamShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        Kernel(shape, epilogue).emit()
    return builder.get()


class Kernel(Tail):
    """Names of one kernel while it is written.

    Attributes:
        multiply_ones: whether products with ones give the sums of x, where they are needed.
    """

    multiply_ones = True

    def emit(self) -> None:
        s = self.s
        self._parameters()
        T.device_entry()
        rows = s.rows
        self.bx, self.by, self.bz = T.cta_id([s.grid_n, s.split, (self.m + (rows - 1)) // rows])
        self._threads(s.threads, s.overlap)
        self.first_row = e.let(self.bz * rows)
        self._registers()
        self._loop()
        self._finish()

    def _registers(self) -> None:
        s = self.s
        self.grouped = s.scaled or s.raw
        self.sum_type = "uint32" if s.integer and not s.scaled else "float32"
        self.part_type = "uint32" if s.integer else "float32"
        self.total = e.Registers((s.tn, s.mt, 4), self.sum_type)
        self.part = e.Registers((s.tn, s.mt, 4), self.part_type) if self.grouped else self.total
        self.sum_x = e.Registers((s.mt, 4), "float32") if s.raw else None
        self.ahead = 2 if s.mt > 1 or s.narrow else 4
        self.xr = e.Registers((self.ahead, s.mt, 4), "uint32")
        self.w = e.Registers((4,), "uint32")
        self.codes = [e.Registers((s.tn, p.vectors, p.vector // 4), "uint32") for p in s.layout.planes]
        self.scale = e.Registers((s.tn, 2), "float32")
        # Zero points, or the integers of a group.
        self.zero = e.Registers((2,), "uint32") if s.dual or not (s.symmetric or s.raw) else None
        self.meta_words = e.Registers((s.tn, 2), "uint32")
        if s.layout.pairs:
            self.dequantizer: Any = PairDequantizer(lambda place: self.arena[self.table + T.cast(place, "int32")])
            self._fill_table()
        elif s.levels:
            self.dequantizer = TableDequantizer(1, read_table(self.levels, s.table_words))
        elif s.dual:
            self.dequantizer = DualDequantizer(self.zero)
        elif s.narrow:
            self.dequantizer = IntegerDequantizer(s.stored_bits, self.zero)
        elif s.float8:
            self.dequantizer = Float8Dequantizer(s.dtype == "bfloat16")
        elif s.raw:
            self.dequantizer = RawDequantizer(s.weight.bits)
        else:
            self.dequantizer = ExactDequantizer(s.weight.bits, s.dtype == "bfloat16", self.zero)
        self._clear()

    def _clear(self) -> None:
        """The sums."""
        s = self.s
        zero = T.uint32(0) if self.sum_type == "uint32" else T.float32(0)
        for j in range(s.tn):
            for i in range(s.mt):
                for c in range(4):
                    self.total[j, i, c] = zero

    def _fill_table(self) -> None:
        """The table of pairs: every warp computes some of them, every lane stores its copy."""
        s = self.s
        self.table = e.let(self.lane + s.table_place // 4)
        levels = TableDequantizer(2, read_table(self.levels, s.table_words))
        pairs = e.Registers((4,), "uint32")
        warps = s.threads // 32
        with T.serial(-(-64 // warps)) as turn:
            four = e.let(turn * warps + self.warp)
            pairs_of(levels, pairs, T.cast(four, "uint32"))
            with T.If(four < 64), T.Then():
                for r in range(4):
                    B.buffer_store(self.arena, pairs[r], [self.table + four * 128 + 32 * r])
        T.evaluate(T.cuda.cta_sync())

    # Addresses

    def _positions(self) -> None:
        s = self.s
        wn, wk = (self.warp % s.nw, self.warp // s.nw) if s.kw > 1 else (self.warp, T.int32(0))
        if s.nw == 1:
            wn, wk = T.int32(0), self.warp
        self.wn, self.wk = e.let(wn), e.let(wk)
        start = e.let((self.by * s.kw + self.wk) * s.per_warp)
        self.start = start
        self.count = e.let(T.max(T.min(s.blocks - start, s.per_warp), 0))
        base = (self.bx * s.nw + self.wn) * s.tn
        self.tile = [e.let(T.min(base + j, s.tiles - 1)) for j in range(s.tn)]
        self.rows = e.let(T.min(self.m - self.first_row, s.rows))
        self.slots = e.let(self.warp * (s.stages * s.stage_bytes // 4))
        # Chunk c of row r of x lies at c ^ (r % 8), so that eight rows of one chunk are in different banks.
        row = self.lane % 8 if s.rows > 1 else T.int32(0)
        self.matrix = [
            e.let(row * (s.chunks * 4) + T.bitwise_xor(half * 4 + self.lane // 8, row) * 4) for half in range(2)
        ]

    def _slot(self, slot: Any) -> Any:
        return e.let(self.slots + slot * (self.s.stage_bytes // 4))

    def _issue_weights(self, slot: Any, block: Any) -> None:
        """Start copying the codes and metadata of stage ``block`` of this warp into ``slot``."""
        s = self.s
        base = self._slot(slot)
        place = s.x_bytes
        for j in range(s.tn):
            for plane, source in zip(s.layout.planes, self.planes):
                here = e.let((self.tile[j] * s.blocks + block) * plane.block_bytes + self.lane * plane.vector)
                for v in range(plane.vectors):
                    at = base + (place // 4) + self.lane * (plane.vector // 4)
                    e.copy_async(self.arena.ptr_to([at]), source.ptr_to([here + v * 32 * plane.vector]), plane.vector)
                    place += 32 * plane.vector
            if not s.meta_bytes:
                continue
            for chunk in range(BLOCK // s.chunk):
                if s.group:
                    group = T.min((block * BLOCK + chunk * s.chunk) // s.group, s.meta_groups - 1)
                else:
                    group = T.int32(0)
                here = ((self.tile[j] * s.meta_groups + group) * 8 + self.lane // 4) * s.meta_bytes
                at = base + (place // 4) + self.lane * (s.meta_bytes // 4)
                e.copy_async(self.arena.ptr_to([at]), self.meta.ptr_to([here]), s.meta_bytes)
                place += 32 * s.meta_bytes

    def _issue_x(self, slot: Any, block: Any) -> None:
        """The rows of x; zeros beyond K."""
        s = self.s
        base = self._slot(slot)
        per = 32 // s.chunks
        elements = BLOCK // s.chunks
        chunk = self.lane % s.chunks
        k = e.let(block * BLOCK + chunk * elements)
        valid = None
        if s.k % BLOCK:
            valid = e.let(T.Select(k < s.x_width, e.u32(16), e.u32(0)))
            k = e.let(T.min(k, s.x_width - elements))
        for c in range(-(-s.rows // per)):
            row = e.let(self.lane // s.chunks + c * per)
            at = base + row * (s.chunks * 4) + T.bitwise_xor(chunk, row % 8) * 4
            with T.If(row < self.rows), T.Then():
                e.copy_async(self.arena.ptr_to([at]), self.x.ptr_to([self.first_row + row, k]), 16, valid)

    def _read_x(self, slot: Any, unit: int) -> None:
        """Load a unit of x into registers."""
        s = self.s
        for i in range(s.mt):
            at = slot + self.matrix[unit % 2] + (i * 8 * s.chunks * 4 + unit // 2 * 32)
            e.read_matrices([self.xr[unit % self.ahead, i, c] for c in range(4)], self.arena.ptr_to([at]))

    # Main loop

    def _loop(self) -> None:
        s = self.s
        self._positions()
        for stage in range(s.stages - 1):
            with T.If(self.count > stage), T.Then():
                self._issue_weights(T.int32(stage), self.start + stage)
        self._fetch(0, self.column, self.bx * s.columns, s.columns, s.n)
        if self.s.overlap:
            e.await_previous()
        if self.x_scale is not None:
            self._fetch(s.columns, self.x_scale, self.first_row, s.rows, self.m)
        self.fetched = True
        for stage in range(s.stages - 1):
            with T.If(self.count > stage), T.Then():
                self._issue_x(T.int32(stage), self.start + stage)
            e.commit()
        with T.serial(self.count) as i:
            e.wait(s.stages - 2)
            T.evaluate(T.cuda.warp_sync())
            slot = e.let(self.slots + i % s.stages * (s.stage_bytes // 4))
            self._read_stage(slot)
            with T.If(i + (s.stages - 1) < self.count), T.Then():
                following = e.let((i + (s.stages - 1)) % s.stages)
                self._issue_x(following, self.start + i + (s.stages - 1))
                self._issue_weights(following, self.start + i + (s.stages - 1))
            e.commit()
            self._multiply(slot)
        e.wait(0)

    def _fetch(self, place: int, source: Any, first: Any, count: int, end: Any) -> None:
        """Start copying float32 factors, which the end of the kernel then need not wait for."""
        s = self.s
        for i in range(-(-count // s.threads)):
            index = e.let(self.tx + i * s.threads)
            with T.If(T.And(index < count, first + index < end)), T.Then():
                at = self.arena.ptr_to([s.factor_place // 4 + place + index])
                e.copy_async(at, source.ptr_to([first + index]), 4)

    def _read_stage(self, slot: Any) -> None:
        s = self.s
        for unit in range(self.ahead) if self.zero is None else ():
            self._read_x(slot, unit)
        for j in range(s.tn):
            place = s.x_bytes + j * s.tile_bytes
            for p, plane in enumerate(s.layout.planes):
                words = plane.vector // 4
                for v in range(plane.vectors):
                    at = slot + (place // 4 + v * 32 * words) + self.lane * words
                    e.read_shared([self.codes[p][j, v, c] for c in range(words)], self.arena.ptr_to([at]))
                place += plane.block_bytes

    def _read_meta(self, slot: Any, chunk: int, j: int) -> None:
        """Scales and zero points of a chunk into registers."""
        s = self.s
        words = s.meta_bytes // 4
        at = slot + ((s.x_bytes + j * s.tile_bytes + s.code_bytes) // 4 + chunk * 32 * words) + self.lane * words
        e.read_shared([self.meta_words[j, c] for c in range(words)], self.arena.ptr_to([at]))
        if s.scaled:
            for a in range(2):
                self.scale[j, a] = half_of(self.meta_words[j, 0], a)
        if s.dual:
            self.dequantizer.begin(self.meta_words[j, 0])
        elif self.zero is not None:
            for a in range(2):
                word = self.meta_words[j, words - 1]
                e.ptx("prmt.b32", self.zero[a], word, word, e.u32(0x3232 if a else 0x1010))

    def _multiply(self, slot: Any) -> None:
        s = self.s
        units = s.layout.units
        per_chunk = s.chunk * 2 // s.layout.unit  # tiles along K that share a scale
        # Zero points change what `begin` prepares, so that with them a channel tile is finished before the next.
        for chunk in range(BLOCK // s.chunk):
            self._begin_chunk(chunk)
            for j in range(s.tn) if self.zero is not None else [None]:
                tiles = range(s.tn) if j is None else [j]
                if s.meta_bytes:
                    for t in tiles:
                        self._read_meta(slot, chunk, t)
                if not s.dual:
                    self.dequantizer.begin()
                for step in range(chunk * per_chunk, (chunk + 1) * per_chunk):
                    unit, tile = divmod(step, 2)
                    if j is not None and (tile == 0 or per_chunk == 1):
                        self._read_x(slot, unit)
                    for t in tiles:
                        self._tile(t, unit, tile, fresh=self.grouped and step == chunk * per_chunk)
                    if j is None and tile == 1 and unit + self.ahead < units:
                        self._read_x(slot, unit + self.ahead)
                if self.grouped:
                    for t in tiles:
                        self._add_group(t)

    def _begin_chunk(self, chunk: int) -> None:
        """Before the products of a scale group; the sums of x come from products with ones."""

    def _tile(self, j: int, unit: int, tile: int, fresh: bool) -> None:
        """Dequantize one weight tile and multiply it by all rows."""
        s = self.s
        plane = s.layout.planes[0]
        if s.narrow and s.stored_bits == 8:
            vector = 2 * unit + tile
        else:
            vector = unit * plane.vectors // s.layout.units
        low = [self.codes[0][j, vector, c] for c in range(plane.vector // 4)]
        high = [self.codes[1][j, 0, c] for c in range(2)] if len(self.codes) > 1 else None
        self.dequantizer.tile(self.w, low, high, unit, tile)
        for i in range(s.mt):
            operand = [self.xr[unit % self.ahead, i, 2 * tile + h] for h in range(2)]
            if self.sum_x is not None and self.multiply_ones and j == 0:
                self._mma([self.sum_x[i, c] for c in range(4)], [e.u32(ONES)] * 4, operand, fresh)
            self._mma([self.part[j, i, c] for c in range(4)], [self.w[r] for r in range(4)], operand, fresh)

    def _mma(self, out: list[Any], weights: list[Any], rows: list[Any], fresh: bool) -> None:
        zero = T.uint32(0) if self.part_type == "uint32" else T.float32(0)
        e.ptx(MMA[self.s.dtype], *out, *weights, *rows, *([zero] * 4 if fresh else out))

    def _add_group(self, j: int) -> None:
        s = self.s
        if s.raw:
            self._add_raw(j)
            return
        for i in range(s.mt):
            for c in range(4):
                value = self.part[j, i, c]
                if s.integer:
                    value = T.cast(T.reinterpret("int32", value), "float32")
                self.total[j, i, c] = self.total[j, i, c] + value * self.scale[j, c // 2]

    def _add_raw(self, j: int) -> None:
        """``scale (2^(24-p) part - zero sum x)``."""
        s = self.s
        assert self.sum_x is not None
        factor, shift = e.Registers((2,), "float32"), e.Registers((2,), "float32")
        for a in range(2):
            scale = self.scale[j, a] if s.scaled else T.float32(1)
            zero = T.float32(1 << s.weight.bits - 1)
            if not s.symmetric:
                zero = half_of(self.meta_words[j, s.meta_bytes // 4 - 1], a)
            factor[a] = scale * T.float32(2.0 ** (24 - raw_place(s.weight.bits, a)))
            shift[a] = scale * zero
        for i in range(s.mt):
            for c in range(4):
                value = self.total[j, i, c] + self.part[j, i, c] * factor[c // 2]
                self.total[j, i, c] = value - self.sum_x[i, c % 2] * shift[c // 2]


def read_table(levels: Any, words: int) -> e.Registers:
    """The table of levels in registers."""
    table = e.Registers((words,), "uint32")
    for i in range(0, words, 4):
        e.ptx("ld.global.nc.v4.b32", *[table[i + c] for c in range(4)], levels.ptr_to([i]))
    return table


def half_of(word: Any, a: int) -> Any:
    """The fp16 in half ``a`` of a word, as float32."""
    return T.cast(T.reinterpret("float16", T.cast(word >> e.u32(16 * a), "uint16")), "float32")
