"""GEMM of weights whose codes index a table of at most 16 levels, on ARM: NF4, FP4, MXFP4, NVFP4, powers of two, codebooks.

TBL looks 16 codes up at once in a table that lies in a register. Levels are taken less that of code 0,

    sum_k L[c] a  =  sum_k (L[c] - L[0]) a  +  L[0] sum_k a

so that the places a group is padded with hold code 0 and count nothing, whatever its level.

* `ByteTableGemm`: levels that are small integers become signed bytes.
* `WordTableGemm`: others are 15-bit integers in two signed bytes, ``256 high + low``, each with a product and an accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.gemm import DotGemm, NeonGemm, UnsignedPanels
from qcompile.codegen.kernels.arm.products import BYTES, Accumulator, ProductSum
from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import Emission
from qcompile.codegen.kernels.cpu.levels import ENTRIES, Levels, exact_levels, is_table, rounded_levels
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target

HALF = 1 << 15
"""What is added to 16-bit levels to store them."""

LARGEST = 16255
"""The largest level, so that the high byte of a difference of two fits in a signed byte."""


@dataclass(frozen=True)
class TablePanels(UnsignedPanels):
    """Panels of table indices, stored as they are."""

    @property
    def bias(self) -> int:
        return 0


class ByteTableGemm(DotGemm):
    """Levels that are integers, in bytes."""

    name = "arm-table8"
    entries = ENTRIES

    def integers(self, fmt: Format) -> IntFormat | None:
        """Indices behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if is_table(fmt) else None

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := super().refuse(problem, target):
            return reason
        if min(problem.weight.group or problem.k, problem.k) * 128 * 128 >= 1 << 31:
            return f"{self.name}: sums of products over {problem.k} bytes may overflow an int32 accumulator"
        return "" if self.in_bytes(problem) else f"{self.name}: the levels of {problem.weight} are no small integers"

    @staticmethod
    def in_bytes(problem: LinearProblem) -> bool:
        """Whether the differences of levels are signed bytes."""
        levels = exact_levels(problem.weight)
        return levels is not None and int(np.ptp(levels.level)) <= 127

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> TablePanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return TablePanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], depth=self.depth)

    def offset(self, problem: LinearProblem) -> int:
        """What is added to levels to store them."""
        levels = exact_levels(problem.weight)
        return 0 if levels is None else -int(levels.level.min())

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        """The integer levels."""
        levels = exact_levels(problem.weight)
        assert levels is not None
        return levels

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        levels = self.levels_of(problem, weight)
        stored = levels.level + self.offset(problem)
        table = np.concatenate([stored >> shift & 255 for shift in range(0, self.entries // 2, 8)]).astype(np.uint8)
        scale = packed["scale"] * np.float32(levels.factor)
        return {"weight": packed.pop("weight"), "table": table, **packed, "scale": scale}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Any) -> list[v.Param]:
        params = super().params(problem, config, panels)
        place = next(i for i, param in enumerate(params) if param.name == "weight")
        return [*params[: place + 1], v.Param("table", (self.entries,), "uint8"), *params[place + 1 :]]

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group, bias=self.offset(problem))

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate, unpack + 0.5

    # Code

    def needs_sums(self, panels: UnsignedPanels) -> bool:
        return True

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        super().prologue(e, first, rows)
        stored = v.let(v.load(e.names["table"], [0], ENTRIES))
        level = v.let(v.cast(v.shuffle(stored, [0]), "int32", 1))
        e.extra["lowest"] = v.let(level - self.offset(e.problem))
        e.extra["tables"] = [v.let(stored - v.splat(T.cast(level, "uint8"), ENTRIES))]

    def lowest(self, e: Emission) -> Any:
        return e.extra["lowest"]

    def parts(self, panels: UnsignedPanels, rows: int) -> list[bits.Part]:
        return [bits.PLAIN]

    def unpack(self, e: Emission, raw: list[Any], index: int, parts: list[bits.Part]) -> Iterator[tuple[int, Any]]:
        codes = v.let(v.bits_of(bits.code(e.panels, raw, index), "uint8", BYTES))
        for part, table in enumerate(e.extra["tables"]):
            found = T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.tbl1", table, codes)
            yield part, v.bits_of(v.let(found), "int8", BYTES)


class WordTableGemm(ByteTableGemm):
    """Any levels, in two bytes."""

    name = "arm-table16"
    entries = 2 * ENTRIES

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not super().refuse(problem, target):
            return f"{self.name}: the levels of {problem.weight} fit in bytes"
        return DotGemm.refuse(self, problem, target)

    def offset(self, problem: LinearProblem) -> int:
        return HALF

    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        length = min(problem.weight.group or problem.k, problem.k)
        largest = min(LARGEST, ((1 << 31) - 1) // (2 * 128 * length))
        return exact_levels(problem.weight) or rounded_levels(problem.weight, weight, largest)

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate / 2, unpack + 0.5

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(2, 4), (4, 2), (1, 4)]

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        DotGemm.prologue(self, e, first, rows)
        low, high = (v.cast(v.load(e.names["table"], [at], ENTRIES), "int32", ENTRIES) for at in (0, ENTRIES))
        levels = v.let(low + T.shift_left(high, v.const(8, ENTRIES, "int32")))
        level = v.let(v.shuffle(levels, [0]))
        e.extra["lowest"] = v.let(level - HALF)
        rounded = v.let(levels - v.splat(level, ENTRIES) + v.const(128, ENTRIES, "int32"))
        below = v.cast(rounded - v.const(128, ENTRIES, "int32"), "uint8", ENTRIES)
        above = v.cast(T.shift_right(rounded, v.const(8, ENTRIES, "int32")), "uint8", ENTRIES)
        e.extra["tables"] = [v.let(below), v.let(above)]

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
        return 4.0, unpack

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
