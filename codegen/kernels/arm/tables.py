"""GEMM of weights whose codes index a table of levels, on ARM: NF4, FP4, MXFP4, NVFP4, FP6, powers of two, codebooks.

TBL looks 16 codes up at once in a table of up to 64 bytes in registers; TBX adds the next 64. Levels are taken less that of
code 0,

    sum_k L[c] a  =  sum_k (L[c] - L[0]) a  +  L[0] sum_k a

so that the places a group is padded with hold code 0 and count nothing, whatever its level.

* `ByteTableGemm`: levels that are small integers become signed bytes. Where a level is that of the low half of its code plus
  that of the high half (two powers of two), the halves are looked up and multiplied one after the other.
* `WordTableGemm`: others are 15-bit integers in two signed bytes, ``256 high + low``, each with a product and an accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.integers import DotGemm, NeonGemm
from qcompile.codegen.kernels.arm.panels import UnsignedPanels
from qcompile.codegen.kernels.arm.products import BYTES, Accumulator, ProductSum
from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.codegen.kernels.cpu.levels import (
    ENTRIES,
    Levels,
    adds_halves,
    entries,
    exact_levels,
    rounded_levels,
)
from qcompile.codegen.kernels.cpu.minifloats import half_shift
from qcompile.codegen.kernels.cpu.tables import HALF, LevelTables
from qcompile.formats import Quantized
from qcompile.targets.target import Target

LARGEST = 16255
"""The largest level, so that the high byte of a difference of two fits in a signed byte."""

LOOKED_UP = {1: "tbl1", 2: "tbl2", 4: "tbl4"}
"""Instructions by registers of a table."""


@dataclass(frozen=True)
class TablePanels(UnsignedPanels):
    """Panels of table indices, stored as they are."""

    @property
    def bias(self) -> int:
        return 0


class ByteTableGemm(LevelTables, DotGemm):
    """Levels that are integers, in bytes."""

    name = "arm-table8"

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := super().refuse(problem, target):
            return reason
        if min(problem.weight.group or problem.k, problem.k) * 128 * 128 >= 1 << 31:
            return f"{self.name}: sums of products over {problem.k} bytes may overflow an int32 accumulator"
        return "" if self.in_bytes(problem) else f"{self.name}: the levels of {problem.weight} are no small integers"

    @staticmethod
    def in_bytes(problem: LinearProblem) -> bool:
        """Whether the differences of levels are signed bytes, or sums of two."""
        if adds_halves(problem.weight):
            return True
        levels = exact_levels(problem.weight)
        return levels is not None and int(np.ptp(levels.level)) <= 127

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> TablePanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return TablePanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], depth=self.depth)

    def offset(self, problem: LinearProblem) -> int:
        levels = exact_levels(problem.weight)
        return 0 if levels is None else -int(levels.level.min())

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        levels = exact_levels(problem.weight, 255)
        assert levels is not None
        return levels

    def table_size(self, problem: LinearProblem) -> int:
        return ENTRIES if adds_halves(problem.weight) else super().table_size(problem)

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        stored = super().stored(problem, config)
        if not adds_halves(problem.weight):
            return stored
        levels = exact_levels(problem.weight, 255)
        assert levels is not None
        return replace(stored, bias=0, levels=levels.level.astype(np.float32))

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        if adds_halves(problem.weight):
            return rate / 2, unpack + 2.0
        return rate, unpack + _look_ups(problem)

    # Code

    def needs_sums(self, panels: UnsignedPanels) -> bool:
        return True

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        super().prologue(e, first, rows)
        size = self.table_size(e.problem)
        stored = [v.let(v.load(e.names["table"], [at], ENTRIES)) for at in range(0, size, ENTRIES)]
        level = v.let(v.cast(v.shuffle(stored[0], [0]), "int32", 1))
        e.extra["lowest"] = v.let(level - self.offset(e.problem))
        e.extra["tables"] = [[v.let(part - v.splat(T.cast(level, "uint8"), ENTRIES)) for part in stored]]

    def lowest(self, e: Emission) -> Any:
        return e.extra["lowest"]

    def parts(self, panels: UnsignedPanels, rows: int) -> list[bits.Part]:
        return [bits.PLAIN]

    def unpack(self, e: Emission, raw: list[Any], index: int, parts: list[bits.Part]) -> Iterator[tuple[int, Any]]:
        codes = v.let(v.bits_of(bits.code(e.panels, raw, index), "uint8", BYTES))
        if adds_halves(e.problem.weight):
            nibble = v.const(15, BYTES, "uint8")
            halves = [T.bitwise_and(codes, nibble), T.shift_right(codes, v.const(4, BYTES, "uint8"))]
            for half in halves:
                yield 0, v.bits_of(v.let(_look_up(e.extra["tables"][0], v.let(half))), "int8", BYTES)
            return
        for part, table in enumerate(e.extra["tables"]):
            yield part, v.bits_of(v.let(_look_up(table, codes)), "int8", BYTES)


class WordTableGemm(ByteTableGemm):
    """Any levels, in two bytes."""

    name = "arm-table16"
    level_bytes = 2

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not super().refuse(problem, target):
            return f"{self.name}: the levels of {problem.weight} fit in bytes"
        if adds_halves(problem.weight):
            return f"{self.name}: the levels of {problem.weight} are sums of two bytes"
        if self._exact(problem) is None and problem.weight.bits > 4 and half_shift(problem.weight) is not None:
            return f"{self.name} would round the levels of {problem.weight} to 15 bits; arm-minifloat keeps them"
        return DotGemm.refuse(self, problem, target)

    def offset(self, problem: LinearProblem) -> int:
        return HALF

    def _largest(self, problem: LinearProblem) -> int:
        """The largest level for which a group's sum fits in int32."""
        length = min(problem.weight.group or problem.k, problem.k)
        return min(LARGEST, ((1 << 31) - 1) // (2 * 128 * length))

    def _exact(self, problem: LinearProblem) -> Levels | None:
        return exact_levels(problem.weight, self._largest(problem))

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        return self._exact(problem) or rounded_levels(problem.weight, weight, self._largest(problem))

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate / 2, unpack + _look_ups(problem)

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if problem.weight.bits > 4:  # more rows share a long look-up
            return [(4, 2), (2, 4), (1, 4)]
        return [(2, 4), (4, 2), (1, 4)]

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        DotGemm.prologue(self, e, first, rows)
        e.extra["tables"] = [[], []]
        size, level = entries(e.problem.weight), None
        for at in range(0, size, ENTRIES):
            low, high = (
                v.cast(v.load(e.names["table"], [start], ENTRIES), "int32", ENTRIES) for start in (at, size + at)
            )
            levels = v.let(low + T.shift_left(high, v.const(8, ENTRIES, "int32")))
            level = v.let(v.shuffle(levels, [0])) if level is None else level
            rounded = v.let(levels - v.splat(level, ENTRIES) + v.const(128, ENTRIES, "int32"))
            below = v.cast(rounded - v.const(128, ENTRIES, "int32"), "uint8", ENTRIES)
            above = v.cast(T.shift_right(rounded, v.const(8, ENTRIES, "int32")), "uint8", ENTRIES)
            for table, part in zip(e.extra["tables"], (below, above)):
                table.append(v.let(part))
        e.extra["lowest"] = v.let(level - HALF)

    def parts(self, panels: UnsignedPanels, rows: int) -> list[bits.Part]:
        return [bits.PLAIN, bits.Part(0, 256)]


class NeonTables(ByteTableGemm):
    """What differs without SDOT: products are widened at once."""

    needs = NeonGemm.needs
    wide = NeonGemm.wide
    add_bytes = NeonGemm.add_bytes

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(2, 2), (4, 1), (1, 4)]

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        _, unpack = super().speed(problem, target)
        return 2.0 if adds_halves(problem.weight) else 4.0, unpack

    def accumulator(self, panels: UnsignedPanels, part: bits.Part, start: Any) -> Accumulator:
        return ProductSum(False, start)

    def chunks_between_flushes(self, panels: UnsignedPanels) -> int:
        return 0


class NeonByteTableGemm(NeonTables):
    """Levels in bytes."""

    name = "arm-table8-neon"


class NeonWordTableGemm(NeonTables, WordTableGemm):
    """Levels in two bytes."""

    name = "arm-table16-neon"

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(2, 1), (1, 2)]


def _look_ups(problem: LinearProblem) -> float:
    """Cycles of a look-up: half of one per register of the table."""
    return 0.5 * entries(problem.weight) / ENTRIES


def _look_up(registers: list[Any], codes: Any) -> Any:
    """The bytes at codes in a table of 1, 2, 4, 8 or 16 registers."""
    found = None
    for start in range(0, len(registers), 4):
        some = registers[start : start + 4]
        if found is None:
            intrinsic = f"llvm.aarch64.neon.{LOOKED_UP[len(some)]}"
            found = T.call_llvm_pure_intrin("uint8x16", intrinsic, *some, codes)
        else:  # codes out of the range of a table leave what was found
            index = v.let(codes - v.const(start * ENTRIES, BYTES, "uint8"))
            found = T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.tbx4", found, *some, index)
    return found
