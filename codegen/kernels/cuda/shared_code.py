"""The code of `shared`: a warp that copies, warpgroups that multiply, sums that are sent to the block that owns them."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import BLOCK
from qcompile.codegen.kernels.cuda.ring_code import SWIZZLE_128, TENSOR, RingKernel
from qcompile.codegen.kernels.cuda.shared import SharedShape

TENSOR_3D = TENSOR.replace("2d", "3d")


def emit(shape: SharedShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        SharedKernel(shape, epilogue).emit()
    return builder.get()


class SharedKernel(RingKernel):
    """Names of one kernel while it is written."""

    s: SharedShape

    def emit(self) -> None:
        s = self.s
        self._enter(s.blocks_along_n, s.launched, s.overlap and not s.late)
        with T.If(self.tx == 0), T.Then():
            for described in (*self.maps, self.x_map):
                e.ptx("prefetch.tensormap", T.address_of(described))
        with T.If(self.tx == s.threads), T.Then():
            self._start_barriers()
        e.ptx("barrier.cluster.arrive.release.aligned")
        with T.If(self.tx >= s.threads):
            with T.Then():
                self._copy()
            with T.Else():
                self._registers()
                self._loop()
                self._end()

    def _before(self) -> None:
        """Describe x and the weights to the copy engine; it reads zeros beyond their ends."""
        s = self.s
        self.x_map = self._describe(
            "x_map", self.x, "uint8", [s.x_width, self.m], [s.x_width], [128, s.x_rows], SWIZZLE_128
        )
        self.maps = []
        for index, (plane, source) in enumerate(zip(s.layout.planes, self.planes, strict=True)):
            size = plane.block_bytes  # the engine takes up to 256 elements along an axis
            extents, strides = [size // 8, s.blocks, s.tiles], [size, size * s.blocks]
            box = [size // 8, 1, s.block_tiles]
            self.maps.append(self._describe(f"codes_map{index}", source, "uint64", extents, strides, box, 0))

    def _place_block(self, row_blocks: Any) -> None:
        """Channels and rows of this block: neighbours have the same rows."""
        s = self.s
        self.first_row = e.let(self.bx // s.blocks_along_n * s.rows)
        self.first_tile = e.let(self.bx % s.blocks_along_n * s.block_tiles)
        self.rows = e.let(T.min(self.m - self.first_row, s.rows))
        self.start = e.let(self.by * s.per_split)
        self.count = e.let(T.max(T.min(s.blocks - self.start, s.per_split), 0))
        self.mate = e.let(self.bx % s.share)

    def _sync(self) -> None:
        """Of the threads that multiply."""
        e.ptx("bar.sync", e.u32(1), e.u32(self.s.threads))

    # Barriers

    def _start_barriers(self) -> None:
        s = self.s
        for slot in range(s.stages):
            e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot), e.u32(1))
            e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot, empty=True), e.u32(s.threads // 32 * s.share))
        e.ptx("mbarrier.init.shared::cta.b64", self._sums_barrier(), e.u32(1))
        e.ptx("fence.mbarrier_init.release.cluster")
        if s.split > 1:
            mine = s.groups * (self.by + 1) // s.split - s.groups * self.by // s.split
            size = T.cast(mine * ((s.split - 1) * s.sum_bytes), "uint32")
            e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", self._sums_barrier(), size)

    def _sums_barrier(self) -> Any:
        """It counts the sums other blocks send."""
        return self.arena.ptr_to([self.base + (self.s.barrier_place + 16 * self.s.stages) // 4])

    def _remote(self, pointer: Any, rank: Any) -> Any:
        """Address of what lies at ``pointer`` in another block of the cluster."""
        there = e.Registers((1,), "uint32")
        e.ptx("mapa.shared::cluster.u32", there[0], T.cuda.cvta_generic_to_shared(pointer), T.cast(rank, "uint32"))
        return there[0]

    # The copying warp

    def _copy(self) -> None:
        s = self.s
        first = min(s.stages, s.per_split)
        with T.If(self.tx == s.threads), T.Then(), T.serial(T.min(self.count, first)) as stage:
            self._issue_weights(stage, self.start + stage)
        T.evaluate(T.cuda.warp_sync())
        e.ptx("barrier.cluster.wait.acquire.aligned")
        if s.overlap:
            e.await_previous()
        with T.If(self.tx == s.threads), T.Then():
            with T.serial(T.min(self.count, first)) as stage:
                self._issue_rows(stage, self.start + stage)
            with T.serial(T.max(self.count - first, 0)) as more:
                slot = e.let(more % s.stages)
                T.evaluate(T.cuda.mbarrier_wait(self._barrier(slot, empty=True), more // s.stages % 2))
                self._issue_weights(slot, self.start + more + first)
                self._issue_rows(slot, self.start + more + first)
            if s.overlap and s.late:
                e.share_device()

    def _issue_weights(self, slot: Any, block: Any) -> None:
        """Start copying the weights of stage ``block`` into ``slot``, and say what will arrive there."""
        s = self.s
        full = self._barrier(slot)
        size = s.x_bytes + s.block_tiles * s.code_bytes
        e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", full, e.u32(size))
        place = s.x_bytes
        for plane, described in zip(s.layout.planes, self.maps, strict=True):
            at = self.arena.ptr_to([self.base + slot * (s.stage_bytes // 4) + place // 4])
            where = [T.int32(0), T.cast(block, "int32"), T.cast(self.first_tile, "int32")]
            e.ptx(TENSOR_3D, at, T.address_of(described), *where, full)
            place += s.block_tiles * plane.block_bytes

    def _issue_rows(self, slot: Any, block: Any) -> None:
        """Start copying this block's part of the rows of x of stage ``block`` into ``slot`` of all that share them."""
        s = self.s
        part = e.let(self.mate * s.x_rows)
        at = self.arena.ptr_to([self.base + slot * (s.stage_bytes // 4) + part * 32])
        where = [T.cast(block * BLOCK, "int32"), T.cast(self.first_row + part, "int32")]
        tail = [self._barrier(slot)]
        if s.share > 1:
            mates = T.cast(e.u32((1 << s.share) - 1) << T.cast(self.by * s.share, "uint32"), "uint16")
            tail.append(mates)
        name = TENSOR + (".multicast::cluster" if s.share > 1 else "")
        e.ptx(name, at, T.address_of(self.x_map), *where, *tail)

    # The others

    def _loop(self) -> None:
        s = self.s
        e.ptx("barrier.cluster.wait.acquire.aligned")
        if s.overlap:
            e.await_previous()
        self._fetch_factors()
        mate = T.min(self.lane, s.share - 1)
        self.freed = e.let(self._remote(self._barrier(0, empty=True), self.by * s.share + mate))
        # None may be in flight at the end of the loop's body, or ptxas waits for every product (C7513): hence two stages.
        with T.serial(self.count // 2) as pair:
            self._stage(pair * 2)
            self._stage(pair * 2 + 1, lambda: self._release(pair * 2))
            e.ptx("wgmma.wait_group.sync.aligned", 0)
            self._release(pair * 2 + 1)
        with T.If(self.count % 2 == 1), T.Then():
            self._stage(self.count - 1)
            e.ptx("wgmma.wait_group.sync.aligned", 0)
        e.wait(0)
        self._sync()

    def _stage(self, at: Any, release: Any = None) -> None:  # type: ignore[override]
        """Products of a stage."""
        s = self.s
        i = e.let(at)
        slot = e.let(i % s.stages)
        T.evaluate(T.cuda.mbarrier_wait(self._barrier(slot), i // s.stages % 2))
        place = e.let(self.base + slot * (s.stage_bytes // 4))
        self._multiply(place, e.let(place + s.x_bytes // 4), release)

    def _release(self, i: Any) -> None:
        """Stage ``i`` is read: tell the warps that will copy into its slot, one lane for each."""
        s = self.s
        T.evaluate(T.cuda.warp_sync())
        with T.If(T.And(self.lane < s.share, i + s.stages < self.count)), T.Then():
            e.ptx("mbarrier.arrive.shared::cluster.b64", self.freed + T.cast(i % s.stages * 8, "uint32"))

    # Sums

    def _end(self) -> None:
        s = self.s
        if s.split == 1:
            self._store()
            return
        for part in range(s.split):
            with T.If(self.by == part), T.Then():
                self._send(part)
                T.evaluate(T.cuda.mbarrier_wait(self._sums_barrier(), T.int32(0)))
                self._add(part)
                self._store(s.owned(part))

    def _slot(self, sender: int, owner: int) -> int:
        """Bytes from the start of the exchange to the sums of a block for another."""
        return (sender - (sender > owner)) * self.s.most_owned * self.s.sum_bytes

    def _send(self, part: int) -> None:
        """To every other block its part of the sums; four words of a thread lie together."""
        s = self.s
        for owner in range(s.split):
            if owner == part:
                continue
            rank = owner * s.share + self.mate
            place = self.arena.ptr_to([self.base + (s.exchange_place + self._slot(part, owner)) // 4 + self.tx * 4])
            there = e.let(self._remote(place, rank))
            barrier = e.let(self._remote(self._sums_barrier(), rank))
            for index, (j, c) in enumerate(self._quads(owner)):
                words = [self.total[j, c + i] for i in range(4)]
                if self.sum_type == "float32":
                    words = [T.reinterpret("uint32", word) for word in words]
                e.store_remote_vector(there + e.u32(index * 16 * s.threads), words, barrier)

    def _quads(self, owner: int) -> list[tuple[int, int]]:
        """Four sums of a thread each, of the rows of a block."""
        s = self.s
        return [(j, 8 * i + 4 * octet) for i in s.owned(owner) for j in range(s.mt) for octet in range(2)]

    def _add(self, part: int) -> None:
        s = self.s
        words = e.Registers((4,), "uint32")
        for sender in range(s.split):
            if sender == part:
                continue
            for index, (j, c) in enumerate(self._quads(part)):
                place = (s.exchange_place + self._slot(sender, part) + index * 16 * s.threads) // 4
                e.read_shared([words[i] for i in range(4)], self.arena.ptr_to([self.base + place + self.tx * 4]))
                for i in range(4):
                    word = words[i] if self.sum_type == "uint32" else T.reinterpret("float32", words[i])
                    self.total[j, c + i] = self.total[j, c + i] + word
