"""The code of `tiled.TiledLinear`: pipeline, and product by wgmma or mma.sync."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.dequant import IntegerDequantizer, ScaledDequantizer
from qcompile.codegen.kernels.cuda.layout import BLOCK
from qcompile.codegen.kernels.cuda.stream_code import MMA, read_table
from qcompile.codegen.kernels.cuda.tables import (
    FLOAT8_EXPONENT,
    DualDequantizer,
    Float8Dequantizer,
    ScaledValues,
    TableDequantizer,
)
from qcompile.codegen.kernels.cuda.tiled import RASTER, TiledShape
from qcompile.codegen.kernels.cuda.tiled_tail import Tail

DESCRIPTOR_HIGH = 1 << 30 | 1024 >> 4
"""Upper half of a matrix descriptor: 128-byte swizzle, 1024 bytes from eight rows to the next eight."""


def emit(shape: TiledShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    from qcompile.codegen.kernels.cuda.ring_code import RingKernel

    with e.kernel(name) as builder:
        (RingKernel if shape.ring else Kernel)(shape, epilogue).emit()
    return builder.get()


class Kernel(Tail):
    """Names of one kernel while it is written."""

    def emit(self) -> None:
        s = self.s
        self._enter(s.grid_n, s.threads, s.overlap)
        if not s.ring:
            self._prefetch_column()
        self._registers()
        self._loop()
        if s.cluster:
            self._reduce_cluster()
        elif s.split > 1:
            self._reduce()
        else:
            self._store()

    def _enter(self, along_n: int, threads: int, share: bool) -> None:
        """Parameters, blocks and threads; shared memory is used from a multiple of 1024 bytes on."""
        s = self.s
        self._parameters()
        self._before()
        T.device_entry()
        row_blocks = (self.m + (s.rows - 1)) // s.rows
        self.bx, self.by = T.cta_id([row_blocks * along_n, s.split])
        self._threads(threads, share)
        address = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([0]))
        self.base = e.let(T.cast((T.uint32(0) - address) & e.u32(1023), "int32") // 4)
        self._place_block(row_blocks)

    def _prefetch_column(self) -> None:
        """Scales of the channels to the second-level cache, 32 a line; the end of the kernel reads them."""
        n = e.let(self.first_tile * 16 + self.tx * 32)
        with T.If(T.And(self.tx * 32 < self.s.columns, n < self.s.n)), T.Then():
            e.ptx("prefetch.global.L2", self.column.ptr_to([n]))

    def _before(self) -> None:
        """What the host does before the launch."""

    def _place_block(self, row_blocks: Any) -> None:
        """Channels and rows of this block: `RASTER` row blocks side by side, then the next channels."""
        s = self.s
        band = e.let(self.bx // (RASTER * s.grid_n))
        height = e.let(T.min(row_blocks - band * RASTER, RASTER))
        within = e.let(self.bx - band * (RASTER * s.grid_n))
        self.first_row = e.let((band * RASTER + within % height) * s.rows)
        self.first_tile = e.let(within // height * s.block_tiles)
        self.rows = e.let(T.min(self.m - self.first_row, s.rows))
        self.start = e.let(self.by * s.per_split)
        self.count = e.let(T.max(T.min(s.blocks - self.start, s.per_split), 0))

    def _registers(self) -> None:
        s = self.s
        self.sum_type = "uint32" if s.integer and not s.grouped_sums else "float32"
        self.part_type = "uint32" if s.integer else "float32"
        self.total = e.Registers((s.mt, s.rows // 2), self.sum_type)
        self.part = e.Registers((s.mt, s.rows // 2), self.part_type) if s.grouped_sums else self.total
        self.operand = e.Registers((2 if s.wgmma else 1, s.mt, 2, 4), "uint32")
        self.codes = [e.Registers((s.mt, p.vector // 4), "uint32") for p in s.layout.planes]
        self.meta_words = e.Registers((s.mt, 2), "uint32")
        self.dequantizers = self._dequantizers()
        for registers in (self.total, self.part):
            kind = self.sum_type if registers is self.total else self.part_type
            zero = T.float32(0) if kind == "float32" else T.uint32(0)
            for j in range(s.mt):
                for c in range(s.rows // 2):
                    registers[j, c] = zero
        # Channel tile j of this warp, counted in the block.
        self.tile = [e.let((self.warp // 4 * s.mt + j) * 4 + self.warp % 4) for j in range(s.mt)]
        # ldmatrix of 16 rows, two chunks: matrix lane / 8 is (rows + 8, chunk + 1) by its bits 1 and 0.
        row = self.lane % 8
        self.matrix_row = e.let((self.lane // 16 * 8 + row) * 32)
        self.matrix_chunk = [
            e.let(T.bitwise_xor(pair * 2 + self.lane // 8 % 2, row) * 4) for pair in range(4 if not s.wgmma else 0)
        ]

    def _dequantizers(self) -> list[Any]:
        """One for every channel tile of a warp."""
        s, each = self.s, range(self.s.mt)
        if s.levels:
            table = read_table(self.levels, s.table_words)
            tables = [TableDequantizer(1 if s.narrow else 2, table) for _ in each]
            return list(tables) if s.narrow else [ScaledValues(t, s.dtype == "bfloat16", s.scaled) for t in tables]
        if s.dual:
            return [DualDequantizer(e.Registers((2,), "uint32")) for _ in each]
        if s.narrow:
            zeros = [None if s.symmetric else e.Registers((2,), "uint32") for _ in each]
            return [IntegerDequantizer(s.stored_bits, z) for z in zeros]
        bf16 = s.dtype == "bfloat16"
        if s.float8:
            exponent = 0 if bf16 else FLOAT8_EXPONENT
            return [ScaledValues(Float8Dequantizer(bf16), bf16, s.scaled, exponent) for _ in each]
        return [ScaledDequantizer(s.weight.bits, bf16, s.scaled, s.symmetric) for _ in each]

    # Copies

    def _issue(self, slot: Any, block: Any) -> None:
        """Start copying stage ``block`` into ``slot``."""
        self._issue_x(slot, block)
        self._issue_weights(slot, block)

    def _issue_first(self, close: Any) -> None:
        """Start copying the first stages: weights, and after the kernels that made x have ended, x; ``close(stage)`` ends one."""
        ahead = self.s.stages - 1
        for stage in range(ahead):
            with T.If(self.count > stage), T.Then():
                self._issue_weights(T.int32(stage), self.start + stage)
        if self.s.overlap:
            e.await_previous()
        for stage in range(ahead):
            with T.If(self.count > stage), T.Then():
                self._issue_x(T.int32(stage), self.start + stage)
            close(stage)

    def _issue_weights(self, slot: Any, block: Any) -> None:
        """Codes and metadata."""
        s = self.s
        self._issue_codes(e.let(self.base + slot * (s.stage_bytes // 4) + s.x_bytes // 4), block)

    def _issue_codes(self, base: Any, block: Any) -> None:
        """Start copying codes and metadata of stage ``block`` to ``base``."""
        s = self.s
        place = 0
        for plane, source in zip(s.layout.planes, self.planes):
            per = plane.block_bytes // 16
            self._pieces(
                s.block_tiles * per,
                base + place // 4,
                lambda c, per=per: self.first_tile + c // per,
                lambda tile, c, per=per, plane=plane, source=source: source.ptr_to(
                    [(tile * s.blocks + block) * plane.block_bytes + c % per * 16]
                ),
            )
            place += s.block_tiles * plane.block_bytes
        if s.meta_bytes:
            per = s.meta_bytes // 2  # pieces of one group of one tile
            count = s.stage_chunks * per

            def meta(tile: Any, c: Any) -> Any:
                if s.group:
                    group = T.min((block * BLOCK + c % count // per * s.chunk) // s.group, s.meta_groups - 1)
                else:
                    group = T.int32(0)
                return self.meta.ptr_to([(tile * s.meta_groups + group) * (8 * s.meta_bytes) + c % per * 16])

            self._pieces(s.block_tiles * count, base + place // 4, lambda c: self.first_tile + c // count, meta)

    def _pieces(self, total: int, place: Any, tile_of: Any, source: Any) -> None:
        """Copy ``total`` pieces of 16 bytes, piece c from ``source(tile_of(c), c)``; those of tiles beyond N are left out."""
        s = self.s
        for i in range(-(-total // s.threads)):
            c = e.let(self.tx + i * s.threads)
            tile = e.let(tile_of(c))
            conditions = []
            if (i + 1) * s.threads > total:
                conditions.append(c < total)
            if s.tiles % s.block_tiles:
                conditions.append(tile < s.tiles)
            self._when(conditions, lambda: e.copy_async(self.arena.ptr_to([place + c * 4]), source(tile, c), 16))

    def _issue_x(self, slot: Any, block: Any) -> None:
        """The rows of x; zeros beyond K."""
        s = self.s
        base = e.let(self.base + slot * (s.stage_bytes // 4))
        step = s.threads // s.chunks
        elements = BLOCK // s.chunks
        chunk = self.tx % s.chunks
        k = e.let(block * BLOCK + chunk * elements)
        valid = None
        if s.k % BLOCK:
            valid = e.let(T.Select(k < s.x_width, e.u32(16), e.u32(0)))
            k = e.let(T.min(k, s.x_width - elements))
        first = self.tx // s.chunks
        place = e.let(base + chunk // 8 * (s.panel_bytes // 4) + first * 32 + T.bitwise_xor(chunk % 8, first % 8) * 4)
        for i in range(-(-s.rows // step)):
            row = first + i * step
            self._when(
                [row < self.rows],
                lambda i=i, row=row: e.copy_async(
                    self.arena.ptr_to([place + i * step * 32]), self.x.ptr_to([self.first_row + row, k]), 16, valid
                ),
            )

    def _when(self, conditions: list[Any], emit: Any) -> None:
        if not conditions:
            emit()
            return
        with T.If(conditions[0] if len(conditions) == 1 else T.And(*conditions)), T.Then():
            emit()

    # Main loop

    def _loop(self) -> None:
        if self.s.wgmma:
            self._loop_warpgroups()
        else:
            self._loop_warps()

    def _loop_warps(self) -> None:
        """Stages in lock step: a barrier says that one has landed for all and that the one before is free."""
        s = self.s
        ahead = s.stages - 1
        self._issue_first(lambda stage: e.commit())
        with T.serial(self.count) as i:
            e.wait(ahead - 1)
            T.evaluate(T.cuda.cta_sync())
            with T.If(i + ahead < self.count), T.Then():
                self._issue((i + ahead) % s.stages, self.start + i + ahead)
            e.commit()
            slot = e.let(self.base + i % s.stages * (s.stage_bytes // 4))
            self._multiply(slot, slot + s.x_bytes // 4)
        e.wait(0)

    def _loop_warpgroups(self) -> None:
        """A pair of mbarriers per slot: ``full`` when the copies of all threads have landed, ``empty`` when no thread's
        products read it any more. Warpgroups drift apart by up to a stage, and tensor cores find work meanwhile."""
        s = self.s
        ahead = s.stages - 1
        with T.If(self.tx == 0), T.Then():
            for slot in range(s.stages):
                e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot), e.u32(s.threads))
                e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot, empty=True), e.u32(s.threads))
        T.evaluate(T.cuda.cta_sync())
        self._issue_first(self._landed)
        with T.serial(self.count) as i:
            slot = e.let(i % s.stages)
            following = e.let((i + ahead) % s.stages)  # also the slot of the stage before
            T.evaluate(T.cuda.mbarrier_wait(self._barrier(slot), i // s.stages % 2))
            # What cp.async wrote is read by wgmma, that is, through the asynchronous proxy.
            e.ptx("fence.proxy.async.shared::cta")

            def release(i: Any = i, following: Any = following) -> None:
                with T.If(i > 0), T.Then():
                    e.ptx("mbarrier.arrive.shared::cluster.b64", self._barrier(following, empty=True))

            place = e.let(self.base + slot * (s.stage_bytes // 4))
            self._multiply(place, place + s.x_bytes // 4, release)
            with T.If(i + ahead < self.count), T.Then():
                with T.If(i > 0), T.Then():
                    T.evaluate(T.cuda.mbarrier_wait(self._barrier(following, empty=True), (i - 1) // s.stages % 2))
                self._issue(following, self.start + i + ahead)
                self._landed(following)
        e.ptx("wgmma.wait_group.sync.aligned", 0)

    def _landed(self, slot: Any) -> None:
        """Arrive at the barrier of ``slot`` when this thread's copies have."""
        e.ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64", self._barrier(slot))

    def _barrier(self, slot: Any, empty: bool = False) -> Any:
        """Address of a barrier."""
        place = (self.s.barrier_place + (8 * self.s.stages if empty else 0)) // 4
        return self.arena.ptr_to([self.base + place + slot * 2])

    def _multiply(self, slot: Any, weights: Any, release: Any = None) -> None:
        """Products of a stage, x at ``slot``; ``release`` is called when those of the stage before have ended."""
        s = self.s
        self.weights = weights
        if s.wgmma:
            address = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([slot]))
            low = e.let(((address & e.u32(0x3FFFF)) >> e.u32(4)) | e.u32(1 << 16))
            self.descriptor = e.let(T.cast(low, "uint64") | T.uint64(DESCRIPTOR_HIGH << 32))
        per_chunk = s.chunk * 2 // s.layout.unit  # tiles along K that share a scale
        for unit in range(s.layout.units):
            if s.wgmma:
                # Operands are double buffered: those of the product before the last are free.
                e.ptx("wgmma.wait_group.sync.aligned", 1)
                if unit == 1 and release is not None:
                    release()
            buffer = unit % 2 if s.wgmma else 0
            for tiles in [[0, 1]] if per_chunk > 1 else [[0], [1]]:
                step = 2 * unit + tiles[0]
                fresh = step % per_chunk == 0
                if fresh:
                    self._begin(step // per_chunk)
                for j in range(s.mt):
                    for tile in tiles:
                        self._dequantize(buffer, j, unit, tile)
                if s.wgmma:
                    self._multiply_warpgroup(buffer, unit, tiles, fresh)
                else:
                    self._multiply_warp(slot, buffer, unit, tiles, fresh)
                if s.grouped_sums and (step + len(tiles)) % per_chunk == 0:
                    self._add_group()

    def _begin(self, chunk: int) -> None:
        """Prepare the dequantizers for a group."""
        s = self.s
        for j in range(s.mt):
            if s.meta_bytes:
                self._read_meta(chunk, j)
            else:
                self.dequantizers[j].begin(None, None)

    def _read_meta(self, chunk: int, j: int) -> None:
        """Scales and zero points of a group, prepared for the dequantizer."""
        s = self.s
        words = s.meta_bytes // 4
        place = s.block_tiles * s.code_bytes // 4
        at = self.weights + place + ((self.tile[j] * s.stage_chunks + chunk) * 8 + self.lane // 4) * words
        e.read_shared([self.meta_words[j, c] for c in range(words)], self.arena.ptr_to([at]))
        scale = self.meta_words[j, 0] if s.group else None
        zero = None if s.symmetric else self.meta_words[j, words - 1]
        self.dequantizers[j].begin(scale, zero)

    def _dequantize(self, buffer: int, j: int, unit: int, tile: int) -> None:
        """Operand of one channel tile and 16 (float) or 32 (int8) K."""
        s = self.s
        place = 0
        for index, plane in enumerate(s.layout.planes):
            per_vector = 2 * s.layout.units // plane.vectors  # tiles along K of a vector
            if (2 * unit + tile) % per_vector == 0:
                vector = (2 * unit + tile) // per_vector
                words = plane.vector // 4
                first = self.weights + (place // 4 + vector * 32 * words)
                at = first + self.tile[j] * (plane.block_bytes // 4) + self.lane * words
                e.read_shared([self.codes[index][j, c] for c in range(words)], self.arena.ptr_to([at]))
            place += s.block_tiles * plane.block_bytes
        low = [self.codes[0][j, c] for c in range(s.layout.planes[0].vector // 4)]
        high = [self.codes[1][j, c] for c in range(2)] if len(self.codes) > 1 else None
        self.dequantizers[j].tile(e.View(self.operand, buffer, j, tile), low, high, unit, tile)

    def _multiply_warpgroup(self, buffer: int, unit: int, tiles: list[int], fresh: bool) -> None:
        s = self.s
        e.ptx("wgmma.fence.sync.aligned")
        for tile in tiles:
            step = 2 * unit + tile
            offset = step // 4 * s.panel_bytes + step % 4 * 32
            keep = T.bool(not (s.grouped_sums and fresh and tile == tiles[0]))
            for j in range(s.mt):
                sums = [self.part[j, c] for c in range(s.rows // 2)]
                weights = [self.operand[buffer, j, tile, r] for r in range(4)]
                descriptor = self.descriptor + T.uint64(offset // 16)
                if s.integer:
                    name, tail = f"m64n{s.rows}k32.s32.s8.s8", []
                elif s.narrow:
                    name, tail = f"m64n{s.rows}k32.f32.e4m3.e4m3", [1, 1]
                else:
                    kind = "bf16" if s.dtype == "bfloat16" else "f16"
                    name, tail = f"m64n{s.rows}k16.f32.{kind}.{kind}", [1, 1, 0]
                e.ptx(f"wgmma.mma_async.sync.aligned.{name}", *sums, *weights, descriptor, keep, *tail)
        e.ptx("wgmma.commit_group.sync.aligned")

    def _multiply_warp(self, slot: Any, buffer: int, unit: int, tiles: list[int], fresh: bool) -> None:
        s = self.s
        x = e.Registers((4,), "uint32")
        zero = T.uint32(0) if self.part_type == "uint32" else T.float32(0)
        for tile in tiles:
            step = 2 * unit + tile
            for i in range(s.rows // 16):
                place = (step // 4 * s.panel_bytes + i * 16 * 128) // 4
                at = slot + place + self.matrix_row + self.matrix_chunk[step % 4]
                e.read_matrices([x[c] for c in range(4)], self.arena.ptr_to([at]))
                for j in range(s.mt):
                    weights = [self.operand[buffer, j, tile, r] for r in range(4)]
                    for octet in range(2):
                        sums = [self.part[j, (2 * i + octet) * 4 + c] for c in range(4)]
                        start = [zero] * 4 if s.grouped_sums and fresh and tile == tiles[0] else sums
                        e.ptx(MMA[s.dtype], *sums, *weights, x[2 * octet], x[2 * octet + 1], *start)

    def _add_group(self) -> None:
        """Sums of a group times its scale to the float32 sums."""
        s = self.s
        if s.wgmma:
            e.ptx("wgmma.wait_group.sync.aligned", 0)
        for j in range(s.mt):
            scale = e.Registers((2,), "float32")
            for a in range(2):
                bits = T.cast(self.meta_words[j, 0] >> e.u32(16 * a), "uint16")
                scale[a] = T.cast(T.reinterpret("float16", bits), "float32")
            for c in range(s.rows // 2):
                value = self.part[j, c]
                if s.integer:
                    value = T.cast(T.reinterpret("int32", value), "float32")
                self.total[j, c] = self.total[j, c] + value * scale[c // 2 % 2]
