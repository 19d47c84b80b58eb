"""Integer products of any widths on the binary tensor cores: bit planes.

    w = u - z,  u = sum_i 2^i u_i,      x = v - 2^(q-1),  v = sum_j 2^j v_j,      u_i, v_j in {0, 1}
    sum_k w x = sum_ij 2^(i+j) popcount(u_i & v_j)  -  2^(q-1) sum_k u  -  z sum_k x

with p planes of weights and q of activations; everything is int32 and exact. ``mma.m16n8k256.and.popc`` counts 256
positions of 16 channels by 8 rows at once. Products with the same i + j share an accumulator: p + q - 1 of them instead of
p q. Planes of x are taken from its int8 codes in registers: bit j of 32 codes, eight words of four, is one word

    sum_w ((word_w >> j) & 0x01010101) << w

in an order of K that the packed weights have as well. Zeng et al., "ABQ-LLM: Arbitrary-bit quantized inference
acceleration for large language models" (2024); PTX ISA, "Matrix fragments for mma.m16n8k256".

    warp (wn, wk) owns ``tn`` tiles of 16 channels and a contiguous part of K; weights and rows of x of the next 256
    positions are loaded into registers while the present ones are multiplied; the sums end as those of `stream`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import TILE, unsigned
from qcompile.codegen.kernels.cuda.linear import CudaLinear
from qcompile.codegen.kernels.cuda.stream import ROWS, StreamShape
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.formats.layout import BitLayout
from qcompile.targets.target import Target

SPAN = 256
"""Positions of K of one instruction; K is padded to a multiple of it."""


def plane_layout(bits: int) -> BitLayout:
    """Order of packed planes: of a channel tile and 256 positions, plane by plane, 16 bytes for every lane."""
    # K: block, half h, lane t, word w, byte; N: tile, a, g. Register r = 2 h + a of lane 4 g + t; bit 8 byte + w.
    return BitLayout(bits, k=(-1, 2, 4, 8, 4), n=(-1, 2, 8), order="n0 k0 b n2 k2 k1 n1 k4 k3")


@dataclass(frozen=True)
class PlaneShape(StreamShape):
    """Everything static about one kernel.

    Attributes:
        planes: of x.
    """

    planes: int = 1

    @property
    def blocks(self) -> int:
        """Steps along K."""
        return -(-self.k // SPAN)

    @property
    def sums(self) -> int:
        """Accumulators of a channel tile: one for every sum of plane numbers."""
        return self.weight.bits + self.planes - 1

    @property
    def block_bytes(self) -> int:
        """Packed bytes of a channel tile and a step."""
        return SPAN * TILE * self.weight.bits // 8

    @property
    def stage_bytes(self) -> int:
        """Nothing is staged in shared memory."""
        return 0

    @property
    def shared_bytes(self) -> int:
        """The sums of all warps."""
        return self.nw * self.kw * self.tn * 4 * 32 * 4

    @property
    def registers(self) -> int:
        """Rough count per thread."""
        return self.tn * 4 * (self.sums + 2 * self.weight.bits) + 2 * self.planes + 32 + 40


class PlaneLinear(CudaLinear):
    """Integers of 1 to 8 bits per channel by integer activations of 2 to 8 bits with a scale per row; exact sums.

    Config: see `PlaneShape`; blocks take 8 rows.
    """

    name = "cuda-planes"
    bits = tuple(range(1, 9))
    dtypes = ("int8",)
    packing = "planes"

    def _takes(self, fmt: Format) -> Support:
        if isinstance(fmt, IntFormat) and not fmt.group:
            return Support(True)
        return Support(False, f"{self.name} takes integers with scales per channel, not {fmt}")

    def _needs(self, target: Target) -> Support:
        return Support(target.has("mma_b1"), f"{self.name} needs binary tensor cores, which {target} lacks")

    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> PlaneShape:
        keys = ("rows", "tn", "nw", "kw", "split", "dtype", "out")
        return PlaneShape(
            k=problem.k, n=problem.n, weight=problem.weight, stages=1, raw=False, planes=problem.activation.bits,
            **{key: config[key] for key in keys},
        )  # fmt: skip

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """Configs that fit the chip, best first by `cost`."""
        found = []
        for tn in (1, 2, 4):
            for nw, kw in ((1, 4), (1, 8), (2, 4), (4, 2), (4, 1)):
                for split in (1, 2, 4):
                    config = {
                        "rows": ROWS, "tn": tn, "nw": nw, "kw": kw, "split": split, "dtype": "int8", "out": "float16",
                    }  # fmt: skip
                    if self.fits(self.shape(problem, config), target):
                        found.append(config)
        return sorted(found, key=lambda c: self.cost(problem, c, target, problem.m or 1))

    def fits(self, shape: PlaneShape, target: Any) -> bool:
        return (
            shape.registers <= min(255, 65536 // shape.threads)
            and shape.tn * (shape.nw - 1) < shape.tiles
            and (shape.split * shape.kw <= shape.blocks or shape.split * shape.kw == 1)
        )

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Any, m: int) -> float:
        """Waves of blocks times the slower of memory and issue slots, plus start and reduction."""
        s = self.shape(problem, config)
        work = s.grid_n * s.split * -(-m // s.rows)
        fit = max(1, min(65536 // (s.threads * max(s.registers, 32)), 2048 // s.threads))
        resident = min(fit, -(-work // target.multiprocessors))
        waves = -(-work // (target.multiprocessors * resident))
        warps = resident * s.threads // 32
        memory = waves * warps * s.per_warp * s.tn * s.block_bytes * target.multiprocessors / target.bandwidth
        slots = s.tn * s.weight.bits * s.planes * 4 + 32 * s.planes
        issue = waves * warps * s.per_warp * slots / 4 / 1.6e9
        reduction = 1e-6 + 4e-13 * m * s.n * s.split if s.split > 1 else 0
        return 2e-6 + max(memory, issue) + reduction + 0.3e-6 * waves

    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        s = self.shape(problem, config)
        return (1, 1) if s.split == 1 else (s.split * m * s.n, s.grid_n * -(-m // s.rows))

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        """``codes``; ``offset`` int32 ``(N,)``, ``2^(q-1) sum_k u``; ``zero`` int32 ``(N,)``; ``column``."""
        fmt = problem.weight
        assert isinstance(fmt, IntFormat)
        codes = unsigned(fmt, weight)
        zero = np.full(problem.n, 1 << fmt.bits - 1) if fmt.symmetric else np.asarray(weight.zero_point)[0]
        offset = codes.astype(np.int64).sum(0) << problem.activation.bits - 1
        return {
            "codes": np.ascontiguousarray(plane_layout(fmt.bits).pack(codes.astype(np.uint8))).reshape(-1),
            "offset": offset.astype(np.int32),
            "zero": zero.astype(np.int32),
            "column": np.asarray(weight.scale, np.float32)[0],
        }

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        from qcompile.codegen.kernels.cuda.planes_code import emit

        return emit(self.shape(problem, config), problem.epilogue, name)
