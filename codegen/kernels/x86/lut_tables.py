"""Tables of subset sums from activation codes: the first step of `LutGemm`.

The entry ``i`` of the table of four activations, biased by the sum of the negative ones, is

    T[i] = sum_j |a_j| [bit j of i is set xor a_j < 0]

so a pair of tables is four byte shuffles of ``|a|``, four of its signs, masks, and three additions that saturate. An entry
of 255 tells that a table may not fit; such rows are gone through again, one pair after the other (`split` in `cpu.lut`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Register
from qcompile.codegen.kernels.cpu.lut import LARGEST, PAIR, PlanePanels

BYTES = 32
"""Bytes of a pair of tables, and of the registers that build one."""

PARTS = 3
"""Tables that four activations of -128 .. 127 need at most."""


@dataclass
class TableBuffers:
    """What a block of rows is turned into.

    Attributes:
        tables: ``(rows, pairs, 32)`` uint8.
        negative, total: ``(rows, groups)`` int32, sums of the negative activations and of all.
        begin: ``(rows, chunks + 1)`` int32, where the extra entries of a chunk of pairs begin.
        extra: ``(rows, entries, 32)`` uint8, their tables.
        pair: ``(rows, entries)`` int32, the pairs they belong to.
        pairs_per_chunk, chunks: a chunk is what is added up in 16 bits; chunks of a group follow each other.
    """

    panels: PlanePanels
    pairs_per_chunk: int
    rows: int

    def __post_init__(self) -> None:
        p = self.panels
        self.chunks_per_group = -(-p.pairs_per_group // self.pairs_per_chunk)
        self.chunks = p.groups * self.chunks_per_group
        self.tables = B.alloc_buffer((self.rows, p.pairs, BYTES), "uint8")
        self.negative = B.alloc_buffer((self.rows, p.groups), "int32")
        self.total = B.alloc_buffer((self.rows, p.groups), "int32")
        self.begin = B.alloc_buffer((self.rows, self.chunks + 1), "int32")
        self.extra = B.alloc_buffer((self.rows, (PARTS - 1) * p.pairs, BYTES), "uint8")
        self.pair = B.alloc_buffer((self.rows, (PARTS - 1) * p.pairs), "int32")

    def build(self, x: Any, at: Any, row: Any, ask: Callable[[Any], None] | None = None) -> None:
        """Emit the tables of row ``at`` of the codes ``x`` (uint8, signed code + 128) into row ``row`` of the buffers.

        ``ask(pair)`` emits what stands beside those of each pair.
        """
        p = self.panels
        load = self._source(x, at)
        worst = Register("uint8", BYTES)
        worst.set(v.const(0, BYTES, "uint8"))
        absolute, shifted = Register("int64", 4), Register("int64", 4)
        with T.serial(p.groups) as group:
            absolute.set(v.const(0, 4, "int64"))
            shifted.set(v.const(0, 4, "int64"))
            with T.serial(p.pairs_per_group) as i:
                pair = v.let(group * p.pairs_per_group + i)
                if ask is not None:
                    ask(pair)
                eight = load(pair)
                magnitude = _magnitude(eight)
                table = _table(eight, magnitude)
                v.store(self.tables, [row, pair, 0], table, BYTES)
                worst.set(T.max(worst.get(), table))
                absolute.set(absolute.get() + _byte_sums(magnitude))
                shifted.set(shifted.get() + _byte_sums(v.bits_of(eight, "uint8", BYTES) + v.const(128, BYTES, "uint8")))
            total = v.let(_first(shifted.get()) - 128 * PAIR * p.pairs_per_group)
            B.buffer_store(self.total, total, [row, group])
            B.buffer_store(self.negative, T.shift_right(total - _first(absolute.get()), 1), [row, group])
        with T.serial(self.chunks + 1) as chunk:
            B.buffer_store(self.begin, T.int32(0), [row, chunk])
        full = v.reduce_lanes(worst.get(), BYTES, T.max)
        with T.If(full == T.uint8(LARGEST)), T.Then():
            self._split(load, row)

    def _source(self, x: Any, at: Any) -> Any:
        """A function from a pair to its eight signed activations, repeated four times; 0 where a group is padded."""
        p = self.panels
        flip = v.const(-128, PAIR, "int8")
        if not p.padded:

            def direct(pair: Any) -> Any:
                return _repeat(v.bits_of(v.load(x, [at, pair * PAIR], PAIR), "int8", PAIR) + flip)

            return direct
        length = p.pairs_per_group * PAIR
        copy = B.alloc_buffer((p.groups * length,), "int8")
        v.sweep(p.groups * length, BYTES, lambda s, n, _: v.store(copy, [s], v.const(0, n, "int8"), n))

        def group(index: Any, width: int) -> None:
            def move(s: Any, n: int, _: int) -> None:
                value = v.bits_of(v.load(x, [at, index * p.group + s], n), "int8", n) + v.const(-128, n, "int8")
                v.store(copy, [index * length + s], value, n)

            v.sweep(width, BYTES, move)

        last = p.k - (p.groups - 1) * p.group
        with T.serial(p.groups - 1) as index:
            group(index, p.group)
        group(p.groups - 1, last)
        return lambda pair: _repeat(v.load(copy, [pair * PAIR], PAIR))

    def _split(self, load: Any, row: Any) -> None:
        """Emit the second pass over a row whose tables do not all fit."""
        p = self.panels
        count = B.alloc_buffer((1,), "int32", annotations=ON_STACK)
        rest = B.alloc_buffer((PAIR,), "int8", annotations=ON_STACK)
        part = B.alloc_buffer((PAIR,), "int8", annotations=ON_STACK)
        room = B.alloc_buffer((1,), "int32", annotations=ON_STACK)
        B.buffer_store(count, T.int32(0), [0])
        with T.serial(self.chunks) as chunk:
            group = v.let(T.truncdiv(chunk, self.chunks_per_group))
            first = v.let((chunk - group * self.chunks_per_group) * self.pairs_per_chunk)
            with T.serial(T.min(p.pairs_per_group - first, self.pairs_per_chunk)) as i:
                pair = v.let(group * p.pairs_per_group + first + i)
                eight = load(pair)
                sums = [self._sum_of_four(eight, half) for half in (0, 1)]
                with T.If(T.max(sums[0], sums[1]) > LARGEST), T.Then():
                    v.store(rest, [0], v.shuffle(eight, range(PAIR)), PAIR)
                    for turn in range(PARTS):
                        left = v.let(T.cast(_any(v.load(rest, [0], PAIR)), "int32"))
                        with T.If(left != 0), T.Then():
                            self._take(rest, part, room)
                            eight_here = _repeat(v.load(part, [0], PAIR))
                            table = _table(eight_here, _magnitude(eight_here))
                            if turn == 0:
                                v.store(self.tables, [row, pair, 0], table, BYTES)
                            else:
                                at = v.let(count[0])
                                v.store(self.extra, [row, at, 0], table, BYTES)
                                B.buffer_store(self.pair, pair, [row, at])
                                B.buffer_store(count, at + 1, [0])
            B.buffer_store(self.begin, count[0], [row, chunk + 1])

    @staticmethod
    def _sum_of_four(eight: Any, half: int) -> Any:
        wide = [v.cast(v.shuffle(eight, [4 * half + j]), "int32", 1) for j in range(4)]
        total = T.int32(0)
        for value in wide:
            total = total + T.max(value, -value)
        return v.let(total)

    @staticmethod
    def _take(rest: Any, part: Any, room: Any) -> None:
        """Move from ``rest`` to ``part`` what fits, magnitudes first come first served."""
        with T.serial(2) as half:
            B.buffer_store(room, T.int32(LARGEST), [0])
            with T.serial(4) as j:
                at = half * 4 + j
                value = v.let(T.cast(rest[at], "int32"))
                size = v.let(T.min(T.max(value, -value), room[0]))
                taken = v.let(T.Select(value < 0, -size, size))
                B.buffer_store(part, T.cast(taken, "int8"), [at])
                B.buffer_store(rest, T.cast(value - taken, "int8"), [at])
                B.buffer_store(room, room[0] - size, [0])


def _repeat(eight: Any) -> Any:
    """Eight bytes four times."""
    return v.let(v.bits_of(v.splat(v.bits_of(eight, "int64", 1), 4), "int8", BYTES))


def _magnitude(value: Any) -> Any:
    return v.let(v.bits_of(T.max(value, v.const(0, BYTES, "int8") - value), "uint8", BYTES))


def _table(eight: Any, magnitude: Any) -> Any:
    """The two tables of eight activations (repeated four times) and their magnitudes."""
    sign = v.let(T.shift_right(eight, v.const(7, BYTES, "int8")))
    terms = []
    for j in range(4):
        pattern = [j] * 16 + [16 + 4 + j] * 16
        member = T.Shuffle([T.int8(-(i >> j & 1)) for i in range(16)] * 2, list(range(32)))
        wanted = T.bitwise_xor(v.shuffle(sign, pattern), member)
        terms.append(v.let(T.bitwise_and(v.shuffle(magnitude, pattern), v.bits_of(wanted, "uint8", BYTES))))
    return v.let(_saturated(_saturated(terms[0], terms[1]), _saturated(terms[2], terms[3])))


def _saturated(a: Any, b: Any) -> Any:
    return T.call_llvm_pure_intrin(f"uint8x{BYTES}", "llvm.uadd.sat", a, b)


def _byte_sums(value: Any) -> Any:
    """Sums of eight neighbouring unsigned bytes, int64x4."""
    zero = v.const(0, BYTES, "int8")
    return T.call_llvm_pure_intrin("int64x4", "llvm.x86.avx2.psad.bw", v.bits_of(value, "int8", BYTES), zero)


def _first(sums: Any) -> Any:
    return v.cast(v.shuffle(sums, [0]), "int32", 1)


def _any(eight: Any) -> Any:
    return v.bits_of(eight, "int64", 1) != T.int64(0)
