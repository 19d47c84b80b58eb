"""Linear operators on few rows: weights stream from memory through registers into the tensor cores.

    warp (wn, wk) of a block owns ``tn`` tiles of 16 channels and a contiguous part of K
    per stage of 128 K:  packed codes, scales, rows of x   cp.async to shared memory, several stages ahead, read back by
                                                           the same warp: no barrier inside the loop
                         codes -> operand registers        `dequant`, `tables`
                         mma.sync m16n8                    weights first, up to 8 rows of x per instruction
                         sum of a group * scale            float32, so that codes enter the product exactly
    at the end           sum over wk in shared memory; over blocks that share channels (``split``) the last one to
                         arrive adds all partial sums in order: the result does not depend on timing

With ``raw``, codes are not turned into numbers around zero: the tensor cores multiply them as subnormal numbers, and a
tile of ones gives ``sum x`` for the zero points (`dequant.RawDequantizer`).

Deep pipelines of asynchronous copies and offline-permuted weights: Frantar et al., "MARLIN: Mixed-precision
auto-regressive parallel inference on large language models", 2024. Split along K with a fix-up: Osama et al., "Stream-K",
2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.linear import FLOAT8, CudaLinear, LinearShape
from qcompile.formats import IntFormat
from qcompile.targets.target import Target

ROWS = 8
"""Rows of x one instruction takes."""

FLOATS = ("float16", "bfloat16")

PAIR_TABLE = 256 * 32
"""Words of a table of pairs of levels with a copy for every lane; see `tables.PairDequantizer`."""


@dataclass(frozen=True)
class StreamShape(LinearShape):
    """Everything static about one kernel.

    Attributes:
        rows: rows of x a block holds: 1, or a multiple of 8.
        tn: channel tiles of a warp.
        nw, kw: warps of a block along N and K. split: blocks along K. stages: of the pipeline.
        raw: whether codes are multiplied as subnormal numbers.
        overlap: whether the kernel starts while the one before in the stream ends, where the chip can: launches cost less,
            but blocks that start early may share multiprocessors unevenly.
    """

    rows: int
    tn: int
    nw: int
    kw: int
    split: int
    stages: int
    raw: bool
    overlap: bool = False

    @property
    def mt(self) -> int:
        """Groups of 8 rows."""
        return -(-self.rows // ROWS)

    @property
    def per_warp(self) -> int:
        """Stages of one warp, at most."""
        return -(-self.blocks // (self.split * self.kw))

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.nw * self.kw

    @property
    def columns(self) -> int:
        """Channels of a block."""
        return self.nw * self.tn * TILE

    @property
    def grid_n(self) -> int:
        """Blocks along N."""
        return -(-self.n // self.columns)

    @property
    def x_bytes(self) -> int:
        """Shared memory of the rows of x of one warp for one stage."""
        return self.rows * self.chunks * 16

    @property
    def tile_bytes(self) -> int:
        """Shared memory of one channel tile for one stage."""
        return self.code_bytes + 32 * self.meta_bytes * (BLOCK // self.chunk)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one warp for one stage."""
        return self.x_bytes + self.tn * self.tile_bytes

    @property
    def table_place(self) -> int:
        """Bytes of the pipeline, or afterwards of the sums of all warps; the table of pairs lies behind them."""
        warps = self.nw * self.kw
        return max(warps * self.stages * self.stage_bytes, warps * self.tn * self.mt * 4 * 32 * 4)

    @property
    def factor_place(self) -> int:
        """Where the scales of the channels and rows of a block lie."""
        return self.table_place + (4 * PAIR_TABLE if self.layout.pairs else 0)

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.factor_place + 4 * (self.columns + self.rows)

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        sums = self.tn * self.mt * 4 + (4 * self.mt if self.raw else 0)
        extra = self.table_words + (8 if self.levels else 0)
        return sums * (2 if self.scaled or self.raw else 1) + self.mt * 4 + 8 * self.tn + 44 + extra


class StreamLinear(CudaLinear):
    """Integers of 2, 3, 4 or 8 bits, tables of up to 16 levels, or e4m3, by float activations; any M, N and K.

    Config: see `StreamShape`; ``dtype`` is ``float16`` or ``bfloat16``, ``out`` the type of the result.
    """

    name = "cuda-stream"
    bits = (2, 3, 4, 8)
    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> StreamShape:
        keys = ("rows", "tn", "nw", "kw", "split", "stages", "raw", "dtype", "out")
        given = {key: config[key] for key in keys} | {"overlap": bool(config.get("overlap"))}
        return StreamShape(k=problem.k, n=problem.n, weight=problem.weight, **given)

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, for ``problem.m`` rows (1 if unknown), best first by `cost`; blocks of up to 64 rows."""
        m = problem.m or 1
        wanted = next((t for t in (1, 8, 16, 32, 64) if t >= m), 64)
        # Blocks that hold all rows; where they do not fit the chip, blocks of fewer.
        smaller = (t for t in (64, 32, 16, 8, 1) if t <= wanted)
        found: list[dict[str, Any]] = next((f for t in smaller if (f := self._fitting(problem, target, t))), [])
        order = {dtype: i for i, dtype in enumerate(self.dtypes)}
        return sorted(found, key=lambda c: (order[c["dtype"]], self.cost(problem, c, target, m)))

    def _fitting(self, problem: LinearProblem, target: Any, rows: int) -> list[dict[str, Any]]:
        """All configs with blocks of ``rows`` rows that fit the chip."""
        found = []
        for dtype in self.dtypes:
            for tn in (1, 2, 4):
                for nw, kw in ((1, 4), (2, 4), (1, 8), (4, 2), (2, 2), (4, 1), (8, 1), (1, 5), (1, 6), (1, 7)):
                    for split in (1, 2, 3, 4, 6, 8, 16):
                        for stages in (3, 4, 6, 8):
                            config = {
                                "rows": rows, "tn": tn, "nw": nw, "kw": kw, "split": split, "stages": stages,
                                "raw": dtype == "float16" and rows <= 8 and isinstance(problem.weight, IntFormat)
                                and problem.weight.bits in (2, 4),
                                "dtype": dtype, "out": dtype if dtype in FLOATS else "float16",
                            }  # fmt: skip
                            if self.fits(self.shape(problem, config), target):
                                found.append(config)
        return found

    def fits(self, shape: StreamShape, target: Any) -> bool:
        return (
            shape.shared_bytes <= target.shared
            and shape.registers <= min(255, 65536 // shape.threads)
            and shape.tn * (shape.nw - 1) < shape.tiles
            and (shape.split * shape.kw <= shape.blocks or shape.split * shape.kw == 1)
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """Waves of blocks times the slower of memory, tensor cores and issue slots, plus start and reduction."""
        s = self.shape(problem, config)
        sms = target.multiprocessors
        work = s.grid_n * s.split * -(-m // s.rows)
        fit = max(
            1,
            min(
                target.shared_sm // (s.shared_bytes + 1024),
                65536 // (s.threads * max(s.registers, 32)),
                2048 // s.threads,
            ),
        )
        resident = min(fit, -(-work // sms))
        waves = -(-work // (sms * resident))
        stage_bytes = s.tn * (s.code_bytes + 32 * s.meta_bytes // 4)
        streamed = waves * resident * s.threads // 32 * s.per_warp * stage_bytes * sms
        flight = resident * s.threads // 32 * min(s.stages - 1, s.per_warp) * stage_bytes
        memory = streamed / target.bandwidth * max(1.0, 32768 / max(flight, 1))
        mma = waves * resident * s.threads // 32 * s.per_warp * s.tn * 8 * s.mt / 4 * 8 / 1.7e9
        rows_of_x = waves * resident * s.threads // 32 * s.per_warp * s.x_bytes * sms / (target.bandwidth * 1.3)
        reduction = 1e-6 + 4e-13 * m * s.n * s.split if s.split > 1 else 0
        return 2e-6 + max(memory + 0.5 * rows_of_x, mma) + reduction + 0.3e-6 * waves

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        s = self.shape(problem, config)
        if s.split == 1:
            return 1, 1
        return s.split * m * s.n, s.grid_n * -(-m // s.rows)

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.stream_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)


class StreamLinearInt8(StreamLinear):
    """Integers of 2, 3, 4 or 8 bits or dual4 by int8 activations with a scale per row; int32 sums are exact.

    Unlike on x86, ``x`` holds signed codes.
    """

    name = "cuda-stream-int8"
    bits = (2, 3, 4, 8)
    dtypes = ("int8",)


class StreamLinearFloat8(StreamLinear):
    """Weights that e4m3 represents by e4m3 activations with a scale per row."""

    name = "cuda-stream-fp8"
    dtypes = (FLOAT8,)

    def _needs(self, target: Target) -> Support:
        return needs_float8(self.name, target)


def needs_float8(name: str, target: Target) -> Support:
    """Tensor cores for e4m3 came with sm_89."""
    return Support(target.has("fp8"), f"{name} needs tensor cores that multiply e4m3 numbers, which {target} lacks")
