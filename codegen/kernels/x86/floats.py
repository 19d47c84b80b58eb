"""Weight-only GEMM on x86: integers, and codes that index a table of at most 16 levels.

With AVX-512 a code of at most 4 bits is shifted to the bottom of its lane and looked up in a register of 16 floats (``vpermps``
reads 4 index bits and ignores the others). AVX2 has registers of 8: two look-ups, of which the code's highest bit picks one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import floats
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import Emission
from qcompile.codegen.kernels.cpu.levels import ENTRIES, is_table, real_levels
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.unpack import field, shift, unsigned_field
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.formats.levels import LevelFormat
from qcompile.targets.target import Target

PERMUTE = "llvm.x86.avx512.permvar.sf.512"
PERMUTE8 = "llvm.x86.avx2.permps"


class FloatGemm(floats.FloatGemm):
    """FMA on 256- or 512-bit registers."""

    name = "x86-float"

    def lanes(self, target: Target) -> int:
        return 16 if target.has("avx512") else 8

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("avx2", "fma", "f16c"):
            return f"{self.name} needs AVX2, FMA and F16C, which {target} does not have"
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


@dataclass(frozen=True)
class LevelPanels(Panels):
    """Panels of table indices, stored as they are; ``zero_code`` is the one whose level is 0."""

    zero_code: int = 0

    @property
    def bias(self) -> int:
        return 0

    def zeros(self, weight: Quantized) -> np.ndarray:
        return np.full((self.groups, self.n), self.zero_code, np.uint8)


class FloatTableGemm(FloatGemm):
    """FMA with weights looked up in a table of floats."""

    name = "x86-table-float"

    def integers(self, fmt: Format) -> IntFormat | None:
        """Indices behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if is_table(fmt) else None

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := super().refuse(problem, target):
            return reason
        fmt = self.integers(problem.weight)
        assert fmt is not None
        if not isinstance(problem.weight, LevelFormat) and (Panels(problem.k, 1, fmt, 8, 1).source() < 0).any():
            return f"{self.name}: learned levels need not contain 0, and {fmt.group or problem.k} rows leave places to fill"
        return ""

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> LevelPanels:
        fmt, zero = self.integers(problem.weight), 0
        assert fmt is not None
        if isinstance(problem.weight, LevelFormat):
            zero = int(np.flatnonzero(problem.weight.table == 0)[0])
        return LevelPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], zero_code=zero)

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        rate, unpack = super().speed(problem, target)
        return rate, unpack if target.has("avx512") else unpack + 3.0

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        table = real_levels(problem.weight, weight).astype(np.float32)
        return {"weight": packed.pop("weight"), "table": table, **packed}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Panels) -> list[v.Param]:
        params = super().params(problem, config, panels)
        place = next(i for i, param in enumerate(params) if param.name == "weight")
        return [*params[: place + 1], v.Param("table", (ENTRIES,)), *params[place + 1 :]]

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        size = min(e.panels.lanes, ENTRIES)
        e.extra["table"] = [v.let(v.load(e.names["table"], [at], size)) for at in range(0, ENTRIES, size)]

    def floats(
        self, e: Emission, raw: list[list[Any]], index: int, zeros: list[Any] | None
    ) -> Iterator[tuple[int, Any]]:
        p = e.panels
        sources = [v.let(field(planes, index, p, 8)) if p.planes else planes[0] for planes in raw]
        for offset in range(p.depth):
            end = 8 * (offset + 1) if p.planes else 8 * offset + (index + 1) * p.bits
            yield offset, [v.let(self._level(e, v.let(unsigned_field(w, end, p.bits, p.lanes)))) for w in sources]

    @staticmethod
    def _level(e: Emission, codes: Any) -> Any:
        lanes, tables = e.panels.lanes, e.extra["table"]
        if lanes == ENTRIES:
            return T.call_llvm_pure_intrin("float32x16", PERMUTE, tables[0], codes)
        low, high = (T.call_llvm_pure_intrin("float32x8", PERMUTE8, table, codes) for table in tables)
        return T.Select(codes > v.const(7, lanes, "int32"), high, low) if e.panels.bits == 4 else low
