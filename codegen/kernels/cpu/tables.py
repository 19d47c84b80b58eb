"""What the families that look integer levels up share, whatever the processor: the table among the packed arrays.

    sum_k table[code] a  =  factor * sum_k level[code] a

A level is stored unsigned, ``level + offset``, in one byte or in two (all low bytes before the high ones), and ``factor`` goes
into the scale of the columns.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.levels import Levels, entries, is_table
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.formats import Format, IntFormat, Quantized

HALF = 1 << 15
"""What is added to 16-bit levels to store them."""


class LevelTables(TiledGemm):
    """Mixed into an integer family, before it."""

    level_bytes = 1
    """Bytes of a level."""

    @abstractmethod
    def levels_of(self, problem: LinearProblem, weight: Quantized) -> Levels:
        """The integer levels of a matrix."""

    @abstractmethod
    def offset(self, problem: LinearProblem) -> int:
        """What is added to levels to store them."""

    def integers(self, fmt: Format) -> IntFormat | None:
        """Indices behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if is_table(fmt) else None

    def table_size(self, problem: LinearProblem) -> int:
        """Levels that are stored."""
        return entries(problem.weight)

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        levels = self.levels_of(problem, weight)
        stored = levels.level + self.offset(problem)
        parts = [stored[: self.table_size(problem)] >> 8 * byte & 255 for byte in range(self.level_bytes)]
        table = np.concatenate(parts).astype(np.uint8)
        scale = packed["scale"] * np.float32(levels.factor)
        return {"weight": packed.pop("weight"), "table": table, **packed, "scale": scale}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Panels) -> list[v.Param]:
        table = v.Param("table", (self.level_bytes * self.table_size(problem),), "uint8")
        return after_weight(super().params(problem, config, panels), table)

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group, bias=self.offset(problem))


def after_weight(params: list[v.Param], table: v.Param) -> list[v.Param]:
    """``params`` with ``table`` after the packed codes."""
    place = next(i for i, param in enumerate(params) if param.name == "weight")
    return [*params[: place + 1], table, *params[place + 1 :]]
