"""Sums of table entries: what a micro-kernel of `LutGemm` keeps in registers while it goes through a chunk of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Register
from qcompile.codegen.kernels.x86.instructions import MADDUBS, MADDWD

if TYPE_CHECKING:
    from qcompile.codegen.kernels.x86.lut_micro import LutEmission

LANES = 8
"""Columns of a vector of int32 or float32."""


class Base:
    """What belongs to no plane in a group of one row: ``(2^bits - 1)`` negative sums less ``centre`` totals.

    Attributes:
        negative, total: int32 sums of the negative activations, and of all; ``real_total`` in float32.
        whole: of all planes together.
        plane: by plane, where planes are kept apart; together they make up ``whole``.
    """

    def __init__(self, e: LutEmission, row: Any, group: Any) -> None:
        planes = e.panels.planes
        self.negative = v.let(e.tables.negative[row, group])
        self.total = v.let(e.tables.total[row, group])
        self.real_total = v.let(T.cast(self.total, "float32"))
        self.whole = v.let(((1 << planes.bits) - 1) * self.negative - planes.centre * self.total)
        if e.panels.adjacent:
            self.plane = [self.whole]
        else:
            self.plane = [self.negative] * planes.bits
            if planes.uniform:
                self.plane[-1] = v.let(self.negative - self.total)


class Sums:
    """The 16-bit sums of one block of columns: a register if planes are adjacent, else two per plane.

    Of two registers, one adds up all lanes, ``even + 256 odd`` modulo 2^16, the other ``odd``.
    """

    def __init__(self, e: LutEmission) -> None:
        self.e, self.half = e, e.size // 2
        count = 1 if e.panels.adjacent else 2
        self.registers = [[Register("int16", self.half) for _ in range(count)] for _ in range(e.stored_planes)]

    def start(self, base: Base) -> None:
        """Assign the base, or zero where the sums are unsigned."""
        for registers, value in zip(self.registers, base.plane):
            if not self.e.signed:
                for register in registers:
                    register.set(v.const(0, self.half, "int16"))
                continue
            registers[-1].set(v.splat(T.cast(value, "int16"), self.half))
            if len(registers) == 2:
                registers[0].set(v.splat(T.cast(value * 257, "int16"), self.half))

    def add(self, plane: int, found: Any) -> None:
        """Add one register of table entries."""
        registers = self.registers[plane]
        if len(registers) == 1:
            registers[0].set(registers[0].get() + self._merge(found, 1, 2))
            return
        registers[0].set(registers[0].get() + v.bits_of(found, "int16", self.half))
        registers[1].set(registers[1].get() + self._merge(found, 0, 1))

    def _merge(self, found: Any, even: int, odd: int) -> Any:
        """Unsigned bytes times ``even`` and ``odd``, added in pairs to 16 bits."""
        factors = v.bits_of(v.const(even + (odd << 8), self.half, "int16"), "int8", self.e.size)
        return T.call_llvm_pure_intrin(f"int16x{self.half}", MADDUBS[self.e.size // 4], found, factors)

    def values(self, plane: int) -> list[Any]:
        """The sums of a plane (of all, if adjacent) as int32x8, in column order."""
        size, registers = self.e.size, self.registers[plane]
        if self.e.panels.adjacent and self.e.panels.planes.bits == 4:
            factors = v.bits_of(v.const(1 + (4 << 16), size // 4, "int32"), "int16", self.half)
            wide = T.call_llvm_pure_intrin(f"int32x{size // 4}", MADDWD[size // 4], registers[0].get(), factors)
            wide = v.let(wide)
            return [v.let(v.shuffle(wide, range(i, i + LANES))) for i in range(0, size // 4, LANES)]
        narrow = [register.get() for register in registers]
        if len(narrow) == 2:
            narrow[0] = v.let(narrow[0] - T.shift_left(narrow[1], v.const(8, self.half, "int16")))
        found = []
        for register in narrow:
            for i in range(0, self.half, LANES):
                part = v.shuffle(register, range(i, i + LANES))
                part = part if self.e.signed else v.bits_of(part, "uint16", LANES)
                found.append(v.let(v.cast(part, "int32", LANES)))
        return found
