"""The code of `sliced.SlicedLinear`: slices of x, codes from memory to registers, products, the sums of a block."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.sliced import EXCHANGE, HALF, QUADS, SLICES, SlicedShape
from qcompile.codegen.kernels.cuda.slices import Slicer, above, sliced_planes
from qcompile.codegen.kernels.cuda.stream_code import half_of
from qcompile.codegen.kernels.cuda.stream_tail import Tail

MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"

BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"

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
        super().__init__(shape, epilogue)
        self.chunks = BLOCK // shape.chunk
        self.products = QUADS // 2 // self.chunks  # per chunk

    def emit(self) -> None:
        s = self.s
        self._parameters()
        T.device_entry()
        self.bx, self.by, self.bz = T.cta_id([s.grid_n, s.split, self.m])
        self._threads(s.threads, s.overlap and not s.late)
        # The last block repeats tiles of the one before instead of going beyond the last.
        self.tile = e.let(T.min(self.bx * s.tn, s.tiles - s.tn))
        self._registers()
        self.first = e.let(self.by * s.kw + self.warp)
        last = s.stages if s.bulk else s.stages - 1
        early = min(s.early or last, last)
        copy = self._copy_bulk if s.bulk else self._copy_first
        if s.cluster:
            self._start_barrier()
        if s.bulk:
            self._start_bulk()
        copy(0, early)
        self._fetch_column(s.columns, lambda index: self.tile * TILE + index)
        if s.overlap:
            e.await_previous()
        self._load_x(self.xw, self.first)
        self._load_x(self.xw_next, self.first + s.stride)
        copy(early, last)
        self._slice()
        self._next_x(self.first + 2 * s.stride)
        turns = e.let(T.max((s.blocks - self.first + (s.stride - 1)) // s.stride, 0))
        with T.serial(turns) as i:
            self._block(e.let(self.first + i * s.stride), i)
        if s.overlap and s.late:
            e.share_device()
        e.commit()  # scales of channels a warp without blocks of K has asked for
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
        self.held = [e.Registers((s.wide, p.vectors * p.vector // 4), "uint32") for p in s.layout.planes]
        self.meta_words = e.Registers((s.wide, self.chunks, max(1, s.meta_bytes // 4)), "uint32")
        # x of the block that is sliced next, and of the one after it: two ahead, for loads wait behind those of weights.
        self.xw, self.xw_next = (e.Registers((len(self.planes), 2), "uint32") for _ in range(2))
        self.xs = e.Registers((len(self.planes), QUADS), "uint32")
        self.down = e.Registers((1,), "float32")
        # What the sums start at; unless zero points are the same everywhere, the sums of x.
        self.start = e.Registers((len(self.planes), self.chunks, 4), "uint32")
        self.part = e.Registers((s.wide, len(self.planes), 4), "uint32")
        self.w = e.Registers((s.wide, 4), "uint32")
        self.total = e.Registers((s.tn, 2), "float32")
        self.one = e.Registers((1,), "uint32")
        for j in range(s.tn):
            for a in range(2):
                self.total[j, a] = T.float32(0)
        self.slots = e.let(self.warp * (s.stages * s.stage_bytes // 4))
        # Words to the stages of this block of K and of the one before, where they move.
        self.base = e.Registers((2,), "int32")
        for which in range(2):
            self.base[which] = self.slots + (which and (s.stages - min(s.steps, s.stages)) * (s.stage_bytes // 4))
        self.exchange = e.let((s.exchange_place // 4) + self.warp * EXCHANGE)
        self.t = e.let(self.lane % 4)
        self.g = e.let(self.lane // 4)

    # Loads

    def _slot(self, step: int) -> Any:
        """Words to the stage of a step of this block of K; step -1 is the last one of the block before."""
        s = self.s
        if s.steps % s.stages == 0:
            return self.slots + step % s.stages * (s.stage_bytes // 4)
        if step < 0:
            return self.base[1] + (s.steps - 1) * (s.stage_bytes // 4)
        return self.base[0] + step * (s.stage_bytes // 4)

    def _copy(self, slot: Any, step: int, block: Any) -> None:
        """Start copying the codes and scales of a step, unless the block is beyond K."""
        s = self.s
        guard = T.cast(block < s.blocks, "uint32")
        for tile in range(s.wide):
            j = step * s.wide + tile
            place = tile * s.tile_bytes
            for source, plane in zip(self.codes, s.layout.planes, strict=True):
                for v in range(plane.vectors):
                    at = ((self.tile + j) * s.blocks + block) * plane.block_bytes + v * 32 * plane.vector
                    words = plane.vector // 4
                    target = self.arena.ptr_to([slot + place // 4 + self.lane * words])
                    e.copy_async(target, source.ptr_to([at + self.lane * plane.vector]), plane.vector, pred=guard)
                    place += 32 * plane.vector
            if s.meta_bytes:
                self._copy_meta(slot + place // 4, j, block)
        e.commit()

    def _copy_meta(self, place: Any, j: int, block: Any) -> None:
        """Those of a channel tile, 16 bytes to a lane; groups of a block lie one after the other."""
        s = self.s
        per = s.meta_bytes // 2
        chunk, piece = (self.lane // per, self.lane % per) if self.chunks > 1 else (T.int32(0), self.lane)
        group = T.int32(0)
        if s.group:
            group = T.min((block * BLOCK + chunk * s.chunk) // s.group, s.meta_groups - 1)
        at = ((self.tile + j) * s.meta_groups + group) * (8 * s.meta_bytes) + piece * 16
        some = T.cast(T.And(block < s.blocks, self.lane < per * self.chunks), "uint32")
        e.copy_async(self.arena.ptr_to([place + self.lane * 4]), self.meta.ptr_to([at]), 16, pred=some)

    def _start_bulk(self) -> None:
        """An mbarrier for each stage, which arrives once."""
        s = self.s
        with T.If(self.tx == 0), T.Then():
            for stage in range(s.stages):
                e.ptx("mbarrier.init.shared::cta.b64", self._stage_barrier(stage), e.u32(1))
            e.ptx("fence.mbarrier_init.release.cluster")
        T.evaluate(T.cuda.cta_sync())

    def _stage_barrier(self, stage: Any) -> Any:
        return self.arena.ptr_to([self.s.barrier_place // 4 + 2 * (stage + self.s.cluster)])

    def _copy_bulk(self, start: int, end: int) -> None:
        """What all warps read in these stages: it lies together, first the codes of a plane, then the scales."""
        s = self.s
        groups = 8 * s.meta_bytes * self.chunks
        sources = [(p.block_bytes, source, s.blocks) for p, source in zip(s.layout.planes, self.codes, strict=True)]
        sources += [(groups, self.meta, s.meta_groups // self.chunks)] if groups else []
        count = e.Registers((1,), "int32")  # blocks of K
        with T.If(self.tx == 0), T.Then():
            for stage in range(start, end):
                turn, j = divmod(stage, s.steps)
                block = e.let(self.by * s.kw + turn * s.stride)
                count[0] = T.min(s.blocks - block, s.kw)
                barrier = self._stage_barrier(stage)
                place = stage * s.kw * s.tile_bytes
                with T.If(count[0] > 0), T.Then():
                    total = T.cast(count[0] * (s.code_bytes + groups), "uint32")
                    e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", barrier, total)
                    for size, source, per_tile in sources:
                        at = source.ptr_to([((self.tile + j) * per_tile + block) * size])
                        there = self.arena.ptr_to([place // 4])
                        e.ptx(BULK, there, at, T.cast(count[0] * size, "uint32"), barrier)
                        place += s.kw * size

    def _read_bulk(self, stage: Any) -> None:
        """What this warp has of a stage into registers."""
        s = self.s
        T.evaluate(T.cuda.mbarrier_wait(self._stage_barrier(stage), T.int32(0)))
        start, place = e.let(stage * (s.kw * s.tile_bytes // 4)), 0
        for held, plane in zip(self.held, s.layout.planes, strict=True):
            words = plane.vector // 4
            for v in range(plane.vectors):
                at = start + place // 4 + self.warp * (plane.block_bytes // 4) + (v * 32 + self.lane) * words
                e.read_shared([held[0, v * words + c] for c in range(words)], self.arena.ptr_to([at]))
            place += s.kw * plane.block_bytes
        words = s.meta_bytes // 4
        for chunk in range(self.chunks if words else 0):
            at = start + place // 4 + (self.warp * self.chunks + chunk) * (8 * words) + self.g * words
            e.read_shared([self.meta_words[0, chunk, c] for c in range(words)], self.arena.ptr_to([at]))

    def _read(self, slot: Any) -> None:
        """A stage into registers."""
        s = self.s
        for tile in range(s.wide):
            place = tile * s.tile_bytes
            for held, plane in zip(self.held, s.layout.planes, strict=True):
                words = plane.vector // 4
                for v in range(plane.vectors):
                    at = slot + place // 4 + self.lane * words
                    e.read_shared([held[tile, v * words + c] for c in range(words)], self.arena.ptr_to([at]))
                    place += 32 * plane.vector
            words = s.meta_bytes // 4
            for chunk in range(self.chunks if words else 0):
                at = slot + (place // 4 + chunk * 8 * words) + self.g * words
                e.read_shared([self.meta_words[tile, chunk, c] for c in range(words)], self.arena.ptr_to([at]))

    def _copy_first(self, start: int, end: int) -> None:
        """The first time these stages are filled."""
        s = self.s
        for stage in range(start, end):
            block = self.first + stage // s.steps * s.stride
            self._copy(self.slots + stage * (s.stage_bytes // 4), stage % s.steps, block)

    def _next_x(self, block: Any) -> None:
        """The following elements move up, and those of ``block`` are loaded."""
        for p in range(len(self.planes)):
            for half in range(2):
                self.xw[p, half] = self.xw_next[p, half]
        self._load_x(self.xw_next, block)

    def _load_x(self, registers: e.Registers, block: Any) -> None:
        """The elements of this lane's quad; zeros beyond K."""
        s = self.s
        for p, plane in enumerate(self.planes):
            for half in range(2):
                k = e.let(block * BLOCK + plane.base(self.g) + self.t * 2 + half * plane.delta)
                registers[p, half] = e.u32(0)
                pred = T.cast(k < s.x_width, "uint32")
                e.ptx("ld.global.b32", registers[p, half], self.x.ptr_to([self.bz, k]), pred=pred, preserve_dst=True)

    # Main loop

    def _block(self, block: Any, turn: Any) -> None:
        s = self.s
        for step in range(s.steps):
            if s.bulk:
                self._read_bulk(e.let(turn * s.steps + step))
            else:
                self._stage(step, block)
            for chunk in range(self.chunks):
                self._multiply(step, chunk)
        if s.steps % s.stages and not s.bulk:
            after = e.let(self.base[0] + s.steps * (s.stage_bytes // 4))
            self.base[1] = self.base[0]
            last = self.slots + s.stages * (s.stage_bytes // 4)
            self.base[0] = T.Select(after == last, self.slots, after)
        # The next block's slices, while products of this one are under way.
        with T.If(block + s.stride < s.blocks), T.Then():
            self._slice()
            self._next_x(block + 3 * s.stride)

    def _stage(self, step: int, block: Any) -> None:
        """A stage into registers, and the one that takes the place of the stage before is asked for."""
        s = self.s
        e.wait(s.stages - 2)
        T.evaluate(T.cuda.warp_sync())
        self._read(e.let(self._slot(step)))
        turns, following = divmod(step + s.stages - 1, s.steps)
        self._copy(e.let(self._slot(step - 1)), following, e.let(block + turns * s.stride))

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

    def _multiply(self, step: int, chunk: int) -> None:
        """The products of a chunk, and what they add to the sums."""
        s = self.s
        for p, plane in enumerate(self.planes):
            for i in range(self.products):
                product = chunk * self.products + i
                for tile in range(s.wide):
                    words = [self.held[p][tile, c] for c in range(self.held[p].shape[1])]
                    sums = [self.part[tile, p, c] for c in range(4)]
                    plane.operand(e.View(self.w, tile), words, product)
                    first = [self.start[p, chunk, c] for c in range(4)] if s.symmetric else [e.u32(0)] * 4
                    self._mma(sums, [self.w[tile, r] for r in range(4)], p, product, first if i == 0 else sums)
        for tile in range(s.wide):
            for a in range(2):
                value = self._joined([[self.part[tile, p, c] for c in range(4)] for p in range(len(self.planes))], a)
                if not s.symmetric:
                    zero = self._zero(self.meta_words[tile, chunk, s.meta_bytes // 4 - 1], a)
                    value = value - zero * self._joined([[self.start[0, chunk, c] for c in range(4)]], a)
                value = value * self.down[0]
                if s.scaled:
                    value = value * half_of(self.meta_words[tile, chunk, 0], a)
                j = step * s.wide + tile
                self.total[j, a] = self.total[j, a] + value

    def _joined(self, planes: list[list[Any]], a: int) -> Any:
        """Both slices of a lane and all planes as one float32, for channel half ``a``. The sums of ones have one plane."""
        total = None
        for p, sums in enumerate(planes):
            value = (sums[2 * a + 1] << e.u32(8)) + sums[2 * a]
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
        """Add the warps up, in order, then the blocks of the cluster."""
        s = self.s
        if s.cluster:
            e.ptx("barrier.cluster.wait.acquire.aligned")  # all have started
        T.evaluate(T.cuda.cta_sync())
        place = s.totals_place // 4
        with T.serial(-(-s.columns // s.threads)) as i:
            channel = e.let(i * s.threads + self.tx)
            n = e.let(self.tile * TILE + channel)
            with T.If(self._wanted(channel, n)), T.Then():
                total = e.Registers((1,), "float32")
                for warp in range(s.kw):
                    value = T.reinterpret("float32", self.arena[place + warp * s.columns + channel])
                    total[0] = value if warp == 0 else total[0] + value
                if s.cluster:
                    self._send(channel, total[0])
                else:
                    self._store(self.bz, n, total[0])
        if s.cluster:
            self._add_arrived()

    def _wanted(self, channel: Any, n: Any) -> Any:
        """Whether this block stores a channel: tiles that are repeated are stored by one block. All are sent in a cluster."""
        s = self.s
        if s.cluster:
            return channel < s.columns
        return T.And(n >= self.bx * s.columns, T.And(channel < s.columns, n < s.n))

    def _start_barrier(self) -> None:
        """Let the other blocks know when they may send, and say how much will arrive."""
        s = self.s
        self.arrival = self.arena.ptr_to([s.barrier_place // 4])
        with T.If(self.tx == 0), T.Then():
            e.ptx("mbarrier.init.shared::cta.b64", self.arrival, e.u32(1))
            e.ptx("fence.mbarrier_init.release.cluster")
        e.ptx("barrier.cluster.arrive.release.aligned")
        T.evaluate(T.cuda.cta_sync())
        with T.If(self.tx == 0), T.Then():
            mine = T.max(T.min(s.columns - self.by * s.share, s.share), 0)
            e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", self.arrival, T.cast(mine * (4 * s.split), "uint32"))

    def _send(self, channel: Any, value: Any) -> None:
        """The sum of this block to the one that adds the channel up, which may be itself."""
        s = self.s
        owner = e.let(channel // s.share)
        there = e.Registers((1,), "uint32")
        here = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([0]))
        e.ptx("mapa.shared::cluster.u32", there[0], here, T.cast(owner, "uint32"))
        place = s.incoming_place // 4 + self.by * s.share + channel - owner * s.share
        barrier = there[0] + e.u32(s.barrier_place)
        e.store_remote(there[0] + T.cast(place * 4, "uint32"), T.reinterpret("uint32", value), barrier)

    def _add_arrived(self) -> None:
        """Every block adds up and stores its share of the channels."""
        s = self.s
        T.evaluate(T.cuda.mbarrier_wait(self.arrival, T.int32(0)))
        with T.serial(-(-s.share // s.threads)) as i:
            within = e.let(i * s.threads + self.tx)
            channel = e.let(self.by * s.share + within)
            n = e.let(self.tile * TILE + channel)
            wanted = T.And(T.And(within < s.share, channel < s.columns), T.And(n >= self.bx * s.columns, n < s.n))
            with T.If(wanted), T.Then():
                total = e.Registers((1,), "float32")
                for part in range(s.split):
                    word = self.arena[s.incoming_place // 4 + part * s.share + within]
                    value = T.reinterpret("float32", word)
                    total[0] = value if part == 0 else total[0] + value
                self._store(self.bz, n, total[0])

    def _factor(self, place: int, source: Any, index: Any, first: Any) -> Any:
        return T.reinterpret("float32", self.arena[self.s.factor_place // 4 + index - self.tile * TILE])
