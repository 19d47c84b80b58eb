"""Blocks that share a row: words are sent with ``st.async``, and an mbarrier of the receiver counts their bytes.

The barriers lie first in shared memory: one that counts what is exchanged of a row, then two for every reduction, for rows in turn.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda import emit as e

ARRIVED = 0
"""The mbarrier that counts what other blocks send of a row; those after it, two by two, count words of reductions."""


class Cluster:
    """What blocks tell each other; `rowwise_code` sets the names it uses."""

    arena: Any
    tx: Any
    rank: Any
    blocks: int
    parity: Any
    phase: Any

    def _barrier(self, index: Any) -> Any:
        return self.arena.ptr_to([2 * index])

    def _counting(self, reduction: int) -> Any:
        """Index of the mbarrier that counts words of a reduction of this row."""
        return ARRIVED + 1 + 2 * reduction + self.parity

    def _start_barriers(self, count: int) -> None:
        """And let the other blocks know; `_await_others` must come before anything is sent."""
        with T.If(self.tx == 0), T.Then():
            for index in range(count):
                e.ptx("mbarrier.init.shared::cta.b64", self._barrier(index), e.u32(1))
            e.ptx("fence.mbarrier_init.release.cluster")
        e.ptx("barrier.cluster.arrive.release.aligned")

    def _await_others(self) -> None:
        e.ptx("barrier.cluster.wait.acquire.aligned")

    def _expect(self, exchanged: Any, reductions: int, words: int) -> None:
        """How much arrives for one row: bytes at barrier `ARRIVED`, words at those of reductions."""
        with T.If(self.tx == 0), T.Then():
            sizes = [(ARRIVED, exchanged), *((self._counting(i), e.u32(4 * words)) for i in range(reductions))]
            for index, size in sizes:
                e.ptx("mbarrier.arrive.expect_tx.shared::cta.b64", self._barrier(index), size)

    def _remote(self, owner: Any) -> Any:
        """Address of the shared memory of a block of the cluster."""
        there = e.Registers((1,), "uint32")
        here = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([0]))
        e.ptx("mapa.shared::cluster.u32", there[0], here, T.cast(owner, "uint32"))
        return there[0]

    def _tell(self, value: Any, reduction: int, place: Any, thread: Any) -> None:
        """Store a word in all blocks of the row, each by the ``thread`` of its rank, and wait for theirs."""
        with T.If(thread < self.blocks), T.Then():
            there = e.let(self._remote(thread))
            barrier = there + T.cast(8 * self._counting(reduction), "uint32")
            e.store_remote(there + T.cast(place * 4, "uint32"), T.reinterpret("uint32", value), barrier)
        T.evaluate(T.cuda.mbarrier_wait(self._barrier(self._counting(reduction)), self.phase))
