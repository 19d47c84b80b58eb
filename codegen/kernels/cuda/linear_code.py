"""What the code of all linear kernels has: operands, threads and shared memory."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e


class LinearCode:
    """Names of one kernel while it is written.

    Attributes:
        s: its `LinearShape`.
    """

    s: Any
    epilogue: Epilogue

    def __init__(self, shape: Any, epilogue: Epilogue) -> None:
        self.s, self.epilogue = shape, epilogue

    def _parameters(self) -> None:
        s = self.s
        self.m = T.int32()
        self.x = e.argument("x", (self.m, s.x_width), s.dtype)
        self.x_scale = e.argument("x_scale", (self.m,), "float32") if s.narrow else None
        per_plane = [s.tiles * s.blocks * p.block_bytes for p in s.layout.planes]
        self.planes = [e.argument(f"codes{i}", (size,), "uint8") for i, size in enumerate(per_plane)]
        if s.meta_bytes:
            self.meta = e.argument("meta", (s.tiles * s.meta_groups * 8 * s.meta_bytes,), "uint8")
        self.levels = e.argument("table", (s.table_words,), "uint32") if s.levels else None
        self._tail_parameters()

    def _tail_parameters(self) -> None:
        """Those of the epilogue, of sums over splits of K, and the output."""
        s = self.s
        self.column = e.argument("column", (s.n,), "float32")
        self.bias = e.argument("bias", (s.n,), "float32") if self.epilogue.bias else None
        self.residual = e.argument("residual", (self.m, s.n), s.out) if self.epilogue.residual else None
        self.partial = e.argument("partial", (T.int32(),), "float32")
        self.arrived = e.argument("arrived", (T.int32(),), "int32")
        self.out = e.argument("out", (self.m, s.n), s.out)

    def _threads(self, count: int, share: bool) -> None:
        """Threads of a block and its memory; ``share``: the next kernel may start as soon as this one has."""
        self.tx = T.thread_id([count])
        if share:
            e.share_device()
        self.arena = e.shared(self.s.shared_bytes)
        self.lane = e.let(self.tx % 32)
        self.warp = e.let(self.tx // 32)
