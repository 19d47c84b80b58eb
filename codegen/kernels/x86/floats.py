"""Weight-only GEMM on x86: integers, and codes that index a table of levels.

With AVX-512 a code of at most 4 bits is shifted to the bottom of its lane and looked up in a register of 16 floats (``vpermps``
reads 4 index bits and ignores the others). AVX2 has registers of 8: two look-ups, of which the code's highest bit picks one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import float_tables, floats
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.codegen.kernels.cpu.levels import ENTRIES
from qcompile.codegen.kernels.cpu.refusals import no_avx2
from qcompile.codegen.kernels.cpu.unpack import shift
from qcompile.codegen.kernels.cpu.vector import lanes_of
from qcompile.targets.target import Target

PERMUTE = "llvm.x86.avx512.permvar.sf.512"
PERMUTE8 = "llvm.x86.avx2.permps"


class FloatGemm(floats.FloatGemm):
    """FMA on 256- or 512-bit registers."""

    name = "x86-float"
    streams = (2, 4, 1)

    def lanes(self, target: Target) -> int:
        return lanes_of(target)

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := no_avx2(self.name, target):
            return reason
        if problem.activation.bits:
            return f"{self.name} multiplies float activations; this operator has {problem.activation} ones"
        return ""

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if target.has("avx512") and 8 % problem.weight.bits == 0:
            return [(8, 3), (6, 4), (12, 2)]
        return [(4, 2), (6, 2), (4, 3), (12, 1)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        if target.has("avx512"):
            return 16.0, 8.0 + bits if 8 % bits else 8.0 if bits == 8 else 4.0
        return 15.0, 5.0 + bits if 8 % bits else 5.0

    def floats(
        self, e: Emission, raw: list[list[Any]], index: int, zeros: list[Any] | None
    ) -> Iterator[tuple[int, Any]]:
        p = e.panels
        if p.lanes != 16 or p.bits not in (1, 2, 4):
            yield from super().floats(e, raw, index, zeros)
            return
        sign = 1 << (p.bits - 1) if p.twos_complement else 0
        values = [((i & ((1 << p.bits) - 1)) ^ sign) - sign for i in range(16)]
        table = v.let(T.Shuffle([T.float32(value) for value in values], list(range(16))))
        for offset in range(p.depth):
            shifts = [shift(planes[0], -(8 * offset + index * p.bits), p.lanes) for planes in raw]
            codes = [T.call_llvm_pure_intrin("float32x16", PERMUTE, table, moved) for moved in shifts]
            yield offset, [v.let(c if zeros is None else c - zeros[i]) for i, c in enumerate(codes)]


class FloatTableGemm(float_tables.FloatTableGemm, FloatGemm):
    """FMA with weights looked up in a table of floats."""

    name = "x86-table-float"

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        if problem.weight.bits > 4:  # loads of single floats
            return rate, unpack + 4.0 * self.lanes(target)
        return rate, unpack if target.has("avx512") else unpack + 3.0

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if problem.weight.bits > 4:  # many rows share a long look-up
            return [(6, 2), (12, 1), (4, 2)]
        return super().tiles(problem, target)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        if e.problem.weight.bits > 4:
            return
        size = min(e.panels.lanes, ENTRIES)
        e.extra["table"] = [v.let(v.load(e.names["table"], [at], size)) for at in range(0, ENTRIES, size)]

    def level(self, e: Emission, codes: Any) -> Any:
        lanes, tables = e.panels.lanes, e.extra["table"]
        if lanes == ENTRIES:
            return T.call_llvm_pure_intrin("float32x16", PERMUTE, tables[0], codes)
        low, high = (T.call_llvm_pure_intrin("float32x8", PERMUTE8, table, codes) for table in tables)
        return T.Select(codes > v.const(7, lanes, "int32"), high, low) if e.panels.bits == 4 else low
