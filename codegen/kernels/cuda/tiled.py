"""Linear operators on many rows: blocks of channels x rows, both operands staged in shared memory.

    a block of ``wg`` groups of four warps owns ``64 wg mt`` channels and ``rows`` rows; warp w of group q owns the channel
    tiles ``(q mt + j) 4 + w``, j < mt, which are rows 16 w .. 16 w + 15 of the j-th 64-channel operand of its group
    per stage of 128 K:  packed codes, scales, rows of x   cp.async by all threads, ``stages - 1`` stages ahead
                         codes -> operand registers        `dequant.ScaledDequantizer`, times the scale of their group
                         wgmma m64nNk16 (Hopper)           weights from registers, x from shared memory; runs while the
                                                           next operand is dequantized
                         or mma.sync m16n8 with ldmatrix   (from Ampere on)
    at the end           the tile is transposed through shared memory and stored in 16-byte pieces; with ``split`` the blocks
                         along K add up their sums in order: a cluster by reading each other's shared memory, otherwise the
                         last one to arrive

The product is ``y^T = W^T x^T``: the operand that may come from registers is the first one, hence the weights. Rows of x
lie in shared memory as `wgmma` wants them with 128-byte swizzling: panels of 128 bytes of K, chunk c of row r at c ^ (r % 8).
PTX ISA, "Asynchronous warpgroup level matrix instructions".

With 8-bit activations and scales per group, the sums of a group are added to float32 sums at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.linear import FLOAT8, CudaLinear, LinearShape
from qcompile.codegen.kernels.cuda.stream import FLOATS, needs_float8
from qcompile.targets.target import Target

LARGEST_CLUSTER = 8
"""Blocks of a cluster that every chip with clusters can place."""

RING_ROWS = 128
"""Blocks of more rows are bound by products, and deep rings of weights are not tried."""

DEEPEST_RING = 32
"""Stages of a ring."""

SHORTEST_RING = 3
"""Stages of rings that do not hold all of a block: two are read while the next is under way."""

RASTER = 8
"""Row blocks that share their channels' weights in the second-level cache."""


@dataclass(frozen=True)
class TiledShape(LinearShape):
    """Everything static about one kernel.

    Attributes:
        rows: rows of x of a block, a multiple of 16.
        wg: groups of four warps. mt: channel tiles of a warp.
        split: blocks along K. stages: of the pipeline, at least 3.
        wgmma: whether products are by warpgroups.
        overlap: as in `stream`.
        cluster: whether blocks along K are a cluster and add up what they find in each other's shared memory.
        ring: stages of weights in shared memory if they are copied apart from x (`ring_code`), else 0.
        resident: blocks that are to fit a multiprocessor, or 0: the compiler then bounds registers.
    """

    rows: int
    wg: int
    mt: int
    split: int
    stages: int
    wgmma: bool
    cluster: bool = False
    overlap: bool = False
    ring: int = 0
    resident: int = 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.wg

    @property
    def columns(self) -> int:
        """Channels of a block."""
        return 64 * self.wg * self.mt

    @property
    def block_tiles(self) -> int:
        """Channel tiles of a block."""
        return self.columns // TILE

    @property
    def grid_n(self) -> int:
        """Blocks along N."""
        return -(-self.n // self.columns)

    @property
    def blocks_of_cluster(self) -> tuple[int, int]:
        """Along x and y."""
        return 1, self.split

    @property
    def per_split(self) -> int:
        """Stages of a block, at most."""
        return -(-self.blocks // self.split)

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.mt * self.rows // 2

    @property
    def grouped_sums(self) -> bool:
        """Whether sums are scaled at the end of a group, rather than operands."""
        return self.narrow and self.scaled

    @property
    def panel_bytes(self) -> int:
        """A panel of x: 128 bytes of every row."""
        return 128 * self.rows

    @property
    def x_bytes(self) -> int:
        """Rows of x of a stage."""
        return self.panel_bytes * self.chunks // 8

    @property
    def stage_chunks(self) -> int:
        """Scale groups of a stage."""
        return BLOCK // self.chunk

    @property
    def stage_meta(self) -> int:
        """Bytes of scales and zero points of a stage."""
        return self.block_tiles * self.stage_chunks * 8 * self.meta_bytes

    @property
    def weight_bytes(self) -> int:
        """Codes and metadata of a stage."""
        return self.block_tiles * self.code_bytes + self.stage_meta

    @property
    def whole(self) -> bool:
        """Whether all weights of a block fit the ring."""
        return self.ring >= self.per_split

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage, a multiple of what swizzled panels are aligned to."""
        weights = 0 if self.ring else self.weight_bytes
        return -(-(self.x_bytes + weights) // 1024) * 1024

    @property
    def ring_place(self) -> int:
        """Where weights lie that are copied apart from x."""
        return self.stages * self.stage_bytes

    @property
    def pitch(self) -> int:
        """Bytes of a row of the tile that is stored; the padding keeps eight rows in different banks."""
        return 2 * self.columns + 16

    @property
    def sum_pitch(self) -> int:
        """Words of a row of sums; with the padding lanes that hold different rows store to different banks."""
        return self.columns + 4

    @property
    def barrier_place(self) -> int:
        """Where the barriers lie, behind the pipeline and the tile that is stored from the same memory."""
        tile = 4 * self.rows * self.sum_pitch if self.cluster else self.rows * self.pitch
        return -(-max(self.ring_place + self.ring * self.weight_bytes, tile) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        """Of a block, with what aligning it may cost."""
        factors = 4 * (self.columns + self.rows) if self.ring else 0
        return self.factor_place + factors + 1024

    @property
    def factor_place(self) -> int:
        """Where kernels with rings keep the scales of their channels and rows, behind the barriers."""
        return self.barrier_place + 16 * (self.stages + self.ring)

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        operands = self.mt * (16 if self.wgmma else 4)
        codes = self.mt * (8 if self.layout.bits == 8 else 4)
        tables = self.table_words + (8 if self.levels else 0)
        return self.sums * (2 if self.grouped_sums else 1) + operands + codes + 4 * self.mt + 36 + tables


class TiledLinear(CudaLinear):
    """Integers of 2, 3, 4 or 8 bits, tables of up to 16 levels, or e4m3, by float activations; any M, N and K.

    Config: see `TiledShape`; ``dtype`` is ``float16`` or ``bfloat16``, ``out`` the type of the result.
    """

    name = "cuda-tiled"
    bits = (2, 3, 4, 8)
    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")

    def _needs(self, target: Target) -> Support:
        if not target.has("cp_async"):
            return Support(False, f"{self.name} needs asynchronous copies to shared memory, which {target} lacks")
        return Support(True)

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> TiledShape:
        keys = ("rows", "wg", "mt", "split", "stages", "wgmma", "dtype", "out")
        given = {key: config[key] for key in keys} | {"overlap": bool(config.get("overlap"))}
        given |= {key: config.get(key, 0) for key in ("ring", "resident")}
        cluster = bool(config.get("cluster")) and config["split"] > 1
        return TiledShape(k=problem.k, n=problem.n, weight=problem.weight, cluster=cluster, **given)

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, for ``problem.m`` rows (64 if unknown), best first by `cost`."""
        m = problem.m or 64
        found = []
        for dtype in self.dtypes:
            for rows in (16, 32, 48, 64, 96, 128, 192, 256):
                if rows >= 2 * m and rows > 16:
                    break
                for wg, mt in ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)):
                    for split in (1, 2, 3, 4, 6, 8):
                        for stages in (3, 4, 5, 6):
                            config = {
                                "rows": rows, "wg": wg, "mt": mt, "split": split, "stages": stages,
                                "wgmma": target.has("wgmma"), "dtype": dtype,
                                "out": dtype if dtype in FLOATS else "float16",
                            }  # fmt: skip
                            if target.has("wgmma") and 1 < split <= LARGEST_CLUSTER:
                                config["cluster"] = True
                            if self.fits(self.shape(problem, config), target):
                                found.append(config)
                            if stages == 3 and rows <= RING_ROWS and target.has("wgmma"):
                                found += self._rings(problem, config, target)
        order = {dtype: i for i, dtype in enumerate(self.dtypes)}
        return sorted(found, key=lambda c: (order[c["dtype"]], self.cost(problem, c, target, m)))

    def _rings(self, problem: LinearProblem, config: dict[str, Any], target: Any) -> list[dict[str, Any]]:
        """A config with rings, as deep as one or two blocks of a multiprocessor may have them."""
        found: list[dict[str, Any]] = []
        for resident, stages in product((2, 1), (4, 8)):
            deep = {**config, "overlap": True, "stages": stages, "ring": 1, "resident": resident}
            one = self.shape(problem, deep)
            fixed = one.shared_bytes - one.barrier_place + one.ring_place
            room = min(target.shared_sm // resident - 1024, target.shared) - fixed
            deep["ring"] = min(room // (one.weight_bytes + 16), one.per_split, DEEPEST_RING)
            if min(one.per_split, stages) <= deep["ring"] and self.fits(self.shape(problem, deep), target):
                found.append(deep)
        return found

    def unsound(self, shape: TiledShape) -> str:
        if shape.ring and not shape.whole and shape.ring < SHORTEST_RING:
            return f"a ring of {shape.ring} stages of weights; it takes {SHORTEST_RING}, or all {shape.per_split}"
        if shape.ring and shape.stages < min(SHORTEST_RING, shape.per_split):
            return f"{shape.stages} stages of x; they take {SHORTEST_RING}, or all {shape.per_split}"
        return ""

    def fits(self, shape: TiledShape, target: Any) -> bool:
        resident = max(1, shape.resident)
        return (
            not self.unsound(shape)
            and shape.shared_bytes <= target.shared
            and resident * (shape.shared_bytes + 1024) <= target.shared_sm
            and shape.registers <= min(255, 65536 // (resident * shape.threads))
            and (shape.grid_n == 1 or shape.columns <= -(-shape.n // 64) * 64)
            and (shape.split == 1 or shape.split <= shape.blocks // 2)
            and not (shape.integer and shape.rows > 224)
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """Waves of blocks times the slowest of memory, caches, tensor cores and issue slots, plus start and reduction."""
        s = self.shape(problem, config)
        if s.ring:
            return self._ring_cost(s, target, m)
        clock = 1.6e9
        sms = target.multiprocessors
        work = s.grid_n * s.split * -(-m // s.rows)
        fit = min(target.shared_sm // (s.shared_bytes + 1024), 65536 // (s.threads * s.registers), 2048 // s.threads)
        resident = min(max(fit, 1), -(-work // sms))
        waves = -(-work // (sms * resident))
        steps = BLOCK // (16 * s.layout.elements // 2)
        rate = 4.0 if s.wgmma else 2.0
        mma = steps * s.wg * s.mt * max(s.rows, 32) / 2 / (rate / 4)
        dequant = s.wg * s.mt * steps * (26 if s.levels else 14 if s.weight.bits < 8 else 8) + 60 * s.wg
        codes = s.block_tiles * (s.code_bytes + 8 * s.meta_bytes * s.stage_chunks)
        caches = (s.x_bytes + codes) / 26
        memory = codes * sms / target.bandwidth * clock * (1 if m <= 4 * s.rows else 0.25)
        flight = resident * (s.stages - 1) * codes
        memory *= max(1.0, 30000 / max(flight, 1)) if m <= s.rows else 1
        stage = max(mma, caches, memory, dequant) + 0.15 * min(mma, dequant)
        # A stage takes as long as its copies need to arrive, shared by those under way.
        stage = max(stage, 1300 / ((s.stages - 1) * resident))
        tail = s.rows * s.columns * 4 / 40 + 1500
        reduction = s.rows * s.columns * 8 * resident / 24 + 2500 if s.split > 1 else 0
        if s.cluster:
            reduction = s.rows * s.columns * 4 * resident / 24 + 1200
        return (waves * (resident * (s.per_split * stage + tail) + reduction) + 3000) / clock

    def _ring_cost(self, s: TiledShape, target: Any, m: int) -> float:
        """Start and end, and between them the slowest of memory, caches, tensor cores and the chain of stages of a block."""
        clock, sms = 1.7e9, target.multiprocessors
        work = s.grid_n * s.split * -(-m // s.rows)
        fit = min(target.shared_sm // (s.shared_bytes + 1024), 65536 // (s.threads * s.registers), 2048 // s.threads)
        resident = max(1, min(fit, -(-work // sms)))
        waves = -(-work // (sms * resident))
        stages = waves * resident * s.per_split  # of a multiprocessor
        memory = stages * s.weight_bytes * sms / target.bandwidth * (1 if m <= 4 * s.rows else 0.25)
        caches = stages * (s.weight_bytes + min(m, s.rows) * s.chunks * 16) * sms / 5.5e12
        products = stages * s.columns * BLOCK * max(s.rows, 32) / (3300 if s.narrow else 1650) / clock
        chain = stages * (180 + s.mt * s.rows * 2) / min(resident, 2) / clock
        early = s.ring / s.per_split if s.overlap and fit >= 2 * resident and s.ring <= s.per_split else 0
        ends = (1.2e-6 if s.split > 1 else 0.5e-6) + 4 * s.rows * s.columns * resident / 40 / clock
        return 1.35 * (1.5e-6 + max(memory * (1 - 0.4 * early), caches, products, chain) + waves * ends)

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        s = self.shape(problem, config)
        if s.split == 1 or s.cluster:
            return 1, 1
        blocks = s.grid_n * -(-m // s.rows)
        return blocks * s.split * s.rows * s.columns, blocks

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.tiled_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)


class TiledLinearInt8(TiledLinear):
    """Integers of 2, 3, 4 or 8 bits or dual4 by int8 activations with a scale per row; int32 sums are exact."""

    name = "cuda-tiled-int8"
    bits = (2, 3, 4, 8)
    dtypes = ("int8",)


class TiledLinearFloat8(TiledLinear):
    """Weights that e4m3 represents by e4m3 activations with a scale per row."""

    name = "cuda-tiled-fp8"
    dtypes = (FLOAT8,)

    def _needs(self, target: Target) -> Support:
        return needs_float8(self.name, target)
