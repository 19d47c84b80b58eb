"""The code of `rotation.WarpRotation`: products of signs with what a warp holds, butterflies, the pass through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log2
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.rotation import FIRST, SECOND, WarpRotation
from qcompile.formats.hadamard import factors, hadamard_signs

TF32 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
HALVES = {
    "float16": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 0x3C00),
    "bfloat16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 0x3F80),
}
"""Instruction and one, by type."""

ONE = 0x3F800000
KEPT = 0xFFFFE000
"""Bits of a float32 that tf32 has."""


class Signs:
    """The first operand of a product: rows m, positions k, entry ``(-1)^(m . k)`` over the bits that are transformed; where
    a bit is not, ones where m and k agree in it.

    Lane 4 g + t holds rows g and g + 8. Position bits: of tf32 operands, register column, t, t, step; of 16-bit ones, half of
    the register, t, t, register column.
    """

    def __init__(self, axes: tuple[int, ...], bits: int, lane: Any) -> None:
        self.active = [axis < bits for axis in axes]
        self.lane = lane
        g, t = lane // 4, lane % 4
        self.row = [g % 2, g // 2 % 2, g // 4]
        self.position = {1: t % 2, 2: t // 2}
        self.kept: dict[tuple[int, int], Any] = {}

    def _entry(self, low: int, high: int, first: int) -> Any:
        """As bits of a float32, or of a 16-bit number whose one is ``first``: position bit 0 is ``low``; ``high`` whether the
        third bits of row and position are both set, or -1 if they differ and that makes it zero."""
        sign, same = T.int32(0), T.bool(True)
        for bit in range(3):
            k = T.int32(low) if bit == 0 else self.position[bit]
            if self.active[bit]:
                sign = sign + self.row[bit] * k
            else:
                same = T.And(same, self.row[bit] == k)
        if high < 0:
            return e.u32(0)
        sign = (sign + high) % 2
        top = 31 if first == ONE else 15
        return T.Select(same, T.cast(sign, "uint32") << e.u32(top) | e.u32(first), e.u32(0))

    def _third(self, row: int, position: int) -> int:
        if self.active[3]:
            return row & position
        return 0 if row == position else -1

    def _once(self, key: tuple[int, int], make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = e.Registers((1,), "uint32")
            self.kept[key][0] = make()
        return self.kept[key][0]

    def prepare(self, halves: int) -> None:
        """Compute the registers; ``halves`` is the one of a 16-bit type, or 0 for tf32."""
        for column in range(2):
            for row in range(2):
                for step in range(1 if halves else 2):
                    self._register(row, column, step, halves)

    def _register(self, row: int, column: int, step: int, halves: int) -> Any:
        if halves:
            high = self._third(row, column)
            make = lambda: self._entry(0, high, halves) | self._entry(1, high, halves) << e.u32(16)  # noqa: E731
            return self._once((2, high), make)
        high = self._third(row, step)
        return self._once((column, high), lambda: self._entry(column, high, ONE))

    def operand(self, step: int, halves: int = 0) -> list[Any]:
        """Four (tf32, 16-bit) registers of a step: rows g, g + 8, then the other columns."""
        return [self._register(row, column, step, halves) for column in range(2) for row in range(2)]


class WarpRotate:
    """Rotation of what the warps of a block hold; `rowwise_code` sets the names it uses."""

    rotation: WarpRotation
    dtype: str
    tx: Any
    arena: Any
    lane: Any
    warp: Any

    def _prepare_signs(self, direct: bool) -> None:
        w = self.rotation
        self.direct = direct
        self.first = Signs(FIRST, w.bits, self.lane)
        self.second = Signs(SECOND, w.bits, self.lane)
        self.first.prepare(HALVES[self.dtype][1] if direct else 0)
        self.second.prepare(0)

    def _transform(self, value: Any, words: Any) -> None:
        """Rotate the 256 elements ``value[0..7]`` of all lanes, or those in ``words[0..3]`` as they were loaded."""
        between = e.Registers((2, 4), "float32")
        self._clear(between)
        for j in range(2):
            sums = [between[j, c] for c in range(4)]
            if self.direct:
                name, one = HALVES[self.dtype]
                e.ptx(name, *sums, *self.first.operand(0, one), words[2 * j], words[2 * j + 1], *sums)
            else:
                for step in range(2):
                    self._multiply(sums, self.first, step, [value[4 * j + 2 * step + c] for c in range(2)])
        after = e.Registers((2, 4), "float32")
        self._clear(after)
        for h in range(2):
            sums = [after[h, c] for c in range(4)]
            for step in range(2):
                self._multiply(sums, self.second, step, [between[step, 2 * h + c] for c in range(2)])
        for h in range(2):
            for c in range(4):
                value[c % 2 + 2 * h + 4 * (c // 2)] = after[h, c]

    def _clear(self, registers: e.Registers) -> None:
        for j in range(2):
            for c in range(4):
                registers[j, c] = T.float32(0)

    def _multiply(self, sums: list[Any], signs: Signs, step: int, pair: list[Any]) -> None:
        """Add a step of eight positions, elements split in two parts of 11 bits."""
        high, low = e.Registers((2,), "uint32"), e.Registers((2,), "uint32")
        for c in range(2):
            high[c] = T.reinterpret("uint32", pair[c]) & e.u32(KEPT)
            low[c] = T.reinterpret("uint32", pair[c] - T.reinterpret("float32", high[c]))
        for part in (high, low):
            e.ptx(TF32, *sums, *signs.operand(step), part[0], part[1], *sums)

    def _butterflies(self, value: Any, start: int) -> None:
        """Between the vectors a warp holds."""
        w = self.rotation
        difference = e.Registers((1,), "float32")
        for level in range(int(log2(w.held))):
            for c in range(w.held):
                if c >> level & 1:
                    continue
                for i in range(8):
                    a, b = (start + c, i), (start + (c | 1 << level), i)
                    difference[0] = value[a] - value[b]
                    value[a] = value[a] + value[b]
                    value[b] = difference[0]

    # Shared memory: four words are exchanged with the next four after every 32, so that no banks collide.

    def _put(self, at: Any, values: list[Any], scratch: int) -> None:
        """Eight neighbours from element ``at`` on."""
        for half in range(2):
            piece = e.let((at + 4 * half) // 4)
            place = T.bitwise_xor(piece, piece // 8 % 2) * 4 + scratch
            words = [T.reinterpret("uint32", v) for v in values[4 * half : 4 * half + 4]]
            e.ptx("st.shared.v4.b32", self.arena.ptr_to([place]), *words)

    def _column(self) -> Any:
        """First element of the columns of this thread."""
        w = self.rotation
        first = self.tx * w.neighbours
        return e.let(first // w.stride * w.order + first % w.stride)

    def _pass_columns(self, column: Any, scratch: int) -> e.Registers:
        """Points of this thread's columns, transformed: ``[point, neighbour]``."""
        w = self.rotation
        core, power = factors(w.radix)
        piece = e.let(column // 4)
        place = e.let(T.bitwise_xor(piece, piece // 8 % 2) * 4 + column % 4 + scratch)
        points = e.Registers((w.radix, w.neighbours), "float32")
        words = e.Registers((w.neighbours,), "uint32")
        for r in range(w.radix):
            e.read_shared([words[v] for v in range(w.neighbours)], self.arena.ptr_to([place + r * w.stride]))
            for v in range(w.neighbours):
                points[r, v] = T.reinterpret("float32", words[v])
        for v in range(w.neighbours):
            if core == 1:
                self._radix_two(points, v, power)
            else:
                multiply_signs(points, partial(_neighbour, v), hadamard_signs(w.radix))
        return points

    def _radix_two(self, points: e.Registers, v: int, power: int) -> None:
        difference = e.Registers((1,), "float32")
        for level in range(power):
            for r in range(1 << power):
                if r >> level & 1 == 0:
                    other = r | 1 << level
                    difference[0] = points[r, v] - points[other, v]
                    points[r, v] = points[r, v] + points[other, v]
                    points[other, v] = difference[0]

    def _store_bytes(self, codes: Any, row: Any, at: Any, bytes_: list[Any]) -> None:
        """Codes of 1, 2, 4 or 8 neighbours, in the low bytes of words."""
        if len(bytes_) == 1:
            B.buffer_store(codes, T.cast(T.cast(bytes_[0], "int32"), "int8"), [row, at])
            return
        pairs = e.Registers((len(bytes_) // 2,), "uint32")
        for h in range(len(bytes_) // 2):
            e.ptx("prmt.b32", pairs[h], bytes_[2 * h], bytes_[2 * h + 1], e.u32(0x0040))
        if len(bytes_) == 2:
            half = T.cast(pairs[0] & e.u32(0xFFFF), "uint16")
            e.ptx("st.global.b16", codes.ptr_to([row, at]), half)
            return
        words = e.Registers((len(bytes_) // 4,), "uint32")
        for h in range(len(bytes_) // 4):
            e.ptx("prmt.b32", words[h], pairs[2 * h], pairs[2 * h + 1], e.u32(0x5410))
        count = len(bytes_) // 4
        e.ptx(
            "st.global" + (f".v{count}" if count > 1 else "") + ".b32",
            codes.ptr_to([row, at]),
            *[words[h] for h in range(count)],
        )


def _neighbour(v: int, r: int) -> tuple[int, int]:
    """Index of point r of column v."""
    return r, v


def multiply_signs(points: e.Registers, index: Callable[[int], Any], signs: np.ndarray) -> None:
    """``points @ signs`` in place, point r at ``index(r)``. Of every four points a, b, c, d the sums a +- b +- c +- d by the signs of b, c and d: every
    column of the matrix is a quarter of them added up (Arlazarov et al., 1970)."""
    radix = len(signs)
    sums, pair = e.Registers((radix // 4, 8), "float32"), e.Registers((4,), "float32")
    for q in range(radix // 4):
        for k in range(2):
            first, second = (index(4 * q + 2 * k + i) for i in range(2))
            pair[2 * k] = points[first] + points[second]
            pair[2 * k + 1] = points[first] - points[second]
        for b in range(2):
            for c in range(2):
                for d in range(2):
                    other = pair[2 + (c ^ d)]
                    sums[q, 4 * b + 2 * c + d] = pair[b] - other if c else pair[b] + other
    for r in range(radix):
        points[index(r)] = _signed_sum(sums, signs[:, r])


def _signed_sum(sums: e.Registers, signs: np.ndarray) -> Any:
    """Points times a column of signs."""
    total = None
    for q in range(len(signs) // 4):
        first, *rest = (int(s) for s in signs[4 * q : 4 * q + 4])
        b, c, d = (int(s != first) for s in rest)
        part = sums[q, 4 * b + 2 * c + d]
        if total is None:
            total = part if first > 0 else T.float32(0) - part
        else:
            total = total + part if first > 0 else total - part
    return total
