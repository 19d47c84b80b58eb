"""Linear operators on 16 to 128 rows of 8-bit activations whose blocks share what they read and what they add up.

    a cluster is ``share`` blocks along N by ``split`` along K, each with the channels and rows of a block of `tiled`
    one warp        copies: weights of the block and its part of x, one `cp.async.bulk.tensor` each per stage of 128 K; x goes
                    to all ``share`` blocks at once (multicast), so that the second-level cache is read ``1 / share`` as often
    the other warps codes -> operand registers -> wgmma, as in `tiled`
    at the end      block j of ``split`` owns a part of the rows: the others send it theirs of the sums (`st.async`), which an
                    mbarrier of the owner counts; lane by lane, so that nothing is transposed on the way

A slot of the pipeline is free when the warps of all blocks it is shared with have read it; only the copying warp waits for that.
PTX ISA, "Data movement and conversion instructions: tensor copy" and "st.async".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE
from qcompile.codegen.kernels.cuda.tiled import (
    LARGEST_CLUSTER,
    TiledLinear,
    TiledLinearFloat8,
    TiledLinearInt8,
    TiledShape,
)
from qcompile.formats import Format
from qcompile.targets.target import Target

MOST_ROWS = 128
"""Of a block."""

DEEPEST = 16
"""Stages of a pipeline."""

RAGGED = 12
"""Multiprocessors that clusters of more than two may leave idle: those of a chip's parts are not a multiple of the cluster."""


@dataclass(frozen=True)
class SharedShape(TiledShape):
    """Everything static about one kernel.

    Attributes:
        share: blocks along N that share their rows of x.
        late: whether the next kernel may start only when the last copies are asked for, so that its blocks, which begin with
            theirs, spread over all multiprocessors.
    """

    share: int = 1
    late: bool = False

    @property
    def launched(self) -> int:
        """Threads of a block, the copying warp included."""
        return self.threads + 32

    @property
    def blocks_of_cluster(self) -> tuple[int, int]:
        """Along x and y."""
        return self.share, self.split

    @property
    def blocks_along_n(self) -> int:
        """Blocks along N, those included that only complete a cluster."""
        return -(-self.grid_n // self.share) * self.share

    @property
    def x_rows(self) -> int:
        """Rows of x a block copies."""
        return self.rows // self.share

    @property
    def groups(self) -> int:
        """Of 16 rows."""
        return self.rows // TILE

    def owned(self, part: int) -> range:
        """Groups of rows whose sums block ``part`` of those along K adds up."""
        return range(self.groups * part // self.split, self.groups * (part + 1) // self.split)

    @property
    def sum_bytes(self) -> int:
        """Sums of a group of rows."""
        return 4 * TILE * self.columns

    @property
    def most_owned(self) -> int:
        """Groups of a block, at most."""
        return max(len(self.owned(part)) for part in range(self.split))

    @property
    def exchange_place(self) -> int:
        """Where sums of other blocks arrive, behind the pipeline."""
        return self.stages * self.stage_bytes

    @property
    def barrier_place(self) -> int:
        """Behind those, and the tile that is stored from the memory of the pipeline."""
        exchange = (self.split - 1) * self.most_owned * self.sum_bytes
        return max(self.exchange_place + exchange, TILE * self.most_owned * self.pitch)

    @property
    def factor_place(self) -> int:
        """Where the scales of channels and rows lie; one more barrier counts sums."""
        return self.barrier_place + 16 * self.stages + 16

    @property
    def shared_bytes(self) -> int:
        """Of a block, with what aligning it may cost."""
        return self.factor_place + 4 * (self.columns + self.rows) + 1024

    @property
    def registers(self) -> int:
        """Rough count per thread; another warp has the addresses of copies."""
        return super().registers - 12

    @property
    def most_registers(self) -> int:
        """Of a thread, so that the blocks fit: a quarter of a multiprocessor has 512 for every lane, and whole warps."""
        warps = -(-max(1, self.resident) * self.launched // 128)
        return min(255, 512 // warps // 8 * 8)


class _Shared(TiledLinear):
    """8-bit activations with a scale per row by weights with a scale per channel. Config: see `SharedShape`."""

    def _needs(self, target: Target) -> Support:
        if not (target.has("wgmma") and target.has("tma")):
            return Support(False, f"{self.name} needs wgmma and tensor copies, which {target} lacks")
        return super()._needs(target)

    def _takes(self, fmt: Format) -> Support:
        if fmt.group or not getattr(fmt, "symmetric", True):
            return Support(False, f"{self.name} takes symmetric weights with a scale per channel, not {fmt}")
        return super()._takes(fmt)

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> SharedShape:
        keys = ("rows", "wg", "mt", "split", "stages", "wgmma", "share", "dtype", "out")
        given = {key: config[key] for key in keys} | {key: bool(config.get(key)) for key in ("overlap", "late")}
        resident = config.get("resident", 0)
        return SharedShape(k=problem.k, n=problem.n, weight=problem.weight, cluster=True, resident=resident, **given)

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, for ``problem.m`` rows (64 if unknown), best first by `cost`."""
        m = problem.m or 64
        found = []
        heights = [rows for rows in (16, 32, 64, MOST_ROWS) if rows < 2 * m or rows == 16]
        for rows, (wg, mt), split, share, resident in product(
            heights, ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)), range(1, 9), (1, 2, 4), (1, 2)
        ):
            config = {
                "rows": rows, "wg": wg, "mt": mt, "split": split, "share": share, "stages": 2, "wgmma": True,
                "cluster": True, "overlap": True, "resident": resident, "dtype": self.dtypes[0], "out": "float16",
            }  # fmt: skip
            if rows % (8 * share) or split > rows // TILE:
                continue
            shape = self.shape(problem, config)
            room = min(target.shared, target.shared_sm // resident - 1024) - shape.shared_bytes
            stages = min(2 + room // (shape.stage_bytes + 16), shape.per_split, DEEPEST)
            config["stages"] = stages
            if stages >= min(4, shape.per_split) and self.fits(self.shape(problem, config), target):
                found.append(config)
        return sorted(found, key=lambda c: self.cost(problem, c, target, m))

    def unsound(self, shape: TiledShape) -> str:
        if shape.stages < min(2, shape.per_split):
            return f"{shape.stages} stages; a pair is read at a time"
        return ""

    def fits(self, shape: TiledShape, target: Any) -> bool:
        assert isinstance(shape, SharedShape)
        resident = max(1, shape.resident)
        return (
            shape.rows <= MOST_ROWS
            and not self.unsound(shape)
            and shape.rows % (8 * shape.share) == 0
            and shape.split <= shape.groups
            and shape.share * shape.split <= LARGEST_CLUSTER
            and shape.shared_bytes <= target.shared
            and resident * (shape.shared_bytes + 1024) <= target.shared_sm
            and shape.registers <= shape.most_registers
            and (shape.grid_n == 1 or shape.columns <= -(-shape.n // 64) * 64)
            and shape.share <= shape.grid_n
            and (shape.split == 1 or shape.split <= shape.blocks // 2)
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """Start and end, and between them the slowest of memory, second-level cache and tensor cores."""
        s = self.shape(problem, config)
        clock, sms = 1.75e9, target.multiprocessors
        size = s.share * s.split
        usable = sms if size < 3 else (sms - RAGGED) // size * size
        fit = min(target.shared_sm // (s.shared_bytes + 1024), 65536 // (s.launched * s.registers), 2048 // s.launched)
        height = -(-m // s.rows)
        work = s.blocks_along_n * s.split * height
        busiest = max(-(-work // usable), 1)
        stages = busiest * s.per_split  # of a multiprocessor
        memory = s.tiles * s.blocks * s.code_bytes / target.bandwidth
        memory *= max(1.0, 0.85 * busiest * usable / work) * min(height, -(-busiest // max(fit, 1)))
        cache = stages * (s.weight_bytes + s.x_bytes) / (41 * clock)
        products = stages * s.columns * BLOCK * max(s.rows, 32) / 3700 / clock
        chain = stages * (150 + s.mt * s.rows * 2) / min(max(fit, 1), busiest, 2) / clock
        ends = 2.6e-6 + (0.8e-6 if s.split > 1 else 0) + 4 * s.rows * s.columns * busiest / 80 / clock
        # Where another block fits, that of the next kernel begins early.
        ends += 0.5e-6 * (busiest > fit) - 0.4e-6 * (busiest < fit)
        # More rows were never measured; the blocks of `tiled` are ordered for them.
        return (ends + 1.1 * max(memory, cache, products, chain)) * (1 if m <= MOST_ROWS else 2)

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        return 1, 1

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.shared_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)


class SharedLinearInt8(_Shared, TiledLinearInt8):
    """Symmetric integers of 2, 3, 4 or 8 bits per channel by int8 activations with a scale per row; int32 sums are exact."""

    name = "cuda-tiled-shared-int8"


class SharedLinearFloat8(_Shared, TiledLinearFloat8):
    """Weights that e4m3 represents, per channel, by e4m3 activations with a scale per row."""

    name = "cuda-tiled-shared-fp8"
