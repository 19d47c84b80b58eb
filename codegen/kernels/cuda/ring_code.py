"""The loop of `tiled.TiledLinear` with weights in a ring of their own, deeper than that of x.

Bulk copies (`cp.async.bulk`, PTX ISA) bring the codes of a channel tile and stage, which are contiguous; an mbarrier counts
their bytes. They need one thread each and start before the kernels that make x have ended: where the ring holds all weights
of a block (`TiledShape.whole`) and two blocks fit a multiprocessor, memory works through the end of the kernel before.
x comes by `cp.async` as in `tiled_code`; its barrier does not wait for weights that were asked for earlier.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.tiled_code import Kernel

BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


class RingKernel(Kernel):
    """Names of one kernel while it is written; products are by warpgroups."""

    def _loop(self) -> None:
        s = self.s
        ahead = s.stages - 1
        early = s.ring if s.whole else s.ring - 1
        self._start_barriers()
        warps = s.threads // 32
        with T.serial(-(-min(early, s.per_split) // warps)) as turn:
            stage = e.let(turn * warps + self.warp)
            with T.If(T.And(stage < early, stage < self.count)), T.Then():
                self._issue_ring(stage, self.start + stage)
        if s.overlap:
            e.await_previous()
        for stage in range(ahead):
            with T.If(self.count > stage), T.Then():
                self._issue_x(T.int32(stage), self.start + stage)
            self._landed(stage)
        with T.serial(self.count) as i:
            slot, place = e.let(i % s.stages), e.let(i % s.ring)
            following = e.let((i + ahead) % s.stages)  # also the slot of the stage before
            refilled = e.let((i + early) % s.ring)  # likewise
            T.evaluate(T.cuda.mbarrier_wait(self._ring_barrier(place), i // s.ring % 2))
            T.evaluate(T.cuda.mbarrier_wait(self._barrier(slot), i // s.stages % 2))
            # What cp.async wrote is read by wgmma, that is, through the asynchronous proxy.
            e.ptx("fence.proxy.async.shared::cta")

            weights = e.let(self.base + s.ring_place // 4 + place * (s.weight_bytes // 4))
            self._multiply(e.let(self.base + slot * (s.stage_bytes // 4)), weights)
            with T.If(i + ahead < self.count), T.Then():
                with T.If(i > 0), T.Then():
                    T.evaluate(T.cuda.mbarrier_wait(self._barrier(following, empty=True), (i - 1) // s.stages % 2))
                self._issue_x(following, self.start + i + ahead)
                self._landed(following)
            if not s.whole:
                with T.If(T.And(i + early < self.count, self.warp == i % warps)), T.Then():
                    with T.If(i > 0), T.Then():
                        empty = self._ring_barrier(refilled, empty=True)
                        T.evaluate(T.cuda.mbarrier_wait(empty, (i - 1) // s.ring % 2))
                    self._issue_ring(refilled, self.start + i + early)
            # None may be in flight at the end of the loop's body, or ptxas waits for every product (C7513).
            e.ptx("wgmma.wait_group.sync.aligned", 0)
            e.ptx("mbarrier.arrive.shared::cluster.b64", self._barrier(slot, empty=True))
            if not s.whole:
                e.ptx("mbarrier.arrive.shared::cluster.b64", self._ring_barrier(place, empty=True))

    def _start_barriers(self) -> None:
        s = self.s
        with T.If(self.tx == 0), T.Then():
            for slot in range(s.stages):
                for empty in (False, True):
                    e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot, empty), e.u32(s.threads))
            for slot in range(s.ring):
                e.ptx("mbarrier.init.shared::cta.b64", self._ring_barrier(slot), e.u32(1))
                e.ptx("mbarrier.init.shared::cta.b64", self._ring_barrier(slot, empty=True), e.u32(s.threads))
            e.ptx("fence.mbarrier_init.release.cluster")
        T.evaluate(T.cuda.cta_sync())

    def _ring_barrier(self, slot: Any, empty: bool = False) -> Any:
        """Address of a barrier of a slot of weights."""
        place = (self.s.barrier_place + 16 * self.s.stages + (8 * self.s.ring if empty else 0)) // 4
        return self.arena.ptr_to([self.base + place + slot * 2])

    def _issue_ring(self, slot: Any, block: Any) -> None:
        """Start copying the weights of stage ``block`` into ``slot``: a lane of this warp for every channel tile."""
        s = self.s
        full = self._ring_barrier(slot)
        mine = e.let(self.first_tile + self.lane)
        tiles = e.let(T.min(s.tiles - self.first_tile, s.block_tiles))
        per_tile = s.weight_bytes // s.block_tiles
        with T.If(self.lane == 0), T.Then():
            size = T.cast(tiles * per_tile, "uint32")
            e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", full, size)
        with T.If(self.lane < tiles), T.Then():
            base = e.let(self.base + s.ring_place // 4 + slot * (s.weight_bytes // 4))
            place = 0
            for plane, source in zip(s.layout.planes, self.planes):
                here = source.ptr_to([(mine * s.blocks + block) * plane.block_bytes])
                at = base + place // 4 + self.lane * (plane.block_bytes // 4)
                e.ptx(BULK, self.arena.ptr_to([at]), here, e.u32(plane.block_bytes), full)
                place += s.block_tiles * plane.block_bytes
            for chunk in range(s.stage_chunks if s.meta_bytes else 0):
                group = T.int32(0)
                if s.group:
                    group = T.min((block * s.stage_chunks + chunk) * s.chunk // s.group, s.meta_groups - 1)
                here = self.meta.ptr_to([(mine * s.meta_groups + group) * (8 * s.meta_bytes)])
                at = base + place // 4 + (self.lane * s.stage_chunks + chunk) * (2 * s.meta_bytes)
                e.ptx(BULK, self.arena.ptr_to([at]), here, e.u32(8 * s.meta_bytes), full)
