"""Packed codes to tensor-core operands, in registers.

`ExactDequantizer`: OR-ing a code into the mantissa of 1024 (fp16) or 128 (bf16), at bit p, makes ``base + 2^p code``
without any conversion; one fused multiply-add with ``2^-p`` and ``-(base 2^-p + zero)`` leaves ``code - zero``, exactly,
because all numbers involved are integers the type represents (Kim et al., "Who Says Elephants Can't Run", 2022). ``lop3``
masks and ORs in one instruction, and handles two codes, 16 bits apart.

`RawDequantizer`, fp16 only: without the base the same bits are the subnormal number ``2^(p-24) code``, which the tensor
cores multiply like any other. One instruction per operand register; p depends on the channel only, so that ``2^(24-p)``
leaves through the scale, and zero points through ``sum (c - z) x = sum c x - z sum x``.

`ScaledDequantizer`: operands times the scale of their group, for products whose sums should not be touched at the end of
a group. In fp16 one fused multiply-add takes the subnormal to ``2^-9 scale (code - zero)``, rounded once.

`IntegerDequantizer`: the code goes to the top bits of its byte, which makes ``2^(8-bits) code`` of a two's-complement code
without sign extension; the factor leaves through the column scale. Zero points are subtracted in all bytes at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda.emit import Registers, ptx, u32

AND_OR = 0xEA
"""lop3 table of ``(a & b) | c``."""

SCALED_EXPONENT = 9
"""Operands of fp16 `ScaledDequantizer` are ``2^-9`` of the weights: the range left to scales is ``2^15 .. 2^-24``."""


def half_pair(value: float, bf16: bool) -> int:
    """``value`` twice, as a pair of fp16 or bf16; must be representable."""
    import numpy as np

    if bf16:
        word = int(np.array(value, np.float32).view(np.uint32)) >> 16
        assert np.array(word << 16, np.uint32).view(np.float32) == value
    else:
        word = int(np.array(value, np.float16).view(np.uint16))
        assert np.array(word, np.uint16).view(np.float16) == value
    return word << 16 | word


@dataclass
class ExactDequantizer:
    """Emits the four operand registers of a weight tile. ``zero`` holds pairs ``(zero, zero)`` per ``a``, or None."""

    bits: int
    bf16: bool
    zero: Registers | None

    def __post_init__(self) -> None:
        self.base = 128 if self.bf16 else 1024
        self.magic = half_pair(self.base, self.bf16)
        self.type = "bf16x2" if self.bf16 else "f16x2"
        self.temporary = Registers((4,), "uint32")
        if self.zero is not None and self.bits != 8:
            self.offset = Registers((10, 2), "uint32")

    def places(self) -> list[tuple[int, int]]:
        """Pairs (p, a) of mantissa bit and channel half that occur."""
        return sorted({(self._place(i, r)[1], r % 2) for i in range(2) for r in range(4)})

    def _place(self, tile: int, r: int) -> tuple[int, int]:
        """Right shift that brings the code of register ``r`` to mantissa bit p, and p."""
        at = {4: 4 * r, 2: 8 * tile + 2 * r, 3: 8 * tile + 2 * r}[self.bits]
        room = (7 if self.bf16 else 10) - self.bits
        shift = 0 if at <= room else (at if self.bf16 and self.bits == 4 else at - at % 8)
        if at - shift > room:
            shift = at
        return shift, at - shift

    def begin(self) -> None:
        """Emit what depends on the zero points only; once per group."""
        if self.zero is None or self.bits == 8:
            return
        for p, a in self.places():
            base = u32(half_pair(-self.base / 2**p, self.bf16))
            if self.bf16:
                ptx("fma.rn.bf16x2", self.offset[p, a], self.zero[a], u32(half_pair(-1, True)), base)
            else:
                ptx("sub.rn.f16x2", self.offset[p, a], base, self.zero[a])

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """Emit registers ``out[0..3]`` of a tile from the words its lane holds.

        Args:
            low: words of the unit's vector of the first plane.
            high: words of the one-bit plane of a 3-bit code, else None.
            unit, tile: position of the tile in the block.
        """
        if self.bits == 8:
            self._bytes(out, low, tile)
            return
        word = low[2 * (unit % 2) + tile] if self.bits == 4 else low[unit]
        for r in range(4):
            shift, p = self._place(tile, r)
            source = word
            if shift:
                self.temporary[r] = word >> u32(shift)
                source = self.temporary[r]
            width = 2 if self.bits == 3 else self.bits
            mask = ((1 << width) - 1) << p
            ptx("lop3.b32", out[r], source, u32(mask << 16 | mask), u32(self.magic), AND_OR)
            if high is not None:
                _or_high_bit(out, r, high, unit, tile, p + 2, self.temporary)
            self._subtract(out, r, p)

    def _subtract(self, out: Any, r: int, p: int) -> None:
        offset = (
            u32(half_pair(-(self.base / 2**p + (1 << self.bits - 1)), self.bf16))
            if self.zero is None
            else self.offset[p, r % 2]
        )
        if p == 0 and not self.bf16:
            ptx("add.rn.f16x2", out[r], out[r], offset)
        else:
            ptx(f"fma.rn.{self.type}", out[r], out[r], u32(half_pair(2.0**-p, self.bf16)), offset)

    def _bytes(self, out: Any, words: list[Any], tile: int) -> None:
        for r in range(4):
            word, select = words[2 * tile + r // 2], (0x4342 if r % 2 else 0x4140)
            if not self.bf16:
                ptx("prmt.b32", out[r], word, u32(0x64646464), u32(select))
                if self.zero is None:
                    ptx("sub.rn.f16x2", out[r], out[r], u32(half_pair(1024 + 128, False)))
                else:
                    ptx("sub.rn.f16x2", out[r], out[r], u32(self.magic))
                    ptx("sub.rn.f16x2", out[r], out[r], self.zero[r % 2])
                continue
            # bf16 has 8 bits of precision: take bytes to 2^23 + code in float32, subtract, round (exactly) to bf16.
            floats = []
            for e in range(2):
                ptx("prmt.b32", self.temporary[e], word, u32(0x4B000000), u32(0x7440 | 2 * (r % 2) + e))
                floats.append(T.reinterpret("float32", self.temporary[e]))
            zero = T.float32(8388608 + 128)
            if self.zero is not None:
                zero = T.float32(8388608) + T.reinterpret("float32", self.zero[r % 2] << u32(16))
            ptx("cvt.rn.bf16x2.f32", out[r], floats[1] - zero, floats[0] - zero)


def _or_high_bit(out: Any, r: int, high: list[Any], unit: int, tile: int, want: int, temporary: Registers) -> None:
    """OR the third bit of a 3-bit code into bit ``want`` of both halves of ``out[r]``."""
    at = 8 * (unit % 2) + 4 * tile + r
    plane = high[unit // 2]
    if at != want:
        temporary[r] = plane >> u32(at - want) if at > want else plane << u32(want - at)
        plane = temporary[r]
    ptx("lop3.b32", out[r], plane, u32(1 << want + 16 | 1 << want), out[r], AND_OR)


def raw_place(bits: int, a: int) -> int:
    """Mantissa bit p at which `RawDequantizer` leaves codes of channel half ``a``."""
    return {2: 2, 3: 2, 4: 4, 8: 0}[bits] * a


@dataclass
class RawDequantizer:
    """Emits codes as fp16 subnormals, ``2^(p-24) code`` with p from `raw_place`."""

    bits: int

    def __post_init__(self) -> None:
        self.temporary = Registers((4,), "uint32")

    def begin(self) -> None:
        """Nothing depends on the group."""

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `ExactDequantizer.tile`."""
        for r in range(4):
            if self.bits == 8:
                ptx("prmt.b32", out[r], low[2 * tile + r // 2], u32(0), u32(0x4342 if r % 2 else 0x4140))
                continue
            word = low[2 * (unit % 2) + tile] if self.bits == 4 else low[unit]
            p = raw_place(self.bits, r % 2)
            shift = (4 * r if self.bits == 4 else 8 * tile + 2 * r) - p
            width = 2 if self.bits == 3 else self.bits
            mask = ((1 << width) - 1) << p
            out[r] = (word >> u32(shift) if shift else word) & u32(mask << 16 | mask)
            if high is not None:
                _or_high_bit(out, r, high, unit, tile, p + 2, self.temporary)


class ScaledDequantizer:
    """Emits ``2^-exponent scale (code - zero)``; without groups, ``2^-exponent (code - zero)``.

    Args:
        bits, bf16: of codes and operands.
        grouped, symmetric: whether there is a scale per group, and no zero point.
    """

    def __init__(self, bits: int, bf16: bool, grouped: bool, symmetric: bool) -> None:
        self.bits, self.bf16, self.grouped, self.symmetric = bits, bf16, grouped, symmetric
        self.exponent = 0 if bf16 else SCALED_EXPONENT
        self.zero: Any = None if symmetric else Registers((2,), "uint32")
        self.scale = Registers((2,), "uint32")
        self.inner: Any = ExactDequantizer(bits, True, self.zero) if bf16 else RawDequantizer(bits)
        self.factor, self.offset = Registers((2,), "uint32"), Registers((2,), "uint32")

    def begin(self, scale: Any, zero: Any) -> None:
        """Take the scales and zero points of a group for both channel halves: a register of two fp16 (scale) or of two
        numbers in the type of the operands (zero) each; None where there are none."""
        for a in range(2):
            half = u32(0x3232 if a else 0x1010)
            if zero is not None:
                ptx("prmt.b32", self.zero[a], zero, zero, half)
            if scale is not None:
                ptx("prmt.b32", self.scale[a], scale, scale, half)
        if self.bf16:
            self._begin_bf16(scale)
            return
        unit = u32(half_pair(-(2.0**-SCALED_EXPONENT), False))
        for a in range(2):
            up = u32(half_pair(2.0 ** (15 - raw_place(self.bits, a)), False))
            fused = self.grouped and self.symmetric
            if fused:
                ptx("mul.rn.f16x2", self.factor[a], self.scale[a], up)
                center = u32(half_pair(-(2.0 ** (self.bits - 1 - SCALED_EXPONENT)), False))
                ptx("mul.rn.f16x2", self.offset[a], self.scale[a], center)
            else:
                self.factor[a] = up
                if self.symmetric:
                    self.offset[a] = u32(half_pair(-(2.0 ** (self.bits - 1 - SCALED_EXPONENT)), False))
                else:
                    ptx("mul.rn.f16x2", self.offset[a], self.zero[a], unit)

    def _begin_bf16(self, scale: Any) -> None:
        self.inner.begin()
        if scale is None:
            return
        for a in range(2):
            bits = T.cast(scale >> u32(16 * a), "uint16")
            value = T.cast(T.reinterpret("float16", bits), "float32")
            ptx("cvt.rn.bf16x2.f32", self.factor[a], value, value)

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `ExactDequantizer.tile`."""
        self.inner.tile(out, low, high, unit, tile)
        for r in range(4):
            a = r % 2
            if self.bf16:
                if self.grouped:
                    ptx("mul.rn.bf16x2", out[r], out[r], self.factor[a])
                continue
            ptx("fma.rn.f16x2", out[r], out[r], self.factor[a], self.offset[a])
            if self.grouped and not self.symmetric:
                ptx("mul.rn.f16x2", out[r], out[r], self.scale[a])


@dataclass
class IntegerDequantizer:
    """Emits the four int8 operand registers of a weight tile: codes times ``2^(8 - bits)``, or ``code - zero``.

    Args:
        bits: stored per code.
        zero: registers of a zero point in every byte, per channel half, or None for two's complement codes.
    """

    bits: int
    zero: Registers | None = None

    def begin(self, scale: Any = None, zero: Any = None) -> None:
        """Take the zero points of a group, if they come with it: a register of one in both bytes of either half."""
        if self.zero is not None and zero is not None:
            for a in range(2):
                ptx("prmt.b32", self.zero[a], zero, zero, u32(0x3232 if a else 0x1010))

    def tile(self, out: Any, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `ExactDequantizer.tile`."""
        for r in range(4):
            if self.bits == 8:
                out[r] = low[r]
                continue
            word = low[2 * tile + r // 2] if self.bits == 4 else low[2 * unit + tile]
            at = 4 * (r % 2) if self.bits == 4 else 2 * r
            if self.zero is not None:
                # 128 + code - zero does not borrow from the next byte; without the 128 it is two's complement.
                mask = ((1 << self.bits) - 1) * 0x01010101
                ptx("lop3.b32", out[r], word >> u32(at) if at else word, u32(mask), u32(0x80808080), AND_OR)
                out[r] = T.bitwise_xor(out[r] - self.zero[r % 2], u32(0x80808080))
                continue
            shift = 8 - self.bits - at
            mask = (0xFF << 8 - self.bits & 0xFF) * 0x01010101
            out[r] = (word << u32(shift) if shift else word) & u32(mask)
