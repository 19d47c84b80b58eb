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
            size = w.matrix_words(side) // 4
            with T.serial(-(-size // w.threads)) as i:
                at = e.let(i * w.threads + self.tx)
                with T.If(at < size), T.Then():
                    e.copy_async(self.arena.ptr_to([start + 4 * at]), matrix.ptr_to([4 * at]), 16)
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

    def _tiles(self, use: Callable[[int, Any, Any, Any], None], inner: int) -> None:
        """Call ``use(turn, block, first, second)`` for every tile of this warp, ``second`` counting to ``inner``."""
        w = self.mixed
        for turn in range(w.rounds):
            number = e.let(turn * w.config.warps + self.warp)
            each = prod(w.tiles)
            block, within = (number // each, number % each) if w.blocks > 1 else (T.int32(0), number)
            block, first, second = e.let(block), e.let(within // inner), e.let(within % inner)
            if (turn + 1) * w.config.warps <= w.count:
                use(turn, block, first, second)
                continue
            with T.If(number < w.count), T.Then():
                use(turn, block, first, second)

    def _product(self, sums: e.Registers, first: int, side: int, tile: Any, place: Any, pitch: int) -> None:
        """Tile of 32 rows of a matrix, turned, by 32 columns whose first word is at ``place``: row ``16 m + 8 h + g`` of it, columns
        ``8 j + 2 t`` and one more, to ``sums[first + 2 m + h, 2 j ..]``."""
        steps = self.mixed.steps[side]
        matrix, kept = (self.left, self.right)[side], self.mixed.config.kept
        kept_at = self.row_at + self.mixed.row_space + (self.mixed.matrix_words(0) if side else 0)
        # ldmatrix: 8 columns, their next 8 positions, the next 8 columns
        columns = self.lane % 8 + self.lane // 16 * 8
        start = e.let(place + columns * (pitch // 2) + self.lane // 8 % 2 * 4)
        words = e.let(tile * (steps * 2 * 32 * 4) + self.lane * 4)
        a, b = e.Registers((2, 2, 4), "uint32"), e.Registers((2, 4, 2), "uint32")

        def load(s: int) -> None:
            for m in range(2):
                registers = [a[s % 2, m, i] for i in range(4)]
                at = words + (2 * s + m) * 32 * 4
                if kept:
                    e.read_shared(registers, self.arena.ptr_to([kept_at + at]))
                else:
                    e.ptx("ld.global.nc.v4.b32", *registers, matrix.ptr_to([at]))
            for j in range(0, 4, 2):
                address = self.arena.ptr_to([start + 8 * j * (pitch // 2) + s * (STEP // 2)])
                registers = [b[s % 2, j + i, c] for i in range(2) for c in range(2)]
                e.ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, address)

        load(0)
        for s in range(steps):
            if s + 1 < steps:
                load(s + 1)
            for m in range(2):
                for j in range(4):
                    out = [sums[first + 2 * m + c // 2, 2 * j + c % 2] for c in range(4)]
                    before = out if s else [T.float32(0)] * 4
                    operands = [a[s % 2, m, i] for i in range(4)], [b[s % 2, j, c] for c in range(2)]
                    e.ptx(MMA, *out, *operands[0], *operands[1], *before)

    def _turn(self) -> None:
        """Z^T, a tile of 32 columns of Z by 32 rows at a time."""
        w = self.mixed
        sums = e.Registers((4, 8), "float32")
        rounded = e.Registers((w.rounds if w.config.overlaid else 1, 4, 4), "uint32")

        def multiply(turn: int, block: Any, column: Any, row: Any) -> None:
            held = turn if w.config.overlaid else 0
            place = e.let(self.row_at + (block * w.tiles[0] + row) * (TILE * w.row_pitch // 2))
            self._product(sums, 0, 1, column, place, w.row_pitch)
            for h in range(4):
                for j in range(4):
                    rounded[held, h, j] = e.pair(sums[h, 2 * j], sums[h, 2 * j + 1], "float16")
            if not w.config.overlaid:
                store(turn, block, column, row)

        def store(turn: int, block: Any, column: Any, row: Any) -> None:
            held = turn if w.config.overlaid else 0
            line = (block * w.tiles[1] + column) * TILE + self.lane // 4
            place = e.let(self.row_at + w.turned_at + line * (w.turned_pitch // 2) + row * (TILE // 2) + self.lane % 4)
            for h in range(4):
                for j in range(4):
                    at = place + 8 * h * (w.turned_pitch // 2) + 4 * j
                    B.buffer_store(self.arena, rounded[held, h, j], [at])

        self._tiles(multiply, w.tiles[0])
        if w.config.overlaid:
            T.evaluate(T.cuda.cta_sync())
            self._tiles(store, w.tiles[0])
        T.evaluate(T.cuda.cta_sync())

    def _transformed(self, grow: Callable[[e.Registers, int], None]) -> None:
        w = self.mixed
        self._turn()
        self.products = e.Registers((4 * w.rounds, 8), "float32")

        def multiply(turn: int, block: Any, row: Any, column: Any) -> None:
            line = (block * w.tiles[1] + column) * TILE
            place = e.let(self.row_at + w.turned_at + line * (w.turned_pitch // 2))
            self._product(self.products, 4 * turn, 0, row, place, w.turned_pitch)
            for h in range(4):
                grow(self.products, 4 * turn + h)

        self._tiles(multiply, w.tiles[1])

    def _results(self, store: Store) -> None:
        w = self.mixed
        n1, n2 = w.sizes

        def tile(turn: int, block: Any, row: Any, column: Any) -> None:
            line = e.let(row * TILE + self.lane // 4)
            self.column = e.let(column * TILE + self.lane % 4 * 8)
            start = e.let((block * n1 + line) * n2 + self.column)
            for h in range(4):
                if w.tiles[0] == 1 and 8 * h >= n1:
                    continue
                conditions = [line < n1 - 8 * h] if n1 % TILE else []
                conditions += [self.column < n2] if n2 % TILE else []
                store(self.products, 4 * turn + h, conditions, start + 8 * h * n2)

        self._tiles(tile, w.tiles[1])

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
                        self._store_bytes(self.codes, self.row, at + start, codes[start : start + 4])
                        continue
                    for i in range(start, start + size):
                        B.buffer_store(self.codes, T.cast(T.cast(codes[i], "int32"), "int8"), [self.row, at + i])

    def _unit(self) -> Any:
        return self.gain[0]
