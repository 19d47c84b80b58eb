"""Weight-only GEMM of codes that index a table of levels, whatever the processor: panels, packing, the loop.

Tables of at most 16 levels lie in registers; longer ones in the first cache, where every code is looked up by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.codegen.kernels.cpu.floats import FloatGemm
from qcompile.codegen.kernels.cpu.levels import ENTRIES, entries, is_table, real_levels, zero_code
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.tables import after_weight
from qcompile.codegen.kernels.cpu.unpack import field, unsigned_field
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target


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
    """Base of the families that look weights up in a table of floats; a subclass gives the look-up (`level`)."""

    def integers(self, fmt: Format) -> IntFormat | None:
        """Indices behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if is_table(fmt) else None

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := super().refuse(problem, target):
            return reason
        fmt = self.integers(problem.weight)
        assert fmt is not None
        if zero_code(problem.weight) is None and (Panels(problem.k, 1, fmt, 8, 1).source() < 0).any():
            return f"{self.name}: no level is 0, and {fmt.group or problem.k} rows leave places to fill"
        return ""

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> LevelPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        zero = zero_code(problem.weight) or 0
        return LevelPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], zero_code=zero)

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        table = real_levels(problem.weight, weight).astype(np.float32)
        return {"weight": packed.pop("weight"), "table": table, **packed}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Panels) -> list[v.Param]:
        table = v.Param("table", (entries(problem.weight),))
        return after_weight(super().params(problem, config, panels), table)

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group)

    def floats(
        self, e: Emission, raw: list[list[Any]], index: int, zeros: list[Any] | None
    ) -> Iterator[tuple[int, Any]]:
        p = e.panels
        sources = [v.let(field(planes, index, p, 8)) if p.planes else planes[0] for planes in raw]
        for offset in range(p.depth):
            end = 8 * (offset + 1) if p.planes else 8 * offset + (index + 1) * p.bits
            codes = [v.let(unsigned_field(w, end, p.bits, p.lanes)) for w in sources]
            if entries(e.problem.weight) > ENTRIES:
                yield offset, [v.let(e.names["table"].vload([code], v.typed("float32", p.lanes))) for code in codes]
            else:
                yield offset, [v.let(self.level(e, code)) for code in codes]

    @abstractmethod
    def level(self, e: Emission, codes: Any) -> Any:
        """The floats at codes (int32 lanes) of a table of 16."""
