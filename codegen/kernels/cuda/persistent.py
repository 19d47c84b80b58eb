"""Linear operators on one row: blocks that live as long as the kernel, with the row of x in shared memory.

    a block per multiprocessor (or two), ``kw`` warps that divide K; every block takes groups of ``tn`` channel tiles in turn
    per stage of 128 K:  packed codes and scales           cp.async to shared memory, ``stages - 1`` ahead; the pipeline of a
                                                           warp goes on from one group of tiles to the next without draining
                         codes -> operands -> mma.sync     as in `stream`
    at the end           sums over the warps of all groups, kept in shared memory: no barrier before

Copies of weights start before the kernels that make x have ended. x is read once per block, and so are the sums of x that
zero points are multiplied by, and the table of pairs of levels. Blocks hold no more than one row of x: more rows are for
`stream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.linear import FLOAT8
from qcompile.codegen.kernels.cuda.stream import FLOATS, PAIR_TABLE, StreamLinear, StreamShape, needs_float8
from qcompile.formats import IntFormat
from qcompile.targets.target import Target


@dataclass(frozen=True)
class PersistentShape(StreamShape):
    """Everything static about one kernel; ``rows``, ``nw`` and ``split`` are 1.

    Attributes:
        grid: blocks, at most.
    """

    grid: int = 1
    overlap: bool = True

    @property
    def x_bytes(self) -> int:
        """Of a stage: x is not part of it."""
        return 0

    @property
    def per_warp(self) -> int:
        """Stages of one warp and group of tiles, at most."""
        return -(-self.blocks // self.kw)

    @property
    def launched(self) -> int:
        """Blocks."""
        return min(self.grid, self.grid_n)

    @property
    def turns(self) -> int:
        """Groups of tiles of a block, at most."""
        return -(-self.grid_n // self.launched)

    @property
    def row_place(self) -> int:
        """Bytes of the pipeline; the row of x lies behind it."""
        return self.kw * self.stages * self.stage_bytes

    @property
    def row_bytes(self) -> int:
        """Of x, whole stages."""
        return self.blocks * self.chunks * 16

    @property
    def sums_place(self) -> int:
        """Where sums of x lie, one per scale group (or stage); none unless `raw`."""
        return self.row_place + self.row_bytes

    @property
    def totals_place(self) -> int:
        """Where the sums of all warps lie, for all groups of tiles."""
        return self.sums_place + (4 * self.blocks * (BLOCK // self.chunk) if self.raw else 0)

    @property
    def factor_place(self) -> int:
        """Where the scales of the channels lie, of all groups of tiles."""
        return self.totals_place + 4 * self.turns * self.kw * self.tn * TILE

    @property
    def table_place(self) -> int:
        """Where the table of pairs lies."""
        return -(-(self.factor_place + 4 * self.turns * self.tn * TILE) // 128) * 128

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.table_place + (4 * PAIR_TABLE if self.layout.pairs else 0)

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        return 40 + self.tn * (4 + self.code_bytes // 128) + (4 if self.raw else 0) + (8 if self.levels else 0)


class PersistentLinear(StreamLinear):
    """The formats of `stream.StreamLinear`, one row.

    Config: see `PersistentShape`; ``dtype`` is ``float16`` or ``bfloat16``, ``out`` the type of the result.
    """

    name = "cuda-stream-persistent"

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> PersistentShape:
        keys = ("tn", "kw", "grid", "stages", "raw", "dtype", "out")
        given = {key: config[key] for key in keys}
        return PersistentShape(k=problem.k, n=problem.n, weight=problem.weight, rows=1, nw=1, split=1, **given)

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, best first by `cost`; none for more rows than one."""
        if (problem.m or 1) != 1:
            return []
        blocks = -(-problem.k // BLOCK)
        even = {-(-blocks // per) for per in range(1, blocks + 1)}  # no stage of the slowest warp is wasted
        found = []
        for dtype in self.dtypes:
            raw = dtype == "float16" and isinstance(problem.weight, IntFormat) and problem.weight.bits in (2, 4)
            for kw in sorted(v for v in even if 4 <= v <= 32 or v == max(even)):
                for resident in (1, 2, 3, 4):
                    for tn in (1, 2, 4):
                        for stages in (3, 4, 6, 8):
                            config = {
                                "tn": tn, "kw": kw, "grid": resident * target.multiprocessors, "stages": stages, "raw": raw,
                                "dtype": dtype, "out": dtype if dtype in FLOATS else "float16",
                            }  # fmt: skip
                            if kw <= 32 and self.fits(self.shape(problem, config), target):
                                found.append(config)
        order = {dtype: i for i, dtype in enumerate(self.dtypes)}
        return sorted(found, key=lambda c: (order[c["dtype"]], self.cost(problem, c, target, 1)))

    def fits(self, shape: StreamShape, target: Any) -> bool:
        assert isinstance(shape, PersistentShape)
        resident = max(1, shape.grid // target.multiprocessors)
        return (
            resident * (shape.shared_bytes + 1024) <= target.shared_sm
            and shape.shared_bytes <= target.shared
            and resident * shape.threads * max(32, shape.registers) <= 65536
            and shape.kw <= shape.blocks
            and shape.tn <= shape.tiles
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """The slower of memory and issue slots over the turns of a block, plus start."""
        s = self.shape(problem, config)
        sms = target.multiprocessors
        resident = -(-s.launched // sms)
        stage_bytes = s.tn * (s.code_bytes + 8 * s.meta_bytes * (BLOCK // s.chunk))
        warp_stages = s.turns * s.per_warp * s.kw * resident
        flight = resident * s.kw * min(s.stages - 1, s.turns * s.per_warp) * stage_bytes
        memory = warp_stages * stage_bytes * sms / target.bandwidth * max(1.0, 40000 / flight)
        steps = BLOCK * 2 // s.layout.unit
        slots = warp_stages * (s.tn * steps * (17 if s.levels else 12) + 40) / 4
        warps = resident * s.kw
        issue = slots * max(1.0, 24 / warps) / 1.3 / 1.7e9
        return 2.5e-6 + max(memory, issue) + s.turns * 0.02e-6

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.persistent_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)


class PersistentLinearInt8(PersistentLinear):
    """Those of `stream.StreamLinearInt8`, one row."""

    name = "cuda-stream-persistent-int8"
    dtypes: ClassVar[tuple[str, ...]] = ("int8",)


class PersistentLinearFloat8(PersistentLinear):
    """Those of `stream.StreamLinearFloat8`, one row."""

    name = "cuda-stream-persistent-fp8"
    dtypes: ClassVar[tuple[str, ...]] = (FLOAT8,)

    def _needs(self, target: Target) -> Any:
        return needs_float8(self.name, target)
