"""The parts of `TableLookupGemm`: panels of bit planes, 16-bit sums, and the tile that groups are added to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.arm.lut_tables import STEP, TableBuffers, pairs
from qcompile.codegen.kernels.arm.products import LANES
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Register
from qcompile.codegen.kernels.cpu.lut import PlanePanels
from qcompile.formats import BitLayout

COLUMNS = 8
"""Columns of a register of weights."""

REGISTERS = 32
"""Vector registers of the processor."""


class StepPanels(PlanePanels):
    """Panels whose groups are padded to whole steps of 16 k, see the module docstring."""

    @property
    def steps_per_group(self) -> int:
        """Steps of one group."""
        return -(-self.group // STEP)

    @property
    def pairs_per_group(self) -> int:
        """Pairs of tables of one group."""
        return 2 * self.steps_per_group

    @cached_property
    def layout(self) -> BitLayout:
        """The bit permutation from padded codes ``(K', N)``: k2 chooses the table of a pair, k1 the nibble."""
        n = (-1, self.width // COLUMNS, COLUMNS)
        return BitLayout(self.planes.bits, (-1, 2, 2, 4), n, "n0 k0 n1 b n2 k2 k1 k3")


@dataclass
class Emission:
    """What a micro-kernel needs while its PrimFunc is written.

    Attributes:
        names: parameters of the PrimFunc and run-time extents.
        m: number of rows, int32.
        tables: of the rows of the block.
        tile: the tile's result ``(rows, width)``, float32, or int32 where one group is all of K.
        index: registers of indices, whose odd bytes keep bit 4, used in turns.
    """

    problem: LinearProblem
    panels: StepPanels
    names: dict[str, Any]
    m: Any
    tables: TableBuffers
    tile: Any
    index: list[Register]


class Sums:
    """The 16-bit sums of one block of 8 columns of one row: a register per plane.

    Where the result of a group fits in 16 signed bits, the first register starts from what belongs to no plane, and the
    planes are merged modulo 2^16 (`signed`). Otherwise the sums are unsigned, and a chunk ends before they overflow.
    """

    def __init__(self, e: Emission) -> None:
        self.e, self.planes = e, e.panels.planes
        self.registers = [Register("uint16", COLUMNS) for _ in range(self.planes.bits)]
        self.is_signed = self.signed(e.problem, e.panels)

    @staticmethod
    def signed(problem: LinearProblem, panels: StepPanels) -> bool:
        """Whether a group of any activations ends within 16 signed bits."""
        planes = panels.planes
        weight = max(planes.centre, (1 << planes.bits) - 1 - planes.centre) if planes.uniform else 1
        return panels.steps_per_group * STEP * largest_code(problem) * weight <= 32767

    @staticmethod
    def merged(panels: StepPanels) -> bool:
        """Whether unsigned sums of a chunk are merged in 16 bits."""
        return panels.planes.uniform and panels.planes.bits <= 2

    @classmethod
    def steps(cls, problem: LinearProblem, panels: StepPanels) -> int:
        """Steps of a chunk: a divisor of those of a group where there is one not much smaller than the limit."""
        steps = panels.steps_per_group
        if cls.signed(problem, panels):
            return steps
        weight = (1 << panels.planes.bits) - 1 if cls.merged(panels) else 1
        most = max(1, min(steps, 65535 // (STEP * largest_code(problem) * weight)))
        return next((n for n in range(most, most // 2, -1) if steps % n == 0), most)

    def start(self, base: Any) -> None:
        """Assign the base, or zero where the sums are unsigned."""
        for i, register in enumerate(self.registers):
            if self.is_signed and (i == 0 or not self.planes.uniform):
                register.set(v.splat(T.cast(base, "uint16"), COLUMNS))
            else:
                register.set(v.const(0, COLUMNS, "uint16"))

    def add(self, plane: int, found: Any) -> None:
        """Add one register of table entries."""
        register = self.registers[plane]
        register.set(register.get() + pairs(found))

    def values(self) -> list[list[Any]]:
        """The sums as int32 ``[plane][quad]``, of all planes together if they are multiples of one scale."""
        narrow = [register.get() for register in self.registers]
        if self.planes.uniform and (self.is_signed or self.merged(self.e.panels)):
            merged = narrow[0]
            for plane, value in enumerate(narrow[1:], 1):
                merged = merged + T.shift_left(value, v.const(plane, COLUMNS, "uint16"))
            return [self._wide(v.let(merged))]
        wide = [self._wide(value) for value in narrow]
        if not self.planes.uniform:
            return wide
        sums = wide[0]
        for plane, values in enumerate(wide[1:], 1):
            sums = [v.let(s + T.shift_left(w, v.const(plane, LANES, "int32"))) for s, w in zip(sums, values)]
        return [sums]

    def _wide(self, value: Any) -> list[Any]:
        kind = v.bits_of(value, "int16", COLUMNS) if self.is_signed else value
        return [v.let(v.cast(v.shuffle(kind, range(i, i + LANES)), "int32", LANES)) for i in (0, LANES)]


class Totals:
    """The tile while groups are added to it: in registers where they suffice, else in memory.

    Attributes:
        dtype: float32, or int32 where one group is all of K.
    """

    def __init__(self, e: Emission, rows: int) -> None:
        self.e, self.rows, self.dtype = e, rows, str(e.tile.dtype)
        p = e.panels
        self.quads = p.width // LANES
        used = rows * (self.quads + p.planes.bits * (p.width // COLUMNS) + 4) + 4
        self.registers: list[list[Register]] = []
        if used <= REGISTERS:
            self.registers = [[Register(self.dtype, LANES) for _ in range(self.quads)] for _ in range(rows)]
        for r in range(rows):
            for quad in range(self.quads):
                self._set(r, quad, v.const(0, LANES, self.dtype))

    def get(self, r: int, block: int, half: int) -> Any:
        """Four columns."""
        quad = 2 * block + half
        return self.registers[r][quad].get() if self.registers else v.load(self.e.tile, [r, quad * LANES], LANES)

    def set(self, r: int, block: int, half: int, value: Any) -> None:
        """Assign four columns."""
        self._set(r, 2 * block + half, value)

    def add_chunk(self, r: int, block: int, sums: Sums) -> None:
        """Add a chunk to an int32 tile."""
        for half, value in enumerate(sums.values()[0]):
            self.set(r, block, half, self.get(r, block, half) + value)

    def store(self) -> None:
        """Bring the tile to memory."""
        for r, line in enumerate(self.registers):
            for quad, register in enumerate(line):
                v.store(self.e.tile, [r, quad * LANES], register.get(), LANES)

    def _set(self, r: int, quad: int, value: Any) -> None:
        if self.registers:
            self.registers[r][quad].set(value)
        else:
            v.store(self.e.tile, [r, quad * LANES], value, LANES)


class Kept:
    """int32 sums of a group that is several chunks, ``(rows, planes or 1, width)`` in memory."""

    def __init__(self, e: Emission, rows: int) -> None:
        self.planes = 1 if e.panels.planes.uniform else e.panels.planes.bits
        self.rows, self.width = rows, e.panels.width
        self.buffer = B.alloc_buffer((rows, self.planes, self.width), "int32", annotations=ON_STACK)

    def clear(self) -> None:
        """Begin a group."""
        for r in range(self.rows):
            for plane in range(self.planes):
                for column in range(0, self.width, LANES):
                    v.store(self.buffer, [r, plane, column], v.const(0, LANES, "int32"), LANES)

    def add_chunk(self, r: int, block: int, sums: Sums) -> None:
        """Add a chunk."""
        for plane, values in enumerate(sums.values()):
            for half, value in enumerate(values):
                at = [r, plane, block * COLUMNS + half * LANES]
                v.store(self.buffer, at, v.load(self.buffer, at, LANES) + value, LANES)

    def values(self, r: int, block: int) -> list[list[Any]]:
        """The sums of the group, int32 ``[plane or one][quad]``."""
        return [
            [v.let(v.load(self.buffer, [r, plane, block * COLUMNS + half * LANES], LANES)) for half in (0, 1)]
            for plane in range(self.planes)
        ]


def largest_code(problem: LinearProblem) -> int:
    """Largest magnitude of an activation code: that of a static quantizer may be -128."""
    return 128 if problem.activation.granularity == "tensor" else 127
