"""Reasons for which several families do not take a problem; an empty string where there is none."""

from __future__ import annotations

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.targets.target import Target


def no_avx2(name: str, target: Target) -> str:
    """The processor lacks instructions that all families for AVX2 use."""
    return "" if target.has("avx2", "fma", "f16c") else f"{name} needs AVX2, FMA and F16C, which {target} does not have"


def float_activations(name: str, problem: LinearProblem) -> str:
    """Activations are no integers."""
    return "" if problem.activation.bits else f"{name} multiplies integer activations; this operator has float ones"


def overflow(name: str, k: int, group: int) -> str:
    """Sums of products of 8-bit numbers over ``k``, or over a group of weights if ``group`` is not 0, do not fit in int32."""
    longest = min(group or k, k)
    if longest * 255 * 128 < 1 << 31:
        return ""
    return f"{name}: {longest} products of 8-bit numbers may overflow an int32 accumulator"
