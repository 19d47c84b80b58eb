"""The code of `sliced.SlicedLinear`: slices of x, codes from memory to registers, products, the sums of a block."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.sliced import EXCHANGE, HALF, SlicedShape
from qcompile.codegen.kernels.cuda.slices import QUADS, SLICES, Slicer, above, sliced_planes
from qcompile.codegen.kernels.cuda.stream_code import half_of
from qcompile.codegen.kernels.cuda.stream_tail import Tail

MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"

ALL = 0xFFFFFFFF


def emit(shape: SlicedShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        SlicedKernel(shape, epilogue).emit()
    return builder.get()


class SlicedKernel(Tail):
    """Names of one kernel while it is written."""

    s: SlicedShape
    sum_type = "float32"

    def __init__(self, shape: SlicedShape, epilogue: Epilogue) -> None:
        self.s, self.epilogue = shape, epilogue
        self.chunks = BLOCK // shape.chunk
        self.products = QUADS // 2 // self.chunks  # per chunk

    def emit(self) -> None:
        s = self.s
        self._parameters()
        T.device_entry()
        self.bx, self.bz = T.cta_id([s.grid_n, self.m])
        self.tx = T.thread_id([s.threads])
        if s.overlap:
            e.share_device()
        self.arena = e.shared(s.shared_bytes)
        self.lane = e.let(self.tx % 32)
        self.warp = e.let(self.tx // 32)
        # The last block repeats tiles of the one before instead of going beyond the last.
        self.tile = e.let(T.min(self.bx * s.tn, s.tiles - s.tn))
        self._registers()
        for step in range(s.stages - 1):
            self._copy(self.slots + step * (s.stage_bytes // 4), step % s.tn, self.warp + step // s.tn * s.kw)
        if s.overlap:
            e.await_previous()
        self._load_x(self.warp)
        self._slice()
        turns = e.let(T.max((s.blocks - self.warp + (s.kw - 1)) // s.kw, 0))
        with T.serial(turns) as i:
            self._block(e.let(self.warp + i * s.kw))
        e.wait(0)
        self._keep()
        self._finish()

    def _parameters(self) -> None:
        s = self.s
        self.m = T.int32()
        self.x = e.argument("x", (self.m, s.x_width), s.dtype)
        self.x_scale = None
        sizes = [s.tiles * s.blocks * p.block_bytes for p in s.layout.planes]
        self.codes = [e.argument(f"codes{i}", (size,), "uint8") for i, size in enumerate(sizes)]
        if s.meta_bytes:
            self.meta = e.argument("meta", (s.tiles * s.meta_groups * 8 * s.meta_bytes,), "uint8")
        self._tail_parameters()

    def _registers(self) -> None:
        s = self.s
        self.planes = sliced_planes(s.weight.bits)
        self.slicer = Slicer(s.weight.bits)
        self.held = [e.Registers((p.vectors * p.vector // 4,), "uint32") for p in s.layout.planes]
        self.meta_words = e.Registers((self.chunks, max(1, s.meta_bytes // 4)), "uint32")
        self.xw = e.Registers((len(self.planes), 2), "uint32")
        self.xs = e.Registers((len(self.planes), QUADS), "uint32")
        self.down = e.Registers((1,), "float32")
        # What the sums start at; unless zero points are the same everywhere, the sums of x.
        self.start = e.Registers((len(self.planes), self.chunks, 4), "uint32")
        self.part = e.Registers((len(self.planes), 4), "uint32")
        self.w = e.Registers((4,), "uint32")
        self.total = e.Registers((s.tn, 2), "float32")
        self.one = e.Registers((1,), "uint32")
        for j in range(s.tn):
            for a in range(2):
                self.total[j, a] = T.float32(0)
        self.slots = e.let(self.warp * (s.stages * s.stage_bytes // 4))
        # Words to the stages of this block of K and of the one before, where they move.
        self.base = e.Registers((2,), "int32")
        for which in range(2):
            self.base[which] = self.slots + (which and (s.stages - min(s.tn, s.stages)) * (s.stage_bytes // 4))
        self.exchange = e.let((s.exchange_place // 4) + self.warp * EXCHANGE)
        self.t = e.let(self.lane % 4)
        self.g = e.let(self.lane // 4)

    # Loads

    def _slot(self, step: int) -> Any:
        """Words to the stage of a step of this block of K; step -1 is the last one of the block before."""
        s = self.s
        if s.tn % s.stages == 0:
            return self.slots + step % s.stages * (s.stage_bytes // 4)
        if step < 0:
            return self.base[1] + (s.tn - 1) * (s.stage_bytes // 4)
        return self.base[0] + step * (s.stage_bytes // 4)

    def _copy(self, slot: Any, j: int, block: Any) -> None:
        """Start copying the codes and scales of a channel tile, unless the block is beyond K."""
        s = self.s
        guard = T.cast(block < s.blocks, "uint32")
        place = 0
        for source, plane in zip(self.codes, s.layout.planes, strict=True):
            for v in range(plane.vectors):
                at = ((self.tile + j) * s.blocks + block) * plane.block_bytes + v * 32 * plane.vector
                words = plane.vector // 4
                target = self.arena.ptr_to([slot + place // 4 + self.lane * words])
                e.copy_async(target, source.ptr_to([at + self.lane * plane.vector]), plane.vector, pred=guard)
                place += 32 * plane.vector
        if s.meta_bytes:
            # 16 bytes to a lane; groups of a block lie one after the other.
            per = s.meta_bytes // 2
            chunk, piece = (self.lane // per, self.lane % per) if self.chunks > 1 else (T.int32(0), self.lane)
            group = T.int32(0)
            if s.group:
                group = T.min((block * BLOCK + chunk * s.chunk) // s.group, s.meta_groups - 1)
            at = ((self.tile + j) * s.meta_groups + group) * (8 * s.meta_bytes) + piece * 16
            target = self.arena.ptr_to([slot + place // 4 + self.lane * 4])
            some = T.cast(T.And(block < s.blocks, self.lane < per * self.chunks), "uint32")
            e.copy_async(target, self.meta.ptr_to([at]), 16, pred=some)
        e.commit()

    def _read(self, slot: Any) -> None:
        """A stage into registers."""
        s = self.s
        place = 0
        for held, plane in zip(self.held, s.layout.planes, strict=True):
            words = plane.vector // 4
            for v in range(plane.vectors):
                at = slot + place // 4 + self.lane * words
                e.read_shared([held[v * words + c] for c in range(words)], self.arena.ptr_to([at]))
                place += 32 * plane.vector
        words = s.meta_bytes // 4
        for chunk in range(self.chunks if words else 0):
            at = slot + (place // 4 + chunk * 8 * words) + self.g * words
            e.read_shared([self.meta_words[chunk, c] for c in range(words)], self.arena.ptr_to([at]))

    def _load_x(self, block: Any) -> None:
        """The elements of this lane's quad; zeros beyond K."""
        s = self.s
        for p, plane in enumerate(self.planes):
            for half in range(2):
                k = e.let(block * BLOCK + plane.base(self.g) + self.t * 2 + half * plane.delta)
                self.xw[p, half] = e.u32(0)
                pred = T.cast(k < s.x_width, "uint32")
                e.ptx("ld.global.b32", self.xw[p, half], self.x.ptr_to([self.bz, k]), pred=pred, preserve_dst=True)

    # Main loop

    def _block(self, block: Any) -> None:
        s = self.s
        self._load_x(block + s.kw)
        for j in range(s.tn):
            e.wait(s.stages - 2)
            T.evaluate(T.cuda.warp_sync())
            self._read(e.let(self._slot(j)))
            turns, tile = divmod(j + s.stages - 1, s.tn)
            self._copy(e.let(self._slot(j - 1)), tile, e.let(block + turns * s.kw))
            for chunk in range(self.chunks):
                self._multiply(j, chunk)
        if s.tn % s.stages:
            step = s.tn * (s.stage_bytes // 4)
            following = e.let(self.base[0] + step)
            self.base[1] = self.base[0]
            last = self.slots + s.stages * (s.stage_bytes // 4)
            self.base[0] = T.Select(following == last, self.slots, following)
        # The next block's slices, while products of this one are under way.
        self._slice()

    def _elements(self, p: int) -> list[Any]:
        """Those of this lane's quad as float32, in the order of the bytes."""
        words = [self.xw[p, half] for half in range(2)]
        if self.s.dtype == "bfloat16":
            low = [T.reinterpret("float32", word << e.u32(16)) for word in words]
            high = [T.reinterpret("float32", word & e.u32(0xFFFF0000)) for word in words]
        else:
            low, high = ([half_of(word, h) for word in words] for h in range(2))
        return [low[0], low[1], high[0], high[1]] if self.planes[p].woven else [low[0], high[0], low[1], high[1]]

    def _slice(self) -> None:
        """x of a block -> slices in all lanes, the exponent, and what sums start at."""
        elements = [self._elements(p) for p in range(len(self.planes))]
        absolute = [T.reinterpret("uint32", value) & e.u32(0x7FFFFFFF) for value in elements[0]]
        largest = T.max(T.max(absolute[0], absolute[1]), T.max(absolute[2], absolute[3]))
        e.ptx("redux_sync.max.u32", self.one[0], largest, e.u32(ALL))
        up, down = self.slicer.exponent(self.one[0])
        up = e.let(up)
        self.down[0] = T.reinterpret("float32", down)
        for p, plane in enumerate(self.planes):
            more = T.cast(plane.prescale(self.g), "uint32") << e.u32(23)
            factor = e.let(T.reinterpret("float32", up + more))
            out = e.Registers((SLICES,), "uint32")
            self.slicer.slices(out, [value * factor for value in elements[p]])
            T.evaluate(T.cuda.warp_sync())
            at = e.let(self.exchange + self.g // 4 * HALF + self.t * 4 + self.g % 4)
            for d in range(SLICES):
                B.buffer_store(self.arena, out[d], [at + 16 * d])
            T.evaluate(T.cuda.warp_sync())
            at = e.let(self.exchange + (self.g % 4 * 4 + self.t) * 4)
            for half in range(2):
                registers = [self.xs[p, 4 * half + c] for c in range(4)]
                e.read_shared(registers, self.arena.ptr_to([at + half * HALF]))
        self._sums_of_x()

    def _sums_of_x(self) -> None:
        """Minus what codes equal to the zero point, or ones if zero points differ, would give."""
        s = self.s
        code = 1 << s.weight.bits - 1 if s.symmetric else 1
        for p, plane in enumerate(self.planes):
            for chunk in range(self.chunks):
                sums = [self.start[p, chunk, c] for c in range(4)]
                if not any(plane.constant(code, 0)):
                    for c in range(4):
                        self.start[p, chunk, c] = e.u32(0)
                    continue
                for i in range(self.products):
                    product = chunk * self.products + i
                    constant = [e.u32(v) for v in plane.constant(code, product)]
                    self._mma(sums, constant, p, product, [e.u32(0)] * 4 if i == 0 else sums)
                if s.symmetric:
                    for c in range(4):
                        self.start[p, chunk, c] = e.u32(0) - sums[c]

    def _mma(self, out: list[Any], weights: list[Any], p: int, product: int, start: list[Any]) -> None:
        rows = [self.xs[p, 2 * product + h] for h in range(2)]
        e.ptx(MMA, *out, *weights, *rows, *start)

    def _multiply(self, j: int, chunk: int) -> None:
        """The products of a chunk, and what they add to the sums."""
        s = self.s
        for p, plane in enumerate(self.planes):
            words = [self.held[p][c] for c in range(self.held[p].shape[0])]
            sums = [self.part[p, c] for c in range(4)]
            for i in range(self.products):
                product = chunk * self.products + i
                plane.operand(self.w, words, product)
                first = [self.start[p, chunk, c] for c in range(4)] if s.symmetric else [e.u32(0)] * 4
                self._mma(sums, [self.w[r] for r in range(4)], p, product, first if i == 0 else sums)
        for a in range(2):
            value = self._joined(self.part, a)
            if not s.symmetric:
                zero = self._zero(self.meta_words[chunk, s.meta_bytes // 4 - 1], a)
                value = value - zero * self._joined(self.start, a, chunk)
            value = value * self.down[0]
            if s.scaled:
                value = value * half_of(self.meta_words[chunk, 0], a)
            self.total[j, a] = self.total[j, a] + value

    def _joined(self, sums: e.Registers, a: int, *chunk: int) -> Any:
        """Both slices of a lane and all planes as one float32, for channel half ``a``."""
        total = None
        for p in range(len(self.planes)):
            if p and chunk:
                continue  # ones have no bit in it
            low, high = (sums[(p, *chunk, 2 * a + c)] for c in range(2))
            value = (high << e.u32(8)) + low
            # Planes beyond the first count 2^row more than it, like its own second half, after all prescaling.
            value = value << e.u32(a) if p and a else value
            total = value if total is None else total + value
        return T.cast(T.reinterpret("int32", total), "float32")

    def _zero(self, word: Any, a: int) -> Any:
        if self.s.dtype == "float16":
            return half_of(word, a)
        return T.reinterpret("float32", word & e.u32(0xFFFF0000) if a else word << e.u32(16))

    # Sums

    def _keep(self) -> None:
        """Add the two halves of the slices up, and leave the sums of this warp in shared memory."""
        s = self.s
        more = e.let(T.Select(self.t % 2 == 1, T.float32(65536), T.float32(1)))
        other = e.Registers((1,), "float32")
        base = e.let(s.totals_place // 4 + self.warp * s.columns + self.g)
        for j in range(s.tn):
            for a in range(2):
                unit = 2.0 ** -(above(s.weight.bits if s.weight.bits != 3 else 2) + a * self.planes[0].row)
                value = e.let(self.total[j, a] * (more * T.float32(unit)))
                e.ptx("shfl_sync.bfly.b32", other[0], value, e.u32(1), e.u32(31), e.u32(ALL))
                with T.If(self.t == 0), T.Then():
                    total = T.reinterpret("uint32", value + other[0])
                    B.buffer_store(self.arena, total, [base + j * TILE + a * 8])

    def _finish(self) -> None:
        """Add the warps up, in order."""
        s = self.s
        T.evaluate(T.cuda.cta_sync())
        with T.serial(-(-s.columns // s.threads)) as i:
            channel = e.let(i * s.threads + self.tx)
            n = e.let(self.tile * TILE + channel)
            # Tiles that are repeated are stored by one block.
            mine = T.And(n >= self.bx * s.columns, T.And(channel < s.columns, n < s.n))
            with T.If(mine), T.Then():
                total = e.Registers((1,), "float32")
                for warp in range(s.kw):
                    word = self.arena[s.totals_place // 4 + warp * s.columns + channel]
                    value = T.reinterpret("float32", word)
                    total[0] = value if warp == 0 else total[0] + value
                self._store(self.bz, n, total[0])
