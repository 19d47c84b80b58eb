"""Codes to tensor-core operands where codes are no plain integers: tables of levels, small floats, integers in integers.

`TableDequantizer`: any set of up to 16 levels. A byte permutation picks four bytes out of eight by the low three bits of
four selectors, which are four codes; twice for the two halves of the table, and once more by their fourth bits to choose
between the halves. Levels of 16 bits are two tables of bytes. 21 instructions for the eight codes of a lane.

`PairDequantizer`: both codes of a register are a byte, by which a table of 256 pairs in shared memory is looked up, a copy for
every lane, so that no banks collide: that of byte b for lane l lies at word 32 b + l. A byte permutation, a multiplication and
a load per register, 12 instructions.

`Float8Dequantizer`: e4m3 is a fp16 number with its exponent moved: shifting the sign into bit 15 and the rest to bit 7
makes ``2^-8`` of it, subnormals included; in bf16 the rest goes to bit 4 and makes ``2^-120`` of it.

`DualDequantizer`: codes of 4 bits times the integer of their group are int8 weights (Zhang et al., "Dual Grained
Quantization", 2023). All four codes of a register are multiplied at once: ``u g <= 15 15`` does not leave its byte, and
``c g = u g - 8 g`` with ``u = c + 8``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda.dequant import AND_OR, half_pair
from qcompile.codegen.kernels.cuda.emit import Registers, ptx, u32

FLOAT8_EXPONENT = 8
"""fp16 operands of `Float8Dequantizer` are ``2^-8`` of the weights."""


@dataclass
class TableDequantizer:
    """Emits the levels of 4-bit codes, fp16 or bf16 (``planes`` 2) or e4m3 (1).

    Args:
        planes: bytes of a level.
        table: registers of `layout.table_words`.
    """

    planes: int
    table: Registers

    def __post_init__(self) -> None:
        self.bytes = Registers((self.planes, 2), "uint32")
        self.part = Registers((2,), "uint32")
        self.index, self.half = Registers((1,), "uint32"), Registers((1,), "uint32")

    def begin(self, scale: Any = None, zero: Any = None) -> None:
        """Nothing depends on the group."""

    def _look_up(self, word: Any) -> None:
        """Bytes of the levels of eight codes: ``bytes[plane, j]`` those of nibbles 4 j .. 4 j + 3."""
        self.index[0] = word & u32(0x77777777)
        # Selector i, or i + 4 for the upper half of the table.
        ptx("lop3.b32", self.half[0], word >> u32(1), u32(0x44444444), u32(0x32103210), AND_OR)
        for j in range(2):
            index = self.index[0] >> u32(16) if j else self.index[0]
            half = self.half[0] >> u32(16) if j else self.half[0]
            for p in range(self.planes):
                for upper in range(2):
                    at = 4 * p + 2 * upper
                    ptx("prmt.b32", self.part[upper], self.table[at], self.table[at + 1], index)
                ptx("prmt.b32", self.bytes[p, j], self.part[0], self.part[1], half)

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `dequant.ExactDequantizer.tile`."""
        if self.planes == 1:
            for pair in range(2):
                self._look_up(low[2 * tile + pair])
                for a in range(2):
                    select = u32(0x7531 if a else 0x6420)
                    ptx("prmt.b32", out[2 * pair + a], self.bytes[0, 0], self.bytes[0, 1], select)
            return
        self._look_up(low[2 * (unit % 2) + tile])
        # Nibble 2 r + e is element e of register r.
        for r in range(4):
            select = u32(0x7362 if r % 2 else 0x5140)
            ptx("prmt.b32", out[r], self.bytes[0, r // 2], self.bytes[1, r // 2], select)


@dataclass
class PairDequantizer:
    """Emits the levels of 4-bit codes, fp16 or bf16.

    Args:
        read: the word at a place of the table, counted from this lane's copy.
    """

    read: Callable[[Any], Any]

    def __post_init__(self) -> None:
        self.byte = Registers((4,), "uint32")

    def begin(self, scale: Any = None, zero: Any = None) -> None:
        """Nothing depends on the group."""

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `dequant.ExactDequantizer.tile`."""
        for r in range(4):
            ptx("prmt.b32", self.byte[r], low[2 * (unit % 2) + tile], u32(0), u32(0x4440 | r))
        for r in range(4):
            out[r] = self.read(self.byte[r] * u32(32))


def pairs_of(table: TableDequantizer, out: Registers, index: Any) -> None:
    """Emit the pairs of bytes ``4 index .. 4 index + 3`` to four registers."""
    four = Registers((1,), "uint32")
    four[0] = index * u32(0x04040404) + u32(0x03020100)
    table.tile(out, [four[0]], None, 0, 0)


@dataclass
class Float8Dequantizer:
    """Emits e4m3 codes as fp16 (times 2^-8) or bf16."""

    bf16: bool

    def __post_init__(self) -> None:
        self.temporary = Registers((2,), "uint32")

    def begin(self, scale: Any = None, zero: Any = None) -> None:
        """Nothing depends on the group."""

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `dequant.ExactDequantizer.tile`."""
        shift = 4 if self.bf16 else 1
        rest = 0x7F00 >> shift
        for r in range(4):
            word, select = low[2 * tile + r // 2], (0x3424 if r % 2 else 0x1404)
            ptx("prmt.b32", self.temporary[0], word, u32(0), u32(select))  # every byte above an empty one
            self.temporary[1] = (self.temporary[0] >> u32(shift)) & u32(rest << 16 | rest)
            ptx("lop3.b32", out[r], self.temporary[0], u32(0x80008000), self.temporary[1], AND_OR)
            if self.bf16:
                ptx("mul.rn.bf16x2", out[r], out[r], u32(half_pair(2.0**120, True)))


class ScaledValues:
    """Emits what ``inner`` emits, times the scale of the group.

    Args:
        inner: emits fp16 or bf16 (``bf16``).
        grouped: whether there are scales of groups.
        exponent: operands are ``2^-exponent`` of the weights.
    """

    def __init__(self, inner: Any, bf16: bool, grouped: bool, exponent: int = 0) -> None:
        self.inner, self.bf16, self.grouped, self.exponent = inner, bf16, grouped, exponent
        self.scale = Registers((2,), "uint32")

    def begin(self, scale: Any, zero: Any) -> None:
        """Take the scales of a group for both channel halves: a register of two fp16; None where there are none."""
        if scale is None:
            return
        for a in range(2):
            if self.bf16:
                value = T.cast(T.reinterpret("float16", T.cast(scale >> u32(16 * a), "uint16")), "float32")
                ptx("cvt.rn.bf16x2.f32", self.scale[a], value, value)
            else:
                ptx("prmt.b32", self.scale[a], scale, scale, u32(0x3232 if a else 0x1010))

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `dequant.ExactDequantizer.tile`."""
        self.inner.tile(out, low, high, unit, tile)
        for r in range(4) if self.grouped else ():
            ptx(f"mul.rn.{'bf16x2' if self.bf16 else 'f16x2'}", out[r], out[r], self.scale[r % 2])


@dataclass
class DualDequantizer:
    """Emits the int8 weights of ``dual4``.

    Args:
        factor: registers of the integers of the group, per channel half.
    """

    factor: Registers

    def __post_init__(self) -> None:
        self.offset = Registers((2,), "uint32")

    def begin(self, scale: Any = None, zero: Any = None) -> None:
        """Take the integers of a group, if they come with it: two of 16 bits in a register."""
        if scale is not None:
            self.factor[0] = scale & u32(0xFFFF)
            self.factor[1] = scale >> u32(16)
        for a in range(2):
            self.offset[a] = self.factor[a] * u32(0x08080808)

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `dequant.ExactDequantizer.tile`."""
        for r in range(4):
            word, at, a = low[2 * tile + r // 2], 4 * (r % 2), r % 2
            out[r] = ((word >> u32(at) if at else word) & u32(0x0F0F0F0F)) * self.factor[a]
            # Bytes apart: with the top bits set nothing is borrowed; they are put right afterwards.
            difference = T.bitwise_or(out[r], u32(0x80808080)) - self.offset[a]
            out[r] = T.bitwise_xor(difference, T.bitwise_xor(out[r], u32(0x80808080)) & u32(0x80808080))
