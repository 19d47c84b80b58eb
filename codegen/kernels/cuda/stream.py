"""Quantized linear operators whose weights stream from memory through registers into the tensor cores.

    warp (wn, wk) of a block owns ``tn`` tiles of 16 channels and a contiguous part of K
    per stage of 128 K:  packed codes, scales        cp.async to shared memory, several stages ahead, read back by the
                                                     same lane: no barrier inside the loop
                         8 rows of x                 16 bytes per lane straight from the caches, prefetched
                         codes -> operand registers  `dequant`
                         mma.sync m16n8              weights first, up to 8 rows of x per instruction
                         sum of a group * scale      float32, so that codes enter the product exactly
    at the end           sum over wk in shared memory; over blocks that share channels (``split``) the last one to
                         arrive adds all partial sums in order: the result does not depend on timing

Layout of the weights: `layout`. Deep pipelines of asynchronous copies and offline-permuted weights: Frantar et al.,
"MARLIN: Mixed-precision auto-regressive parallel inference on large language models", 2024. Split along K with a fix-up:
Osama et al., "Stream-K", 2023.

The PrimFunc takes, all on the device: ``x (M, Kx)`` fp16, bf16 or int8, ``Kx`` the next multiple of 16 bytes after K and
zero in between; ``scale (M,)`` float32 if x is int8; the arrays of `pack`; ``bias (N,)`` float32 and ``residual (M, N)``
in the type of the output if the epilogue has them; ``partial`` float32 and ``arrived`` int32 scratch of `scratch`, the
second zero (it is zero again afterwards); the output ``(M, N)`` in ``config["out"]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE, FragmentLayout, pack_meta, split_scales, unsigned
from qcompile.formats import IntFormat, Quantized
from qcompile.targets.target import Target

ROWS = 8
"""Rows of x one instruction takes."""


@dataclass(frozen=True)
class Shape:
    """Everything static about one kernel; derived from a problem and a config.

    Attributes:
        k, n: of the problem. mt: groups of 8 rows a block holds. tn: channel tiles of a warp.
        nw, kw: warps of a block along N and K. split: blocks along K. stages: of the pipeline.
        ahead: units of x in registers.
        dtype, out: of x and of the result.
    """

    k: int
    n: int
    weight: IntFormat
    mt: int
    tn: int
    nw: int
    kw: int
    split: int
    stages: int
    ahead: int
    dtype: str
    out: str

    @property
    def integer(self) -> bool:
        """Whether x is int8."""
        return self.dtype == "int8"

    @property
    def layout(self) -> FragmentLayout:
        """Of the packed codes."""
        return FragmentLayout(self.weight.bits, self.integer)

    @property
    def x_width(self) -> int:
        """Elements of a row of x, padding included."""
        per = 16 if self.integer else 8
        return -(-self.k // per) * per

    @property
    def tiles(self) -> int:
        """Channel tiles."""
        return -(-self.n // TILE)

    @property
    def blocks(self) -> int:
        """Stages along K."""
        return -(-self.k // BLOCK)

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
    def groups(self) -> int:
        """Scale groups along K with metadata; 0 if scales are per channel."""
        return -(-self.k // self.weight.group) if self.weight.group else 0

    @property
    def chunk(self) -> int:
        """Positions of a stage that share a scale."""
        return min(self.weight.group or BLOCK, BLOCK)

    @property
    def meta_bytes(self) -> int:
        """Scale and zero point of one group for the two channels of a lane; 0 if there is neither."""
        return (4 if self.weight.group else 0) + (0 if self.weight.symmetric else 4)

    @property
    def meta_groups(self) -> int:
        """Rows of the metadata array along K."""
        return max(self.groups, 1)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one warp for one stage."""
        codes = sum(p.block_bytes for p in self.layout.planes)
        return self.tn * (codes + 32 * self.meta_bytes * (BLOCK // self.chunk))

    @property
    def shared_bytes(self) -> int:
        """Of a block: the pipeline, or afterwards the sums of all warps."""
        warps = self.nw * self.kw
        return max(warps * self.stages * self.stage_bytes, warps * self.tn * self.mt * 4 * 32 * 4)

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        sums = self.tn * self.mt * 4
        return sums * (2 if self.weight.group else 1) + self.mt * self.ahead * 4 + 8 * self.tn + 48


class StreamLinear(LinearKernel):
    """Weights of 2, 3, 4 or 8 bits, scales per channel or in groups, by float activations; any M, N and K.

    Config: see `Shape`; ``dtype`` is ``float16`` or ``bfloat16``, ``out`` the type of the result.
    """

    name = "cuda-stream"
    bits = (2, 3, 4, 8)
    dtypes = ("float16", "bfloat16")

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        fmt = problem.weight
        if target.kind != "cuda":
            return Support(False, f"{self.name} needs a CUDA target, not {target.kind}")
        if not isinstance(fmt, IntFormat) or fmt.bits not in self.bits:
            return Support(False, f"{self.name} takes integer weights of {self.bits} bits, not {fmt}")
        if fmt.group and (fmt.group % self._unit() or (BLOCK % fmt.group and fmt.group % BLOCK)):
            return Support(False, f"{self.name} takes groups of 32, 64 or multiples of 128 along K, not {fmt.group}")
        if (problem.k + BLOCK) * (problem.n + TILE) * fmt.bits // 8 >= 1 << 31:
            return Support(False, f"{self.name} addresses at most 2 GiB of weights")
        return self._accepts(problem)

    def _unit(self) -> int:
        return 32

    def _accepts(self, problem: LinearProblem) -> Support:
        if problem.activation.bits:
            return Support(False, f"{self.name} takes float activations, not {problem.activation}")
        return Support(True)

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> Shape:
        """The kernel a config stands for."""
        keys = ("mt", "tn", "nw", "kw", "split", "stages", "ahead", "dtype", "out")
        return Shape(problem.k, problem.n, problem.weight, **{key: config[key] for key in keys})

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, for ``problem.m`` rows (1 if unknown), best first by `cost`."""
        m = problem.m or 1
        mt = next((t for t in (1, 2, 4, 8) if t * ROWS >= m), 8)
        found = []
        for dtype in self.dtypes:
            for tn in (1, 2, 4):
                for nw, kw in ((1, 4), (2, 4), (1, 8), (4, 2), (2, 2), (4, 1), (8, 1)):
                    for split in (1, 2, 3, 4, 6, 8, 16):
                        for stages in (3, 4, 6):
                            config = {
                                "mt": mt, "tn": tn, "nw": nw, "kw": kw, "split": split, "stages": stages,
                                "ahead": self._ahead(mt, tn), "dtype": dtype,
                                "out": "float16" if dtype == "int8" else dtype,
                            }  # fmt: skip
                            shape = self.shape(problem, config)
                            if self._fits(shape, target):
                                found.append(config)
        order = {dtype: i for i, dtype in enumerate(self.dtypes)}
        return sorted(found, key=lambda c: (order[c["dtype"]], self.cost(problem, c, target, m)))

    def _ahead(self, mt: int, tn: int) -> int:
        """Units of x held in registers: as many as the sums leave room for."""
        return 2 if self._integer() else 4 if mt <= 2 else 1 if mt * tn > 8 else 2

    def _integer(self) -> bool:
        return "int8" in self.dtypes

    def _fits(self, shape: Shape, target: Target) -> bool:
        return (
            shape.shared_bytes <= target.shared
            and shape.registers <= min(255, 65536 // shape.threads)
            and shape.tn * (shape.nw - 1) < shape.tiles
            and (shape.split * shape.kw <= shape.blocks or shape.split * shape.kw == 1)
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """Waves of blocks times the slower of memory, tensor cores and issue slots, plus start and reduction."""
        s = self.shape(problem, config)
        sms = target.multiprocessors
        work = s.grid_n * s.split * -(-m // (ROWS * s.mt))
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
        stage_bytes = s.tn * (sum(p.block_bytes for p in s.layout.planes) + 32 * s.meta_bytes // 4)
        streamed = waves * resident * s.threads // 32 * s.per_warp * stage_bytes * sms
        flight = resident * s.threads // 32 * min(s.stages - 1, s.per_warp) * stage_bytes
        memory = streamed / target.bandwidth * max(1.0, 32768 / max(flight, 1))
        mma = waves * resident * s.threads // 32 * s.per_warp * s.tn * 8 * s.mt / 4 * 8 / 1.7e9
        return 2e-6 + max(memory, mma) + (1e-6 + 4e-13 * m * s.n * s.split if s.split > 1 else 0) + 0.3e-6 * waves

    # Packing

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        """``codes``, ``high`` (3 bits only), ``meta`` (groups or zero points), ``column``."""
        s = self.shape(problem, config)
        fmt = s.weight
        codes = weight.codes if s.integer else unsigned(fmt, weight)
        packed = dict(zip(("codes", "high"), s.layout.pack(codes)))
        scale = np.asarray(weight.scale, np.float32)
        if fmt.group:
            stored, column = split_scales(scale)
        else:
            stored, column = None, scale[0]
        if s.meta_bytes:
            zero = None if fmt.symmetric else weight.zero_point
            packed["meta"] = pack_meta(stored, zero, s.meta_groups, s.n, s.dtype == "bfloat16")
        if s.integer:
            column = column / np.float32(1 << 8 - fmt.bits)
        packed["column"] = column.astype(np.float32)
        return packed

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        """Elements of ``partial`` and ``arrived`` a call with ``m`` rows needs; at least 1."""
        s = self.shape(problem, config)
        if s.split == 1:
            return 1, 1
        return s.split * m * s.n, s.grid_n * -(-m // (ROWS * s.mt))

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.stream_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)


class StreamLinearInt8(StreamLinear):
    """Symmetric weights of 2, 4 or 8 bits by int8 activations with a scale per row; int32 sums are exact.

    Unlike on x86, ``x`` holds signed codes.
    """

    name = "cuda-stream-int8"
    bits = (2, 4, 8)
    dtypes = ("int8",)

    def _unit(self) -> int:
        return 64

    def _accepts(self, problem: LinearProblem) -> Support:
        if problem.activation.bits != 8:
            return Support(False, f"{self.name} takes int8 activations, not {problem.activation}")
        if not problem.weight.symmetric:
            return Support(False, f"{self.name} takes symmetric weights, not {problem.weight}")
        return Support(True)
