"""Where every weight lies, so that one 16-byte load gives a lane exactly the tensor-core operand it multiplies.

The kernels compute ``y^T = W^T x^T`` with `mma.sync.m16n8`: the weight tile is the *first* operand, 16 output channels
by 16 (fp16, bf16) or 32 (int8) positions of K; eight rows of ``x`` are the second. Up to eight rows thus cost a single
instruction per weight tile. PTX ISA, "Matrix fragments for mma.m16n8k16 / m16n8k32", with lane = 4 g + t:

    weight register r = 2 h + a    channel g + 8 a,   elements E t + half h of the tile, E per 32-bit register
    x register h                   row g,             the same elements

A *unit* is two tiles, four chunks of 16 bytes of a row of x; both operands keep the order K has in memory:

    k = unit * 16 E + (2 i + h) * 4 E + t * E + e         i tile of the unit

so that x may be read by `ldmatrix` from shared memory, or by `wgmma`, whose first operand has the same fragments: warp w
of a warpgroup holds channels 16 w .. 16 w + 15 of 64.

Codes of one K block of 128 positions and 16 channels are stored as vectors of 16 bytes per lane (8 for the one-bit
plane), lane after lane, so that a warp reads 512 contiguous bytes. Within a 32-bit word the codes are placed where the
dequantizer wants them: both elements of a register 16 bits apart (floats) or in different bytes (int8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.formats import IntFormat, Quantized
from qcompile.formats.layout import BitLayout

BLOCK = 128
"""Positions of K a block of packed codes covers; K is padded to a multiple of it."""

TILE = 16
"""Output channels of a weight tile; N is padded to a multiple of it."""


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block.

    Attributes:
        first: the lowest bit of the code the plane holds.
        bits: how many.
        layout: order of the stored bits.
        vector: bytes per lane of one load, and ``vectors`` loads per block.
    """

    first: int
    bits: int
    layout: BitLayout
    vector: int
    vectors: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 16 channels."""
        return 32 * self.vector * self.vectors


@dataclass(frozen=True)
class FragmentLayout:
    """Packing of ``bits``-bit codes for float (``integer`` False) or int8 (True) activations; ``pairs``: both 4-bit codes of a
    register in one byte, which is what a table of pairs is looked up by."""

    bits: int
    integer: bool
    pairs: bool = False

    @property
    def elements(self) -> int:
        """E: elements per 32-bit operand register."""
        return 4 if self.integer else 2

    @property
    def unit(self) -> int:
        """Positions of K two tiles cover: 64 bytes of a row of x."""
        return 16 * self.elements

    @property
    def units(self) -> int:
        """Units of a block."""
        return BLOCK // self.unit

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The planes codes are split into: 3-bit codes are a 2-bit and a 1-bit plane, others a single one."""
        if self.bits == 3:
            return (self._plane(0, 2), self._plane(2, 1))
        return (self._plane(0, self.bits),)

    def _plane(self, first: int, bits: int) -> Plane:
        # Axes of K: k0 block, k1 vector, k2 and k3 unit, k4 tile i, k5 half h, k6 lane t, k7 element e; of N: n1 = a, n2 = g.
        head = "n0 k0 k1 n2 k6"
        if self.integer:
            u, orders = (2, 1, 1), {
                8: "n0 k0 k1 k4 n2 k6 k2 k3 k5 n1 k7 b",
                4: f"{head} k2 k3 k4 k5 k7 n1 b",
                2: "n0 k0 n2 k6 k1 k2 k3 k4 k7 k5 n1 b",
            }  # fmt: skip
            order = orders[bits]
        else:
            u, order = {
                8: ((4, 1, 1), f"{head} k2 k3 k4 k5 n1 k7 b"),
                4: ((2, 1, 2), f"{head} k2 k3 k4 k7 k5 n1 b"),
                2: ((1, 1, 4), f"{head} k2 k3 k7 k4 k5 n1 b"),
                1: ((1, 2, 2), f"{head} k2 k7 k3 k4 k5 n1 b"),
            }[bits]
            if self.pairs:
                order = f"{head} k2 k3 k4 k5 n1 k7 b"
        layout = BitLayout(bits, k=(-1, *u, 2, 2, 4, self.elements), n=(-1, 2, 8), order=order)
        vector = min(16, 8 * bits)
        return Plane(first, bits, layout, vector, 8 * bits // vector)

    def padded(self, k: int, n: int) -> tuple[int, int]:
        """Extents after padding."""
        return -(-k // BLOCK) * BLOCK, -(-n // TILE) * TILE

    def pack(self, codes: np.ndarray) -> list[np.ndarray]:
        """Pack codes ``(K, N)`` (any integer type, the low ``bits`` bits count) into one uint8 vector per plane."""
        k, n = codes.shape
        rows, columns = self.padded(k, n)
        low = np.zeros((rows, columns), np.uint8)
        low[:k, :n] = codes.astype(np.int16) & (1 << self.bits) - 1
        return [
            np.ascontiguousarray(p.layout.pack(low >> p.first & (1 << p.bits) - 1)).reshape(-1) for p in self.planes
        ]

    def unpack(self, packed: list[np.ndarray], k: int, n: int) -> np.ndarray:
        """Inverse of `pack`: uint8 codes ``(k, n)``."""
        rows, columns = self.padded(k, n)
        parts = []
        for plane, data in zip(self.planes, packed, strict=True):
            shaped = data.reshape(plane.layout.shape(rows, columns))
            parts.append(plane.layout.unpack(shaped, rows, columns) << plane.first)
        return np.bitwise_or.reduce(parts)[:k, :n]


def unsigned(fmt: IntFormat, weight: Quantized) -> np.ndarray:
    """Codes as the float kernels store them: 0 .. 2^bits - 1, signed ones with their bias added."""
    return weight.codes.astype(np.int16) + (1 << fmt.bits - 1 if fmt.symmetric else 0)


def split_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split scales ``(groups, n)`` into float16 ones in [-1, 1] and a power of two per column, float32 ``(n,)``.

    Float16 keeps its 11 bits for every scale down to 2^-14 of the largest of its column.
    """
    _, exponent = np.frexp(np.abs(scale).max(0))
    column = np.ldexp(np.float32(1), exponent).astype(np.float32)
    return (scale / column).astype(np.float16), column


def pack_meta(scale: np.ndarray | None, zero: np.ndarray | None, groups: int, n: int, dtype: str) -> np.ndarray:
    """Scales and zero points of groups as uint8 bytes of 16-bit numbers, ``[channel tile, group, g, scale/zero, a]``.

    Args:
        scale: float16 ``(groups, n)``, or None where they are per column and applied at the end.
        zero: integers ``(groups, n)`` or None; stored in the type of the activations, as two equal bytes for int8.
        dtype: of the activations; ``integer`` if ``scale`` holds integers.
    """
    parts = [p for p in (scale, zero) if p is not None]
    columns = -(-n // TILE) * TILE
    out = np.zeros((columns // TILE, groups, 8, len(parts), 2), np.uint16)
    for index, part in enumerate(parts):
        if dtype == "integer":
            words = part.astype(np.uint16)
        elif part is zero and dtype == "int8":
            words = part.astype(np.uint16) * np.uint16(0x0101)
        elif part is zero and dtype == "bfloat16":
            words = (part.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # small integers: exact
        else:
            words = part.astype(np.float16).view(np.uint16)
        full = np.zeros((groups, columns), np.uint16)
        full[:, :n] = words
        out[:, :, :, index] = full.reshape(groups, columns // TILE, 2, 8).transpose(1, 0, 3, 2)
    return out.reshape(-1).view(np.uint8)


def table_words(levels: np.ndarray, dtype: str) -> np.ndarray:
    """Up to 16 levels as `tables.TableDequantizer` takes them, uint32: 4 words of bytes, 8 of low and high bytes if they have 16 bits.

    Args:
        levels: representable numbers, or those that are rounded to ``dtype``.
        dtype: ``float16``, ``bfloat16`` or ``float8_e4m3fn``.
    """
    import ml_dtypes

    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}[dtype]
    full = np.zeros(16, np.float32)
    full[: len(levels)] = levels
    stored = full.astype(kind)
    planes = stored.view(np.uint8).reshape(16, -1).T
    return np.ascontiguousarray(planes).reshape(-1).view(np.uint32).copy()
