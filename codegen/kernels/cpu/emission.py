"""What a micro-kernel is written with: registers, tiles of them, and where the vectors of one or several panels lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.panels import Panels

ON_STACK = {"disable_lower_builtin": True}
"""Annotation of a buffer that lives on the stack whatever its size."""


class Register:
    """One vector register that is assigned more than once; LLVM turns the stack slot into a register."""

    def __init__(self, dtype: str, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        self.slot = B.alloc_buffer((lanes,), dtype, annotations=ON_STACK)

    def get(self) -> Any:
        """The current value."""
        return v.load(self.slot, [0], self.lanes)

    def set(self, value: Any) -> None:
        """Assign."""
        v.store(self.slot, [0], value, self.lanes)


Tile = list[list[Register]]
"""Accumulators by row and vector."""


@dataclass
class Emission:
    """What a micro-kernel needs while its PrimFunc is written.

    Attributes:
        names: parameters of the PrimFunc and run-time extents.
        m: number of rows, int32, at least 1 where a micro-kernel runs.
        tile: the tile's result ``(mr, width)``, int32 or float32.
        extra: buffers a family allocates for itself.
    """

    problem: LinearProblem
    panels: Panels
    config: dict[str, Any]
    names: dict[str, Any]
    m: Any
    tile: Any
    extra: dict[str, Any] = field(default_factory=dict)

    def rolled(self, count: int) -> Any:
        """``count`` as a loop bound LLVM cannot limit from above, so that it keeps the loop.

        It would unroll a short one and reorder the body until the accumulators no longer fit in registers.
        """
        return T.max(count, count - self.m)


def opaque(value: Any) -> Any:
    """Evaluate an int32 once and hide how it was computed from TVM's index analyses, whose time grows with its size."""
    slot = B.alloc_buffer((1,), "int32", annotations=ON_STACK)
    B.buffer_store(slot, value, [0])
    return v.let(slot[0])


def beside(panel: Any) -> tuple[Any, ...]:
    """The panels of a tile: one, or several in a tuple."""
    return panel if isinstance(panel, tuple) else (panel,)


def vectors(panels: Panels, panel: Any) -> list[tuple[Any, int]]:
    """The panel of each vector of a tile, and its first column there."""
    return [(each, vec * panels.lanes) for each in beside(panel) for vec in range(panels.vectors)]


def position(e: Emission, group: Any, row: Any, index: int) -> Any:
    """First k of the codes at position ``index`` of a panel row, moved back where the matrix ends."""
    p = e.panels
    k = group * p.group + row * p.step + p.depth * index
    return v.let(T.min(k, max(p.k - p.depth, 0)) if p.clamped else k)
