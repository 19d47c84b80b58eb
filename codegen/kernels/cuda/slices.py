"""Activations as slices of eight bits, so that integer tensor cores multiply them by packed codes as they are.

A block of 128 activations shares an exponent: ``x = 2^-s X`` with integers ``|X| < 2^30 / 2^MOST``. Four signed bytes of
``X = sum_d 256^d X_d`` are four columns of the second operand of `mma.m16n8k32`, whose eight columns one row of x leaves empty
otherwise; products and sums of codes and slices are exact. Splitting for integer tensor cores: Ootomo, Ozaki, Yokota, "DGEMM on
integer matrix multiplication unit", 2024 (the Ozaki scheme); here weights are integers already and need one slice.

The first operand are the packed bytes (`layout`), masked in place: four codes per instruction. A code whose lowest bit is bit
p of its byte counts ``2^p`` times. p depends on the channel half a, which leaves through the result, and on the position in K,
for which the slices are of ``2^(highest p - p) X``. Per 16 channels and 32 positions: four masks (or byte permutations for
8-bit codes) and one product, no shift.

With lane = 4 g + t, *quad* q of a plane are the four positions that share an operand register: bytes of one 32-bit word of
x's operand. Lane (g, t) slices the four elements of quad g; an exchange through shared memory gives it slice ``g % 4`` of all
eight quads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda.emit import Registers, ptx, u32
from qcompile.codegen.kernels.cuda.sliced import SLICES

BYTES = 0x01010101

LEAST = 30
"""Biased exponent below which elements are not told from smaller ones: no factor leaves float32."""


@dataclass(frozen=True)
class SlicedPlane:
    """How the bytes of a plane of codes are multiplied.

    Attributes:
        bits: of the plane; 3-bit codes are a plane of two and a plane of one.
        first: lowest bit of the code that the plane holds.
        delta: distance of the two pairs of neighbours a quad consists of.
        woven: whether bytes of a quad alternate between the pairs.
        row: log2 of how often codes of the second channel half count more.
    """

    bits: int
    first: int = 0

    @property
    def delta(self) -> int:
        return {1: 32, 2: 16, 4: 8, 8: 8}[self.bits]

    @property
    def woven(self) -> bool:
        return self.bits < 8

    @property
    def row(self) -> int:
        return {1: 1, 2: 2, 4: 4, 8: 0}[self.bits]

    @property
    def above(self) -> int:
        """log2 of what the slices of the first quad are multiplied by more than those of the last."""
        return {1: 6, 2: 4, 4: 0, 8: 0}[self.bits]

    def base(self, quad: Any) -> Any:
        """First position of a quad in its block, for t = 0; lane t is 2 t further."""
        if self.bits == 1:
            return quad // 4 * 64 + quad // 2 % 2 * 16 + quad % 2 * 8
        return quad // 2 * 32 + quad % 2 * (8 if self.bits == 2 else 16)

    def prescale(self, quad: Any) -> Any:
        """log2 of what the elements of a quad are multiplied by."""
        if self.bits == 1:
            return 6 - 4 * (quad // 2 % 2) - 2 * (quad % 2)
        return 4 - 4 * (quad % 2) if self.bits == 2 else quad * 0

    def places(self, product: int) -> list[tuple[int, int]]:
        """Word of the block and bit of its bytes, for the four registers of a product."""
        found = []
        for r in range(4):
            h, a = divmod(r, 2)
            if self.bits == 1:
                found.append((product // 2, 4 * (product % 2) + r))
            elif self.bits == 2:
                found.append((product, 2 * r))
            elif self.bits == 4:
                found.append((2 * product + h, 4 * a))
            else:
                found.append((4 * product + 2 * h, 0))
        return found

    def operand(self, out: Any, words: list[Any], product: int) -> None:
        """Emit registers ``out[0..3]`` of a product from the words a lane holds of a block."""
        for r, (word, bit) in enumerate(self.places(product)):
            if self.bits == 8:
                ptx("prmt.b32", out[r], words[word], words[word + 1], u32(0x7632 if r % 2 else 0x5410))
            else:
                out[r] = words[word] & u32(self._mask(bit))

    def _mask(self, bit: int) -> int:
        return BYTES * ((1 << self.bits) - 1 << bit)

    def constant(self, code: int, product: int) -> list[int]:
        """Operand registers of codes that are all ``code``."""
        part = code >> self.first & (1 << self.bits) - 1
        return [BYTES * (part << bit) for _, bit in self.places(product)]


def sliced_planes(bits: int) -> tuple[SlicedPlane, ...]:
    """The planes of ``bits``-bit codes, as in `layout.FragmentLayout.planes`."""
    return (SlicedPlane(2), SlicedPlane(1, 2)) if bits == 3 else (SlicedPlane(bits),)


def above(bits: int) -> int:
    """log2 of the largest factor elements are multiplied by before they are sliced."""
    return max(plane.above for plane in sliced_planes(bits))


class Slicer:
    """Emits the slices of a quad.

    Args:
        bits: of codes. lane: of the warp.
    """

    def __init__(self, bits: int) -> None:
        self.most = 30 - above(bits)
        self.value = Registers((4,), "uint32")
        self.pair = Registers((4,), "uint32")

    def exponent(self, largest: Any) -> tuple[Any, Any]:
        """Bits of the float32 ``2^s`` and ``2^-s``, the second NaN if there is one, or an infinity, among the elements.

        Args:
            largest: bits of the largest absolute value as float32.
        """
        biased = T.max(largest >> u32(23), u32(LEAST))
        up = (u32(253 + self.most) - biased) << u32(23)
        down = T.Select(biased == u32(255), u32(0x7FC00000), (biased - u32(self.most - 1)) << u32(23))
        return up, down

    def slices(self, out: Any, elements: list[Any]) -> None:
        """Emit ``out[d]``, byte i of which is slice d of ``elements[i]``: float32, integers after rounding below 2^30."""
        for i, element in enumerate(elements):
            ptx("cvt.rni.s32.f32", self.value[i], element)
            # 128 in every byte makes them unsigned digits, and leaves as the sign bit.
            self.value[i] = T.bitwise_xor(self.value[i] + u32(128 * BYTES), u32(128 * BYTES))
        for half, select in enumerate((0x5140, 0x7362)):
            for i in range(2):
                place = self.pair[2 * half + i]
                ptx("prmt.b32", place, self.value[2 * i], self.value[2 * i + 1], u32(select))
        for d in range(SLICES):
            low, high = self.pair[2 * (d // 2)], self.pair[2 * (d // 2) + 1]
            ptx("prmt.b32", out[d], low, high, u32(0x7632 if d % 2 else 0x5410))
