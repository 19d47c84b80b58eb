"""The code of `kronecker.KroneckerRows`, in the order of `scaled_code`: X and Z^T in shared memory, two products a tile."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.kronecker import STEP, TILE, KroneckerRows
from qcompile.codegen.kernels.cuda.rotation_code import MMA
from qcompile.codegen.kernels.cuda.scaled_code import ScaledRows, Store


class KroneckerCode(ScaledRows):
    """Products of rows with two matrices; `rowwise_code` sets the names it uses."""

    left: Any
    right: Any
    gain: Any
    lane: Any
    warp: Any

    def _begin(self) -> None:
        mixed = self.k.mixed
        assert mixed is not None
        self.mixed: KroneckerRows = mixed
        self._clear()
        if mixed.config.kept:
            self._keep()

    def _meet(self) -> None:
        if self.mixed.config.kept:
            e.wait(0)
        T.evaluate(T.cuda.cta_sync())

    def _keep(self) -> None:
        """Copy the matrices, in the background."""
        w = self.mixed
        start = self.row_at + w.row_space
        for side, matrix in enumerate((self.left, self.right)):
            size = w.kept_words(side) // 4
            first = self.rank * size * 4 if side == 1 and self.blocks > 1 else 0
            with T.serial(-(-size // w.threads)) as i:
                at = e.let(i * w.threads + self.tx)
                with T.If(at < size), T.Then():
                    e.copy_async(self.arena.ptr_to([start + 4 * at]), matrix.ptr_to([first + 4 * at]), 16)
            start += 4 * size
        e.commit()

    def _clear(self) -> None:
        """Zeros where X and Z^T lie: elements that no row has stay so, unless one takes the place of the other."""
        w = self.mixed
        with T.serial(-(-w.row_space // w.threads)) as i:
            at = e.let(i * w.threads + self.tx)
            with T.If(at < w.row_space), T.Then():
                B.buffer_store(self.arena, e.u32(0), [self.row_at + at])

    def _begin_row(self) -> None:
        if self.mixed.config.overlaid:
            self._clear()
            T.evaluate(T.cuda.cta_sync())

    def _take(self, scale: Any) -> None:
        """X to shared memory."""
        w, k = self.mixed, self.k
        n1, n2 = w.sizes

        def put(c: int, at: Any) -> None:
            row, column = e.let(at // n2), e.let(at % n2)
            if w.blocks > 1:
                row = e.let(row // n1 * (w.tiles[0] * TILE) + row % n1)
            words = self._half_words(c, scale)
            place = e.let(row * w.row_pitch + column)
            if k.vector == 1:
                start = T.cuda.cvta_generic_to_shared(self.arena.ptr_to([self.row_at]))
                e.ptx("st.shared.b16", start + T.cast(place * 2, "uint32"), T.cast(words[0], "uint16"))
            else:
                size = f".v{len(words)}" if len(words) > 1 else ""
                e.ptx(f"st.shared{size}.b32", self.arena.ptr_to([self.row_at + place // 2]), *words)

        self._each(put)
        T.evaluate(T.cuda.cta_sync())

    # Tiles

    def _units(self, use: Callable[[int, Any, Any, Any], None], side: int) -> None:
        """Call ``use(turn, block, first, second)`` for every unit of this warp; ``first`` is its first tile along the side of the matrix,
        ``second`` that along the other, counted from the first one of this block."""
        w = self.mixed
        step, other = w.unit[side], w.unit[1 - side]
        inner, each = w.mine[1 - side] // other, prod(w.mine) // prod(w.unit)
        for turn in range(w.rounds):
            number = e.let(turn * w.config.warps + self.warp)
            block, within = (number // each, number % each) if w.blocks > 1 else (T.int32(0), number)
            block, first, second = e.let(block), e.let(within // inner * step), e.let(within % inner * other)
            if (turn + 1) * w.config.warps <= w.blocks * each:
                use(turn, block, first, second)
                continue
            with T.If(number < w.blocks * each), T.Then():
                use(turn, block, first, second)

    def _product(self, sums: e.Registers, start: int, side: int, tile: Any, place: Any, pitch: int) -> None:
        """A unit: tiles of 32 rows of a matrix, turned, by tiles of 32 columns whose first word is at ``place``. Row ``16 m + 8 h + g`` of
        tile i, columns ``8 j + 2 t`` and one more of tile c of n go to ``sums[start + 4 (i n + c) + 2 m + h, 2 j ..]``."""
        w = self.mixed
        steps, (high, wide) = w.steps[side], (w.unit[side], w.unit[1 - side])
        # ldmatrix: 8 columns, their next 8 positions, the next 8 columns
        columns = self.lane % 8 + self.lane // 16 * 8
        line = e.let(place + columns * (pitch // 2) + self.lane // 8 % 2 * 4)
        words = e.let(tile * (steps * 2 * 32 * 4) + self.lane * 4)
        a, b = e.Registers((2, 2 * high, 4), "uint32"), e.Registers((2, 4 * wide, 2), "uint32")

        def load(s: int) -> None:
            for m in range(2 * high):
                at = words + ((m // 2 * steps + s) * 2 + m % 2) * 32 * 4
                self._read_matrix([a[s % 2, m, i] for i in range(4)], side, at)
            for j in range(0, 4 * wide, 2):
                address = self.arena.ptr_to([line + 8 * j * (pitch // 2) + s * (STEP // 2)])
                registers = [b[s % 2, j + i, c] for i in range(2) for c in range(2)]
                e.ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, address)

        load(0)
        for s in range(steps):
            if s + 1 < steps:
                load(s + 1)
            for m in range(2 * high):
                for j in range(4 * wide):
                    first = start + 4 * (m // 2 * wide + j // 4) + m % 2 * 2
                    out = [sums[first + c // 2, 2 * (j % 4) + c % 2] for c in range(4)]
                    operands = [*(a[s % 2, m, i] for i in range(4)), *(b[s % 2, j, c] for c in range(2))]
                    e.ptx(MMA, *out, *operands, *(out if s else [T.float32(0)] * 4))

    def _read_matrix(self, registers: list[Any], side: int, at: Any) -> None:
        """Four words of a packed matrix."""
        w = self.mixed
        if w.config.kept:
            start = self.row_at + w.row_space + (w.kept_words(0) if side else 0)
            e.read_shared(registers, self.arena.ptr_to([start + at]))
        else:
            first = self.rank * w.kept_words(1) if side == 1 and self.blocks > 1 else 0
            e.ptx("ld.global.nc.v4.b32", *registers, (self.left, self.right)[side].ptr_to([first + at]))

    def _turn(self) -> None:
        """Z^T, a unit of columns of Z by rows at a time."""
        w = self.mixed
        size = 4 * prod(w.unit)
        sums = e.Registers((size, 8), "float32")
        rounded = e.Registers((size * (w.rounds if w.config.overlaid else 1), 4), "uint32")

        def multiply(turn: int, block: Any, column: Any, row: Any) -> None:
            held = turn * size if w.config.overlaid else 0
            place = e.let(self.row_at + (block * w.tiles[0] + row) * (TILE * w.row_pitch // 2))
            self._product(sums, 0, 1, column, place, w.row_pitch)
            for h in range(size):
                for j in range(4):
                    rounded[held + h, j] = e.pair(sums[h, 2 * j], sums[h, 2 * j + 1], "float16")
            if not w.config.overlaid:
                store(turn, block, column, row)

        def store(turn: int, block: Any, column: Any, row: Any) -> None:
            held = turn * size if w.config.overlaid else 0
            pitch = w.turned_pitch // 2
            line = (block * w.mine[1] + column) * TILE + self.lane // 4
            place = e.let(self.row_at + w.turned_at + line * pitch + row * (TILE // 2) + self.lane % 4)
            for h in range(size):
                tile, c = divmod(h // 4, w.unit[0])
                for j in range(4):
                    at = place + (TILE * tile + 8 * (h % 4)) * pitch + TILE // 2 * c + 4 * j
                    B.buffer_store(self.arena, rounded[held + h, j], [at])

        self._units(multiply, 1)
        if w.config.overlaid:
            T.evaluate(T.cuda.cta_sync())
            self._units(store, 1)
        T.evaluate(T.cuda.cta_sync())

    def _transformed(self, grow: Callable[[e.Registers, int], None]) -> None:
        w = self.mixed
        size = 4 * prod(w.unit)
        self._turn()
        self.products = e.Registers((size * w.rounds, 8), "float32")

        def multiply(turn: int, block: Any, row: Any, column: Any) -> None:
            line = (block * w.mine[1] + column) * TILE
            place = e.let(self.row_at + w.turned_at + line * (w.turned_pitch // 2))
            self._product(self.products, size * turn, 0, row, place, w.turned_pitch)
            for h in range(size):
                grow(self.products, size * turn + h)

        self._units(multiply, 0)

    def _results(self, store: Store) -> None:
        w = self.mixed
        (n1, n2), size = w.sizes, 4 * prod(w.unit)

        def unit(turn: int, block: Any, row: Any, column: Any) -> None:
            line = e.let(row * TILE + self.lane // 4)
            column = column + self.rank * w.mine[1] if self.blocks > 1 else column
            first = e.let(column * TILE + self.lane % 4 * 8)
            start = e.let((block * n1 + line) * n2 + first)
            for h in range(size):
                tile, c = divmod(h // 4, w.unit[1])
                down, along = TILE * tile + 8 * (h % 4), TILE * c
                if w.tiles[0] == 1 and down >= n1:
                    continue
                self.column = first + along
                conditions = [line < n1 - down] if n1 % TILE else []
                conditions += [self.column < n2] if n2 % TILE else []
                store(self.products, size * turn + h, conditions, start + down * n2 + along)

        self._units(unit, 0)

    def _store_codes(self, codes: list[Any], conditions: list[Any], at: Any) -> None:
        """Eight neighbours of one row of Y, or as many as it has."""
        n2, size = self.mixed.sizes[1], self.mixed.vector
        if size == 8:
            super()._store_codes(codes, conditions, at)
            return
        with T.If(e.all_of(conditions)), T.Then():
            for start in range(0, 8, size):
                with T.If(self.column + start < n2), T.Then():
                    if size == 4:
                        e.store_bytes(self.codes.ptr_to([self.row, at + start]), codes[start : start + 4])
                        continue
                    for i in range(start, start + size):
                        B.buffer_store(self.codes, T.cast(T.cast(codes[i], "int32"), "int8"), [self.row, at + i])

    def _unit(self) -> Any:
        return self.gain[0]
