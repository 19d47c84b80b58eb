"""The code of `rotation.WarpRotation`: products of signs with what a warp holds, butterflies, the product through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.cluster_code import ARRIVED, Cluster
from qcompile.codegen.kernels.cuda.rotation import COLUMNS, FIRST, SECOND, WarpRotation
from qcompile.formats.hadamard import hadamard_signs

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
MMA_HALF = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
ONE = 0x3C00
"""Float16; a power of two less is 0x400 less."""


class Signs:
    """The first operand of a product: rows m, positions k, entry ``(-1)^(m . k)`` over the bits that are transformed; where
    a bit is not, ones where m and k agree in it. Times the power of two that about keeps the length of a row.

    Lane 4 g + t holds rows g and g + 8. Position bits: half of the register, t, t, register column.
    """

    def __init__(self, axes: tuple[int, ...], bits: int, lane: Any) -> None:
        self.active = [axis < bits for axis in axes]
        self.exponent = sum(self.active) // 2
        g, t = lane // 4, lane % 4
        self.row = [g % 2, g // 2 % 2, g // 4]
        self.position = {1: t % 2, 2: t // 2}
        self.kept = {high: e.Registers((1,), "uint32") for high in {self._third(r, c) for r in (0, 1) for c in (0, 1)}}
        for high, register in self.kept.items():
            register[0] = self._entry(0, high) | self._entry(1, high) << e.u32(16)

    def _entry(self, low: int, high: int) -> Any:
        """Bits of a float16: position bit 0 is ``low``; ``high`` whether the fourth bits of row and position are both set, or -1
        if they differ and that makes it zero."""
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
        return T.Select(same, T.cast(sign, "uint32") << e.u32(15) | e.u32(ONE - 0x400 * self.exponent), e.u32(0))

    def _third(self, row: int, position: int) -> int:
        if self.active[3]:
            return row & position
        return 0 if row == position else -1

    def operand(self) -> list[Any]:
        """Four registers: rows g, g + 8, then the other columns."""
        return [self.kept[self._third(row, column)][0] for column in range(2) for row in range(2)]


class WarpRotate(Cluster):
    """Rotation of what the warps of a block hold; `rowwise_code` sets the names it uses."""

    rotation: WarpRotation
    lane: Any
    warp: Any
    row_at: int
    stmatrix: bool

    def _prepare_signs(self) -> None:
        w = self.rotation
        self.first = Signs(FIRST, w.bits, self.lane)
        self.second = self.first if w.bits == 8 else Signs(SECOND, w.bits, self.lane)
        self.exponent = self.first.exponent + self.second.exponent
        if w.radix > 1:
            self._prepare_points()

    # Vectors

    def _transform(self, words: list[Any]) -> e.Registers:
        """Rotate the 256 elements in the four words of all lanes: words likewise, or eight float32 if they are the result."""
        between = e.Registers((2, 2), "uint32")
        for j in range(2):
            self._multiply_half([between[j, r] for r in range(2)], self.first.operand(), words[2 * j : 2 * j + 2])
        last = self.rotation.radix == 1
        result = e.Registers((8,), "float32") if last else e.Registers((4,), "uint32")
        for h in range(2):
            operand = [between[j, h] for j in range(2)]
            if last:
                sums = [result[c % 2 + 2 * h + 4 * (c // 2)] for c in range(4)]
                self._multiply(sums, self.second.operand(), operand)
            else:
                self._multiply_half([result[h + 2 * r] for r in range(2)], self.second.operand(), operand)
        return result

    def _multiply(self, sums: list[Any], signs: list[Any], operand: list[Any], start: list[Any] | None = None) -> None:
        e.ptx(MMA, *sums, *signs, *operand, *(start or [T.float32(0)] * 4))

    def _multiply_half(self, sums: list[Any], signs: list[Any], operand: list[Any]) -> None:
        """Sums are rounded to float16: rows g and g + 8, two columns to a word."""
        e.ptx(MMA_HALF, *sums, *signs, *operand, e.u32(0), e.u32(0))

    def _butterflies(self, words: e.Registers, start: int) -> None:
        """Between the vectors a warp holds, words of two float16."""
        difference = e.Registers((1,), "uint32")
        for level in range(int(log2(self.rotation.held))):
            for c in range(self.rotation.held):
                if c >> level & 1:
                    continue
                for i in range(4):
                    a, b = (start + c, i), (start + (c | 1 << level), i)
                    e.ptx("sub.rn.f16x2", difference[0], words[a], words[b])
                    e.ptx("add.rn.f16x2", words[a], words[a], words[b])
                    words[b] = difference[0]

    # Points

    def _prepare_points(self) -> None:
        """The signs of the third product: of powers of two those of the first, else made from a mask per row."""
        w = self.rotation
        signs = hadamard_signs(w.radix).T
        self.point_exponent = self.first.exponent if w.radix in (16, 32) else 0
        self.points: dict[tuple[int, int], list[Any]] = {}
        if self.point_exponent:
            minus = None
            for m in range(w.tiles):
                for k in range(w.tiles):
                    if not m & k:
                        self.points[m, k] = self.first.operand()
                        continue
                    if minus is None:
                        minus = {high: e.Registers((1,), "uint32") for high in self.first.kept}
                        for high, register in minus.items():
                            register[0] = T.bitwise_xor(self.first.kept[high][0], e.u32(0x80008000))
                    self.points[m, k] = [minus[r & c][0] for c in range(2) for r in range(2)]
            return
        g, t = self.lane // 4, self.lane % 4
        made = e.Registers((w.tiles, w.tiles, 4), "uint32")
        for m in range(w.tiles):
            for half in range(2):
                first = 16 * m + 8 * half
                for word in range(-(-w.tiles // 2)):
                    mask = e.let(self._row_masks(signs, first, 32 * word, g) >> T.cast(2 * t, "uint32"))
                    for k in range(2 * word, min(2 * word + 2, w.tiles)):
                        for column in range(2):
                            made[m, k, 2 * column + half] = self._point_signs(
                                mask, first, 16 * k + 8 * column, k % 2, column, g, t
                            )
        for m in range(w.tiles):
            for k in range(w.tiles):
                self.points[m, k] = [made[m, k, i] for i in range(4)]

    def _row_masks(self, signs: np.ndarray, first: int, start: int, g: Any) -> Any:
        """Which of 32 entries from ``start`` on are negative in row ``first + g``."""
        masks = [
            sum(1 << i for i, s in enumerate(signs[first + r][start : start + 32]) if s < 0)
            if first + r < len(signs)
            else 0
            for r in range(8)
        ]

        bit = 1
        words = [e.u32(mask) for mask in masks]
        while len(words) > 1:
            odd = g // bit % 2 == 1
            words = [e.let(T.Select(odd, b, a)) for a, b in zip(words[::2], words[1::2])]
            bit *= 2
        return words[0]

    def _point_signs(self, mask: Any, first: int, start: int, k: int, column: int, g: Any, t: Any) -> Any:
        """Entries ``start + 2 t``, one more, of row ``first + g``; zeros outside the matrix."""
        radix, bit = self.rotation.radix, 16 * k + 8 * column
        if first >= radix or start >= radix:
            return e.u32(0)
        low = (mask >> e.u32(bit)) << e.u32(15) & e.u32(0x8000)
        high = (mask >> e.u32(bit + 1)) << e.u32(31)
        word = low | high | e.u32(ONE << 16 | ONE)
        inside = [g < radix - first] if first + 8 > radix else []
        inside += [2 * t < radix - start] if start + 8 > radix else []
        for condition in inside:
            word = T.Select(condition, word, e.u32(0))
        return word

    def _put(self, vector: Any, words: list[Any]) -> None:
        """A vector, as it is transformed, to where its columns are multiplied."""
        w = self.rotation
        start = e.let(self.row_at + w.vector_place(vector))
        if w.config.blocks > 1:
            there = e.let(self._remote(w.piece_of(vector, self.lane) // w.piece_share))
            for j, word in enumerate(words):
                place = T.cast((start + self.lane + 32 * j) * 4, "uint32")
                e.store_remote(there + place, word, there + e.u32(8 * ARRIVED))
        elif self.stmatrix:
            address = self.arena.ptr_to([start + 4 * self.lane])
            e.ptx("stmatrix.sync.aligned.m8n8.x4.shared.b16", address, *words)
        else:
            for j, word in enumerate(words):
                B.buffer_store(self.arena, word, [start + self.lane + 32 * j])

    def _incoming(self) -> Any:
        """Bytes other blocks, and this one, send for the third product."""
        w = self.rotation
        if w.radix == 1 or w.config.blocks == 1:
            return e.u32(0)
        mine = T.max(T.min(w.pieces - self.rank * w.piece_share, w.piece_share), 0)
        return T.cast(mine * (w.radix * COLUMNS * 2), "uint32")

    def _pieces(self, use: Callable[[int, Any, Any, Any], None]) -> None:
        """Call ``use(turn, block, part, quad)`` for every product with 32 columns of this warp."""
        w = self.rotation
        warps, share = w.config.warps, w.piece_share
        for turn in range(w.piece_rounds):
            within = turn * warps + self.warp
            number = e.let(self.rank * share + within if w.config.blocks > 1 else within)
            conditions = [] if (turn + 1) * warps <= share else [within < share]
            conditions += [] if w.config.blocks * share <= w.pieces or w.config.blocks == 1 else [number < w.pieces]
            block, part, quad = (e.let(x) for x in w.piece(number))
            if not conditions:
                use(turn, block, part, quad)
                continue
            with T.If(e.all_of(conditions)), T.Then():
                use(turn, block, part, quad)

    def _product(self, value: e.Registers, first: int, block: Any, part: Any, quad: Any) -> None:
        """32 columns of all points; point ``8 h + g``, columns ``8 t ..`` to ``value[first + h, 0..7]``."""
        w = self.rotation
        k = 0
        rows: list[tuple[int, bool, Any]] = []  # first tile, whether it is two, place of this lane's point
        while k < w.tiles:
            two = k + 1 < w.tiles
            point = 16 * k + (self.lane if two else self.lane % 16)
            if 16 * k + (32 if two else 16) > w.radix:
                point = T.min(point, w.radix - 1)  # any number: its signs are zeros
            place = self.row_at + w.point_place(block, point, part, quad)
            rows.append((k, two, e.let(place if two else place + self.lane // 16 * 32)))
            k += 2 if two else 1
        operand = e.Registers((w.tiles, 4, 2), "uint32")
        for k, two, place in rows:
            for j in range(0, 4, 1 if two else 2):
                registers = [operand[k + i, j, c] if two else operand[k, j + i, c] for i in range(2) for c in range(2)]
                e.ptx("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", *registers, self.arena.ptr_to([place + 32 * j]))
        for m in range(w.tiles):
            for j in range(4):
                sums = [value[first + 2 * m + c // 2, 2 * j + c % 2] for c in range(4)]
                for k in range(w.tiles):
                    pair = [operand[k, j, c] for c in range(2)]
                    self._multiply(sums, self.points[m, k], pair, sums if k else None)
