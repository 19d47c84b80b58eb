"""The integer families: SDOT, or 16-bit multiply-adds on processors without it. `gemm` has the loops they share."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.gemm import ArmGemm
from qcompile.codegen.kernels.arm.panels import UnsignedPanels
from qcompile.codegen.kernels.arm.products import BYTES, LANES, DotSum, MaskedSum, ProductSum, dot, pairs
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.targets.target import Target

PLANES = 4.5
"""Cycles to gather a register of codes whose bits lie in planes."""


class DotGemm(ArmGemm):
    """SDOT, 16 products per instruction."""

    name = "arm-sdot"
    needs = ("neon", "dotprod")

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(4, 4), (6, 2), (8, 2), (2, 4)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return 32.0, PLANES if 8 % problem.weight.bits else 0.0 if problem.weight.bits == 8 else 0.5

    def add_bytes(self, total: Any, x: Any) -> Any:
        return dot(total, x, v.const(1, BYTES, "int8"))

    def accumulator(self, panels: UnsignedPanels, part: bits.Part, start: Any) -> DotSum:
        return DotSum(start)

    def chunks_between_flushes(self, panels: UnsignedPanels) -> int:
        return 0


class NeonGemm(ArmGemm):
    """8-bit multiply-adds into 16-bit lanes, for processors without SDOT."""

    name = "arm-smlal"
    needs = ("neon",)
    wide = False

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(2, 2), (4, 1), (1, 4)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate = 4.0 if problem.weight.bits == 8 else 7.0
        return rate, PLANES if 8 % problem.weight.bits else 0.0 if problem.weight.bits == 8 else 0.5

    def add_bytes(self, total: Any, x: Any) -> Any:
        return total + pairs(T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.saddlp", x))

    def accumulator(self, panels: UnsignedPanels, part: bits.Part, start: Any) -> ProductSum | MaskedSum:
        return MaskedSum() if part.mask else ProductSum(narrow(panels), start)

    def chunks_between_flushes(self, panels: UnsignedPanels) -> int:
        if panels.bits == 8:
            return 0
        steps = max(BYTES, panels.step) // LANES  # products of a lane in one chunk
        # A masked pair of activations, or a product; codes of 6 and 7 bits are widened at once (`narrow`).
        largest_sum = 128 * ((1 << panels.bits) - 1) if narrow(panels) and panels.bits > 1 else 2 * 128
        return 32767 // largest_sum // steps


def narrow(panels: UnsignedPanels) -> bool:
    """Whether the products of a chunk with such codes fit in 16 bits."""
    return panels.bits < 6
