"""Packed codes to tensor-core operands, in registers.

Floats. OR-ing a code into the mantissa of 1024 (fp16) or 128 (bf16), at bit p, makes ``base + 2^p code`` without any
conversion; one fused multiply-add with ``2^-p`` and ``-(base 2^-p + zero)`` leaves ``code - zero``, exactly, because all
numbers involved are integers the type represents (Kim et al., "Who Says Elephants Can't Run", 2022). ``lop3`` masks and
ORs in one instruction, and handles two codes, 16 bits apart.

Int8. The code goes to the top bits of its byte, which makes ``2^(8-bits) code`` of a two's-complement code without sign
extension; the factor leaves through the column scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda.emit import Registers, ptx, u32

AND_OR = 0xEA
"""lop3 table of ``(a & b) | c``."""


def _half(value: float, bf16: bool) -> int:
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
class FloatDequantizer:
    """Emits the four operand registers of a weight tile. ``zero`` holds pairs ``(zero, zero)`` per ``a``, or None."""

    bits: int
    bf16: bool
    zero: Registers | None

    def __post_init__(self) -> None:
        self.base = 128 if self.bf16 else 1024
        self.magic = _half(self.base, self.bf16)
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
            base = u32(_half(-self.base / 2**p, self.bf16))
            if self.bf16:
                ptx("fma.rn.bf16x2", self.offset[p, a], self.zero[a], u32(_half(-1, True)), base)
            else:
                ptx("sub.rn.f16x2", self.offset[p, a], base, self.zero[a])

    def tile(self, out: Registers, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
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
                at, want = 8 * (unit % 2) + 4 * tile + r, p + 2
                plane = high[unit // 2]
                if at != want:
                    moved = plane >> u32(at - want) if at > want else plane << u32(want - at)
                    self.temporary[r] = moved
                    plane = self.temporary[r]
                ptx("lop3.b32", out[r], plane, u32(1 << want + 16 | 1 << want), out[r], AND_OR)
            self._subtract(out, r, p)

    def _subtract(self, out: Registers, r: int, p: int) -> None:
        offset = (
            u32(_half(-(self.base / 2**p + (1 << self.bits - 1)), self.bf16))
            if self.zero is None
            else self.offset[p, r % 2]
        )
        if p == 0 and not self.bf16:
            ptx("add.rn.f16x2", out[r], out[r], offset)
        else:
            ptx(f"fma.rn.{self.type}", out[r], out[r], u32(_half(2.0**-p, self.bf16)), offset)

    def _bytes(self, out: Registers, words: list[Any], tile: int) -> None:
        for r in range(4):
            word, select = words[2 * tile + r // 2], (0x4342 if r % 2 else 0x4140)
            if not self.bf16:
                ptx("prmt.b32", out[r], word, u32(0x64646464), u32(select))
                if self.zero is None:
                    ptx("sub.rn.f16x2", out[r], out[r], u32(_half(1024 + 128, False)))
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


@dataclass
class IntegerDequantizer:
    """Emits the four int8 operand registers of a weight tile, each code times ``2^(8 - bits)``."""

    bits: int

    def begin(self) -> None:
        """Nothing depends on the group."""

    def tile(self, out: Registers, low: list[Any], high: list[Any] | None, unit: int, tile: int) -> None:
        """See `FloatDequantizer.tile`."""
        for r in range(4):
            if self.bits == 8:
                out[r] = low[r]
                continue
            word = low[2 * tile + r // 2] if self.bits == 4 else low[2 * unit + tile]
            at = 4 * (r % 2) if self.bits == 4 else 2 * r
            shift = 8 - self.bits - at
            mask = (0xFF << 8 - self.bits & 0xFF) * 0x01010101
            out[r] = (word << u32(shift) if shift else word) & u32(mask)
