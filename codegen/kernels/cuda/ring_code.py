"""The loop of `tiled.TiledLinear` with weights in a ring of their own.

    weights   `cp.async` by all threads, as in `tiled_code`
    x         `cp.async.bulk.tensor` by one thread, swizzled on the way

An mbarrier per slot says that its contents have arrived, another one that all threads have read them. PTX ISA, "Data movement
and conversion instructions: tensor copy".

Weights are asked for before the kernels that make x have ended: where the ring holds all weights of a block
(`TiledShape.whole`) and two blocks fit a multiprocessor, memory works through the end of the kernel before.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.layout import BLOCK
from qcompile.codegen.kernels.cuda.tiled_code import Kernel

TENSOR = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"

SWIZZLE_128 = 3
"""CU_TENSOR_MAP_SWIZZLE_128B; 16-byte chunk c of row r of a panel lies at c ^ (r % 8)."""


class RingKernel(Kernel):
    """Names of one kernel while it is written; products are by warpgroups."""

    def _before(self) -> None:
        """Describe x to the copy engine: panels of 128 bytes of the rows one block reads; zeros beyond its end."""
        s = self.s
        size = 1 if s.narrow else 2
        kind = "uint8" if s.narrow else s.dtype
        extents, strides, box = [s.x_width, self.m], [s.x_width * size], [128 // size, s.rows]
        self.x_map = self._describe("x_map", self.x, kind, extents, strides, box, SWIZZLE_128)

    def _describe(
        self, name: str, source: Any, kind: str, extents: list[Any], strides: list[Any], box: list[int], swizzle: int
    ) -> Any:
        """A tensor map; strides in bytes, all but the innermost."""
        rank = len(extents)
        found = T.Var(name, ty=T.handle("tensormap").ty)
        B.Bind(T.tvm_stack_alloca("tensormap", 1), var=found)
        T.evaluate(
            T.tensormap_encode_tiled(
                found,
                source.data,
                *[T.cast(v, "uint64") for v in (*extents, *strides)],
                *[T.uint32(v) for v in (*box, *[1] * rank)],
                descriptor_dtype=kind,
                rank=rank,
                swizzle=swizzle,
                l2_promotion=2,
            )
        )
        return found

    def _loop(self) -> None:
        s = self.s
        self._start_barriers()
        early = s.ring if s.whole else s.ring - 2
        ahead = s.stages if s.stages >= s.per_split else s.stages - 2
        with T.serial(T.min(self.count, early)) as stage:
            self._issue_ring(stage, self.start + stage)
        e.ptx("prefetch.tensormap", T.address_of(self.x_map))
        if s.overlap:
            e.await_previous()
        for stage in range(min(ahead, s.per_split)):
            with T.If(T.And(self.warp == stage % (s.threads // 32), self.count > stage)), T.Then():
                self._issue_rows(T.int32(stage), self.start + stage)
        self._fetch_factors()
        # None may be in flight at the end of the loop's body, or ptxas waits for every product (C7513): hence two stages.
        with T.serial(self.count // 2) as pair:
            for i in (pair * 2, pair * 2 + 1):
                self._stage(i, early, ahead)
            e.ptx("wgmma.wait_group.sync.aligned", 0)
            for i in (pair * 2, pair * 2 + 1):
                e.ptx("mbarrier.arrive.shared::cluster.b64", self._barrier(i % s.stages, empty=True))
                if not s.whole:
                    e.ptx("mbarrier.arrive.shared::cluster.b64", self._ring_barrier(i % s.ring, empty=True))
        with T.If(self.count % 2 == 1), T.Then():
            self._stage(self.count - 1, early, ahead)
            e.ptx("wgmma.wait_group.sync.aligned", 0)
        e.wait(0)

    def _stage(self, at: Any, early: int, ahead: int) -> None:
        """Products of a stage; and the slots of the pair before, which all threads leave, are filled again."""
        s = self.s
        i = e.let(at)
        slot, place = e.let(i % s.stages), e.let(i % s.ring)
        T.evaluate(T.cuda.mbarrier_wait(self._ring_barrier(place), i // s.ring % 2))
        T.evaluate(T.cuda.mbarrier_wait(self._barrier(slot), i // s.stages % 2))
        weights = e.let(self.base + s.ring_place // 4 + place * (s.weight_bytes // 4))
        self._multiply(e.let(self.base + slot * (s.stage_bytes // 4)), weights)
        if ahead < s.per_split:
            following = e.let((i + ahead) % s.stages)
            with T.If(T.And(self.warp == i % (s.threads // 32), i + ahead < self.count)), T.Then():
                self._await_empty(i, s.stages, self._barrier(following, empty=True))
                self._issue_rows(following, self.start + i + ahead)
        if not s.whole:
            refilled = e.let((i + early) % s.ring)
            with T.If(i + early < self.count), T.Then():
                self._await_empty(i, s.ring, self._ring_barrier(refilled, empty=True))
                self._issue_ring(refilled, self.start + i + early)

    def _await_empty(self, i: Any, slots: int, barrier: Any) -> None:
        """Wait until nobody reads stage ``i - 2`` any more."""
        with T.If(i > 1), T.Then():
            T.evaluate(T.cuda.mbarrier_wait(barrier, (i - 2) // slots % 2))

    def _fetch_factors(self) -> None:
        """Scales of channels and rows, so that the end of the kernel does not wait for them."""
        s = self.s
        self.factors = e.let(self.base + s.factor_place // 4)
        sources = [(s.columns, self.column, self.first_tile * 16, s.n)]
        if self.x_scale is not None:
            sources.append((s.rows, self.x_scale, self.first_row, self.m))
        place = 0
        for count, source, first, end in sources:
            for i in range(-(-count // s.threads)):
                index = e.let(self.tx + i * s.threads)
                with T.If(T.And(index < count, first + index < end)), T.Then():
                    at = self.arena.ptr_to([self.factors + place + index])
                    e.copy_async(at, source.ptr_to([first + index]), 4)
            place += count
        e.commit()

    def _factor(self, n: Any) -> Any:
        word = self.arena[self.factors + n - self.first_tile * 16]
        return T.reinterpret("float32", word) * T.float32(1 if self.s.narrow else 2.0 ** self.dequantizers[0].exponent)

    def _row_factor(self, row: Any) -> Any:
        return T.reinterpret("float32", self.arena[self.factors + self.s.columns + row - self.first_row])

    # Barriers

    def _start_barriers(self) -> None:
        s = self.s
        with T.If(self.tx == 0), T.Then():
            for slot in range(s.stages):
                e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot), e.u32(1))
                e.ptx("mbarrier.init.shared::cta.b64", self._barrier(slot, empty=True), e.u32(s.threads))
            for slot in range(s.ring):
                e.ptx("mbarrier.init.shared::cta.b64", self._ring_barrier(slot), e.u32(s.threads))
                e.ptx("mbarrier.init.shared::cta.b64", self._ring_barrier(slot, empty=True), e.u32(s.threads))
            e.ptx("fence.mbarrier_init.release.cluster")
        T.evaluate(T.cuda.cta_sync())

    def _ring_barrier(self, slot: Any, empty: bool = False) -> Any:
        """Address of a barrier of a slot of weights."""
        place = (self.s.barrier_place + 16 * self.s.stages + (8 * self.s.ring if empty else 0)) // 4
        return self.arena.ptr_to([self.base + place + slot * 2])

    # Copies

    def _issue_rows(self, slot: Any, block: Any) -> None:
        """Start copying the rows of x of stage ``block`` into ``slot``; for one warp."""
        s = self.s
        full = self._barrier(slot)
        with T.If(self.lane == 0), T.Then():
            e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", full, e.u32(s.x_bytes))
            elements = BLOCK * 8 // s.chunks
            for panel in range(s.chunks // 8):
                at = self.base + slot * (s.stage_bytes // 4) + panel * (s.panel_bytes // 4)
                where = [self.arena.ptr_to([at]), T.address_of(self.x_map)]
                k = T.cast(block * BLOCK + panel * elements, "int32")
                e.ptx(TENSOR, *where, k, T.cast(self.first_row, "int32"), full)

    def _issue_ring(self, slot: Any, block: Any) -> None:
        """Start copying the weights of stage ``block`` into ``slot``, by all threads."""
        s = self.s
        self._issue_codes(e.let(self.base + s.ring_place // 4 + slot * (s.weight_bytes // 4)), block)
        e.ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64", self._ring_barrier(slot))
