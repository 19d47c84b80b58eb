"""GEMM of weights whose codes index a table of at most 16 levels: NF4, FP4, MXFP4, NVFP4, powers of two, codebooks.

The table lies in a register and ``vpshufb`` looks 32 codes up at once, so that any levels cost what integers cost and one
instruction more.

* `ByteTableGemm`: levels that are small integers, less the smallest of them, are unsigned bytes and go through the
  byte products of `maddubs`.
* `WordTableGemm`: other levels are 16-bit integers, looked up as two bytes and interleaved; ``vpmaddwd`` multiplies them by
  16-bit activations. An int32 lane then holds the sum of two consecutive k, so two registers of sums are added crosswise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import Emission, Register, Tile
from qcompile.codegen.kernels.cpu.levels import ENTRIES, exact_levels, is_table, rounded_levels
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.unpack import as_bytes, field
from qcompile.codegen.kernels.x86.instructions import MADDWD, PSHUFB, prefetch
from qcompile.codegen.kernels.x86.maddubs import MaddubsGemm, products
from qcompile.codegen.kernels.x86.signed import PaddedPanels, signed_rows
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target

HALF = 1 << 15
"""What is added to 16-bit levels to store them."""


@dataclass(frozen=True)
class TablePanels(PaddedPanels):
    """Panels of table indices, stored as they are."""

    @property
    def bias(self) -> int:
        return 0


class ByteTableGemm(MaddubsGemm):
    """Levels that are integers, in unsigned bytes."""

    name = "x86-table8"
    entries = ENTRIES

    def integers(self, fmt: Format) -> IntFormat | None:
        """Indices behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if is_table(fmt) else None

    def refuse_codes(self, problem: LinearProblem) -> str:
        if exact_levels(problem.weight) is None:
            return f"{self.name}: the levels of {problem.weight} are no small integers"
        return super().refuse_codes(problem)

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> TablePanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return TablePanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"])

    def largest(self, problem: LinearProblem) -> int:
        levels = exact_levels(problem.weight)
        return 1 if levels is None else int(levels.level.max() - levels.level.min())

    def zero(self, e: Emission) -> int:
        return _smallest(e.problem.weight)

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate * (1.0 if products(self.largest(problem)) >= 4 else 0.8), unpack + 0.5

    def table(self, problem: LinearProblem, weight: Quantized) -> tuple[np.ndarray, float]:
        """The stored table, uint8, and what a level counts."""
        levels = exact_levels(problem.weight)
        assert levels is not None
        return (levels.level + _smallest(problem.weight)).astype(np.uint8), levels.factor

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        table, factor = self.table(problem, weight)
        scale = packed["scale"] * np.float32(factor)
        return {"weight": packed.pop("weight"), "table": table, **packed, "scale": scale}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Panels) -> list[v.Param]:
        params = super().params(problem, config, panels)
        place = next(i for i, param in enumerate(params) if param.name == "weight")
        return [*params[: place + 1], v.Param("table", (self.entries,), "uint8"), *params[place + 1 :]]

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group, bias=_smallest(problem.weight))

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        super().prologue(e, first, rows)
        e.extra["table"] = [_register(e, 0)]

    def decoded(self, e: Emission, codes: Any) -> Any:
        return _look_up(e, e.extra["table"][0], codes)


class WordTableGemm(ByteTableGemm):
    """Any levels, in 16 bits."""

    name = "x86-table16"
    entries = 2 * ENTRIES

    def refuse_codes(self, problem: LinearProblem) -> str:
        if not super().refuse_codes(problem):
            return f"{self.name}: the levels of {problem.weight} fit in bytes"
        return ""

    def largest_level(self, problem: LinearProblem) -> int:
        """The largest level for which a group's sum fits in int32."""
        length = min(problem.weight.group or problem.k, problem.k)
        return min(HALF - 1, ((1 << 31) - 1) // (128 * length))

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        return 20.0, 1.5

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        return [(4, 1), (2, 2), (3, 1), (6, 1)]

    def table(self, problem: LinearProblem, weight: Quantized) -> tuple[np.ndarray, float]:
        levels = rounded_levels(problem.weight, weight, self.largest_level(problem))
        stored = levels.level + HALF
        return np.concatenate([stored & 255, stored >> 8]).astype(np.uint8), levels.factor

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group, bias=HALF)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        e.extra["rows"] = signed_rows(e, e.panels, first, rows, 2 * e.panels.lanes, "int16")
        high = T.bitwise_xor(_register(e, ENTRIES), v.const(-128, 4 * e.panels.lanes, "int8"))
        e.extra["table"] = [_register(e, 0), v.let(high)]

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        crossed = [[[Register("int32", p.lanes) for _ in range(2)] for _ in line] for line in sums]
        for line in crossed:
            for registers in line:
                for register in registers:
                    register.set(v.const(0, p.lanes, "int32"))
        with T.serial(e.rolled(p.rows_per_group)) as i:
            line_at = v.let(group * p.rows_per_group + i)
            if e.config["prefetch"]:
                for offset in range(0, p.row_bytes, 64):
                    prefetch(e.names["weight"], [panel, line_at, offset + e.config["prefetch"]])
            raw = self.load_row(e, panel, line_at)
            for index in range(p.per_byte):
                weights = [self._words(e, as_bytes(field(planes, index, p, p.bits), p.lanes)) for planes in raw]
                for r, line in enumerate(crossed):
                    four = e.extra["rows"].word(r, line_at * p.step + index * p.depth)
                    a = v.let(v.bits_of(v.splat(four, p.lanes // 2), "int16", 2 * p.lanes))
                    for registers, halves in zip(line, weights):
                        for register, half in zip(registers, halves):
                            product = T.call_llvm_pure_intrin(f"int32x{p.lanes}", MADDWD[p.lanes], half, a)
                            register.set(register.get() + product)
        for line, added in zip(crossed, sums):
            for (low, high), acc in zip(line, added):
                acc.set(acc.get() + _across(low.get(), high.get(), p.lanes))

    def _words(self, e: Emission, codes: Any) -> list[Any]:
        """The levels of a register of codes as int16: the columns in the lower half of every 128 bits, and the others."""
        codes = v.let(codes)
        low, high = (v.let(_look_up(e, table, codes)) for table in e.extra["table"])
        size = 4 * e.panels.lanes
        return [
            v.let(v.bits_of(T.Shuffle([low, high], _interleaved(size, upper)), "int16", size // 2)) for upper in (0, 1)
        ]


def _smallest(fmt: Format) -> int:
    """What is added to integer levels to make them unsigned."""
    levels = exact_levels(fmt)
    return 0 if levels is None else -int(levels.level.min())


def _register(e: Emission, start: int) -> Any:
    """16 entries of the table in every 128 bits."""
    table = v.bits_of(v.load(e.names["table"], [start], ENTRIES), "int8", ENTRIES)
    copies = e.panels.lanes // 4
    return v.let(T.Shuffle([table] * copies, list(range(ENTRIES * copies))))


def _look_up(e: Emission, table: Any, codes: Any) -> Any:
    return T.call_llvm_pure_intrin(f"int8x{4 * e.panels.lanes}", PSHUFB[e.panels.lanes], table, codes)


def _interleaved(size: int, upper: int) -> list[int]:
    """The pattern of ``punpcklbw`` (``punpckhbw``): bytes of two registers in turns, within 128 bits."""
    starts = range(8 * upper, size, 16)
    return [place for start in starts for i in range(8) for place in (start + i, size + start + i)]


def _across(low: Any, high: Any, lanes: int) -> Any:
    """Sums of neighbouring lanes, those of ``low`` before those of ``high`` within 128 bits (``vphaddd``)."""
    even = [place for start in range(0, lanes, 4) for place in (start, start + 2, lanes + start, lanes + start + 2)]
    return T.Shuffle([low, high], even) + T.Shuffle([low, high], [place + 1 for place in even])
