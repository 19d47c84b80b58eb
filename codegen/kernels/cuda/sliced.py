"""Linear operators on one row by integer tensor cores, for integer weights and float activations.

    a block (or ``split`` of a cluster, which divide K) has ``tn`` channel tiles; of K, a warp takes every so many-th 128
    per block of K:     x -> slices of eight bits           once for all tiles (`slices`)
                        codes and scales                    cp.async to shared memory, ``stages - 1`` tiles before they are
                                                            multiplied, read back by the same warp: no barrier. Or, where all
                                                            of a block fit, by bulk copies of what its warps read in a step,
                                                            each counted by an mbarrier: nothing waits in the load units
                        masked bytes -> mma.sync            u8 x s8, 16 channels by 32 positions; exact
                        sum of a group * exponent * scale   float32
    at the end          sums of the warps, in order, through shared memory; each block of the cluster sends the others their share
                        of the channels (`st.async`) and adds up what arrives, in order

Zero points leave before the codes enter: sums start at minus what codes equal to the zero point would give, or, where zero
points differ, the sum of x times the zero point is subtracted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.linear import CudaLinear, LinearShape
from qcompile.formats import Format, IntFormat
from qcompile.targets.target import Target

SLICES = 4
"""Signed bytes of an activation."""

QUADS = 8
"""Operand registers of x in a block of 128: two per product."""

HALF = 5 * 16
"""Words from the slices of quads 0..3 to those of 4..7: writes of all lanes, and reads of 16 bytes, then meet no bank twice."""

EXCHANGE = HALF + SLICES * 16
"""Words a warp exchanges slices through."""


@dataclass(frozen=True)
class SlicedShape(LinearShape):
    """Everything static about one kernel.

    Attributes:
        tn: channel tiles of a block. kw: its warps. split: blocks of a cluster.
        wide: channel tiles a warp multiplies at a time, a divisor of ``tn``: as many chains of products.
        stages: of the pipeline of a warp, ``wide`` channel tiles and a block of K each; a divisor or a multiple of their number.
        overlap: see `stream.StreamShape`.
        early: stages copied before the kernel before has ended, at most; the others are asked for after x, which would wait
            behind them. 0: all.
        late: whether the next kernel may start only after the products, so that its blocks spread over all multiprocessors.
        bulk: whether the stages of all warps are copied together, all of them, whatever ``stages`` a config has; ``wide`` is 1.
    """

    tn: int
    kw: int
    stages: int
    wide: int = 1
    split: int = 1
    overlap: bool = False
    early: int = 0
    late: bool = False
    bulk: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.kw

    @property
    def columns(self) -> int:
        """Channels of a block."""
        return self.tn * TILE

    @property
    def grid_n(self) -> int:
        """Blocks along N."""
        return -(-self.tiles // self.tn)

    @property
    def stride(self) -> int:
        """Warps that divide K."""
        return self.kw * self.split

    @property
    def per_warp(self) -> int:
        """Blocks of K of one warp, at most."""
        return -(-self.blocks // self.stride)

    @property
    def steps(self) -> int:
        """Stages of a block of K."""
        return self.tn // self.wide

    @property
    def cluster(self) -> bool:
        """Whether blocks are launched in clusters, ``split`` along y."""
        return self.split > 1

    @property
    def blocks_of_cluster(self) -> tuple[int, int]:
        """Along x and y."""
        return 1, self.split

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return self.wide * self.tile_bytes

    @property
    def tile_bytes(self) -> int:
        """Of a channel tile in it."""
        return self.code_bytes + 8 * self.meta_bytes * (BLOCK // self.chunk)

    @property
    def exchange_place(self) -> int:
        """Bytes of the pipelines; slices are exchanged behind them."""
        return self.kw * self.stages * self.stage_bytes

    @property
    def totals_place(self) -> int:
        """Where the sums of the warps lie."""
        return self.exchange_place + 4 * EXCHANGE * self.kw

    @property
    def share(self) -> int:
        """Channels a block of a cluster adds up and stores, at most."""
        return -(-self.columns // self.split)

    @property
    def incoming_place(self) -> int:
        """Where the sums of all blocks of the cluster arrive, for the channels of this one."""
        return self.totals_place + 4 * self.kw * self.columns

    @property
    def factor_place(self) -> int:
        """Where the scales of the channels lie."""
        return self.incoming_place + (4 * self.split * self.share if self.cluster else 0)

    @property
    def barrier_place(self) -> int:
        """Where the mbarriers lie: of sums of the cluster, then of bulk copies."""
        return -(-(self.factor_place + 4 * self.columns) // 8) * 8

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.barrier_place + 8 * (self.cluster + self.bulk * self.stages)

    @property
    def even(self) -> bool:
        """Whether all blocks of K have as much metadata, in the order they are read."""
        return not self.meta_bytes or self.meta_groups * self.chunk == self.blocks * BLOCK

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        chunks = BLOCK // self.chunk
        planes = len(self.layout.planes)
        held = self.code_bytes // 128 + chunks * self.meta_bytes // 4 + 4 + 4 * planes
        return 27 + 2 * self.tn + self.wide * held + (QUADS + 4 * chunks) * planes


class SlicedLinear(CudaLinear):
    """Integers of 2, 3, 4 or 8 bits by float activations, one row. Groups of 32 (3 bits: 64) and more, or per channel.

    Config: see `SlicedShape`; ``dtype`` is ``float16`` or ``bfloat16``, ``out`` the type of the result.
    """

    name = "cuda-stream-sliced"
    bits = (2, 3, 4, 8)
    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")

    def _takes(self, fmt: Format) -> Support:
        if not isinstance(fmt, IntFormat):
            return Support(False, f"{self.name} takes integer weights, not {fmt}")
        least = 64 if fmt.bits == 3 else 32
        if fmt.group and fmt.group < least:
            return Support(False, f"{self.name} takes groups from {least} for {fmt.bits} bits, not {fmt.group}")
        return super()._takes(fmt)

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> SlicedShape:
        given = {key: config[key] for key in ("tn", "kw", "stages", "dtype", "out")}
        split = config["split"] if config.get("cluster") else 1  # nothing else adds its sums up
        given |= {"wide": config.get("wide", 1), "split": split, "overlap": bool(config.get("overlap"))}
        given |= {"early": config.get("early", 0)}
        given |= {key: bool(config.get(key)) for key in ("late", "bulk")}
        shape = SlicedShape(k=problem.k, n=problem.n, weight=problem.weight, **given)
        return replace(shape, stages=shape.steps * shape.per_warp) if shape.bulk else shape

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, best first by `cost`; none for more rows than one."""
        if (problem.m or 1) != 1:
            return []
        found = []
        for dtype in self.dtypes:
            for tn in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16):
                for kw, split, wide in itertools.product((4, 8, 16, 32), (1, 2, 4), (1, 2)):
                    for stages in (3, 4, 5, 6, 7, 8, 10, 12, 14, 16):
                        config = {
                            "tn": tn, "kw": kw, "stages": stages, "wide": wide, "split": split, "cluster": split > 1,
                            "dtype": dtype, "out": dtype, "overlap": True,
                        }  # fmt: skip
                        able = tn % wide == 0 and (split == 1 or target.has("tma"))  # clusters came with it
                        if able and self.fits(self.shape(problem, config), target):
                            found.append(config)
        order = {dtype: i for i, dtype in enumerate(self.dtypes)}
        return sorted(found, key=lambda c: (order[c["dtype"]], self.cost(problem, c, target, 1)))

    def fits(self, shape: SlicedShape, target: Any) -> bool:
        return (
            shape.registers <= min(200, 65536 // shape.threads)
            and shape.shared_bytes <= target.shared
            and shape.tn <= shape.tiles
            and (shape.stride <= shape.blocks or (shape.kw == 4 and shape.split == 1))
            and not self.unsound(shape)
        )

    def unsound(self, shape: SlicedShape) -> str:
        if shape.bulk and (shape.wide > 1 or not shape.even):
            return "bulk copies; they take one channel tile at a time, and groups that divide blocks of 128, which divide K"
        if not shape.bulk and (shape.stages < 2 or (shape.steps % shape.stages and shape.stages % shape.steps)):
            return f"{shape.stages} stages; {shape.steps} steps are a multiple or a divisor of them"
        return ""

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """Waves of blocks times the slower of memory and issue slots, plus start."""
        s = self.shape(problem, config)
        sms = target.multiprocessors
        fit = max(
            1,
            min(
                65536 // (s.threads * max(s.registers, 32)),
                2048 // s.threads,
                target.shared_sm // (s.shared_bytes + 1024),
            ),
        )
        work = s.grid_n * m * s.split
        busiest = -(-work // sms)
        resident = min(fit, busiest)
        flight = resident * s.kw * min(s.stages - 1, s.per_warp * s.steps) * s.stage_bytes
        turns = busiest * s.kw * s.per_warp
        memory = turns * s.tn * s.tile_bytes * sms / target.bandwidth * max(1.0, 40000 / flight)
        slots = turns * (70 * len(s.layout.planes) + s.tn * (20 * len(s.layout.planes) + 14 * (BLOCK // s.chunk))) / 4
        issue = slots * max(1.0, 16 / (resident * s.kw)) / 1.7e9
        crowded = 0.5e-6 if 2 * resident > fit else 0.0  # blocks of the next kernel find no place meanwhile
        return 2.2e-6 + max(memory, issue) + crowded + 0.3e-6 * -(-busiest // resident)

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        return 1, 1

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.sliced_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)
