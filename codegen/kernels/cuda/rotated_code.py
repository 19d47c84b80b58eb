"""Rows that tensor cores rotate, in the order of `scaled_code`: the steps of `rotation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.cluster_code import ARRIVED
from qcompile.codegen.kernels.cuda.rotation_code import WarpRotate
from qcompile.codegen.kernels.cuda.scaled_code import ScaledRows, Store


class RotatedRows(WarpRotate, ScaledRows):
    """Rotation of rows by warps and blocks."""

    def _begin(self) -> None:
        rotation = self.k.rotation
        assert rotation is not None
        self.rotation = rotation
        self._prepare_signs()
        if rotation.gather > 1:
            self.parts = e.Registers((self.k.chunks, rotation.gather, 4), "uint32")

    def _end_row(self) -> None:
        if self.rotation.radix > 1 and self.rotation.config.twice:
            T.evaluate(T.cuda.cta_sync())

    def _load_words(self, row: Any) -> None:
        w = self.rotation
        if w.gather == 1:
            super()._load_words(row)
            return

        def load(c: int, at: Any) -> None:
            for part in range(w.gather):
                for i, word in enumerate(self._read_words(self.x, [row, w.gathered(at, part)], 4)):
                    self.parts[c, part, i] = word

        self._each(load)

    def _scale_words(self, scale: Any) -> None:
        """And, if the row is gathered, add it up."""
        k, w = self.k, self.rotation
        if w.gather == 1:
            super()._scale_words(scale)
            return
        with T.If(scale != T.float32(1)), T.Then():
            factor = e.pair(scale, scale, "float16")
            for c in range(k.chunks):
                for part in range(w.gather):
                    for i in range(4):
                        e.ptx("mul.rn.f16x2", self.parts[c, part, i], self.parts[c, part, i], factor)
        for level in range(w.gather.bit_length() - 1):
            minus = T.Select(self.rank >> level & 1 == 1, e.u32(0xBC00BC00), e.u32(0x3C003C00))
            sign = e.let(minus)
            for c in range(k.chunks):
                for part in range(0, w.gather, 2 << level):
                    for i in range(4):
                        low, high = self.parts[c, part, i], self.parts[c, part + (1 << level), i]
                        e.ptx("fma.rn.f16x2", low, high, sign, low)
        for c in range(k.chunks):
            for i in range(4):
                self.words[c, i] = self.parts[c, 0, i]

    def _take(self, scale: Any) -> None:
        """All but the third product."""
        k, w = self.k, self.rotation
        words = self.words

        def rotate(turn: int, task: Any) -> None:
            start = turn * w.held
            for c in range(start, start + w.held):
                self._half_words(c, scale)
            self._butterflies(words, start)
            for c in range(w.held):
                result = self._transform([words[start + c, i] for i in range(4)])
                if w.radix > 1:
                    self._put(task * w.held + c, [result[i] for i in range(4)])
                else:
                    for i in range(8):
                        self.value[start + c, i] = result[i]

        for turn in range(w.rounds):
            _, conditions = k.place(turn * w.held, self.tx, self.rank)
            rank = self.rank if w.config.blocks > 1 else 0
            task = e.let(rank * w.share + turn * w.config.warps + self.warp)
            if not conditions:
                rotate(turn, task)
            else:
                with T.If(e.all_of(conditions)), T.Then():
                    rotate(turn, task)
        if w.radix > 1:
            if w.config.blocks > 1:
                T.evaluate(T.cuda.mbarrier_wait(self._barrier(ARRIVED), self.parity))
            else:
                T.evaluate(T.cuda.cta_sync())
            turns = 1 if w.config.twice else w.piece_rounds
            self.products = e.Registers((turns * 2 * w.tiles, 8), "float32")

    def _multiply_points(self, turn: int, block: Any, part: Any, quad: Any) -> int:
        """The third product of a piece; the first index of its results."""
        w = self.rotation
        first = 0 if w.config.twice else turn * 2 * w.tiles
        self._product(self.products, first, block, part, quad)
        return first

    def _transformed(self, grow: Callable[[e.Registers, int], None]) -> None:
        w = self.rotation

        def piece(turn: int, block: Any, part: Any, quad: Any) -> None:
            first = self._multiply_points(turn, block, part, quad)
            for h in range(-(-w.radix // 8)):
                grow(self.products, first + h)

        if w.radix > 1:
            self._pieces(piece)
        else:
            self._each(lambda c, at: grow(self.value, c))

    def _results(self, store: Store) -> None:
        w = self.rotation

        def piece(turn: int, block: Any, part: Any, quad: Any) -> None:
            first = self._multiply_points(turn, block, part, quad) if w.config.twice else turn * 2 * w.tiles
            start = e.let(w.column(block, self.lane // 4, part, quad) + self.lane % 4 * 8)
            for h in range(-(-w.radix // 8)):
                inside = [] if 8 * h + 8 <= w.radix else [self.lane // 4 < w.radix - 8 * h]
                store(self.products, first + h, inside, w.gathered(start + 8 * h * w.stride, self.rank))

        if w.radix > 1:
            self._pieces(piece)
        else:
            self._each(lambda c, at: store(self.value, c, [], w.gathered(at, self.rank)))

    def _unit(self) -> Any:
        w = self.rotation
        exponent = self.exponent + (self.point_exponent if w.radix > 1 else 0)
        return T.float32(2.0**exponent / np.sqrt(w.order * w.gather))
