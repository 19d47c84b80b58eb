"""Tables of subset sums from activation codes, on NEON: the first step of `TableLookupGemm`.

With ``p = max(a, 0)`` and ``n = max(-a, 0)``, the entry ``i`` of the table of four activations, biased by the sum of the
negative ones, is

    T[i] = sum_j (p_j if bit j of i is set else n_j)

which for all 16 entries is four look-ups in the 32 bytes ``(p, n)`` of 16 activations, and three additions that saturate.
An entry of 255 tells that a table may not fit; such rows are gone through again, one step after the other (`split` in
`cpu.lut` is the reference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.arm.products import BYTES, LANES
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Register
from qcompile.codegen.kernels.cpu.lut import LARGEST, PlanePanels

STEP = 16
"""Activations of a step: four tables."""

TABLES = 4
"""Tables of a step."""

STEP_BYTES = TABLES * BYTES
"""Bytes of the tables of a step."""

PARTS = 3
"""Tables that four activations of -128 .. 127 need at most."""


@dataclass
class TableBuffers:
    """What a block of rows is turned into.

    Attributes:
        panels: geometry of the weights.
        steps_per_group, steps_per_chunk: a chunk is what is added up in 16 bits; the chunks of a group follow each other.
        rows: of a block.
        tables: ``(rows, steps, 64)`` uint8.
        base: ``(rows, groups)`` int32, what the sums of a group start from.
        total: ``(rows, groups)`` int32, sums of the activations.
        begin: ``(rows, chunks + 1)`` int32, where the extra entries of a chunk begin.
        extra: ``(rows, entries, 64)`` uint8, their tables.
        step: ``(rows, entries)`` int32, the steps they belong to.
    """

    panels: PlanePanels
    steps_per_group: int
    steps_per_chunk: int
    rows: int

    def __post_init__(self) -> None:
        groups = self.panels.groups
        steps = groups * self.steps_per_group
        self.chunks_per_group = -(-self.steps_per_group // self.steps_per_chunk)
        self.chunks = groups * self.chunks_per_group
        self.tables = B.alloc_buffer((self.rows, steps, STEP_BYTES), "uint8")
        self.base = B.alloc_buffer((self.rows, groups), "int32")
        self.total = B.alloc_buffer((self.rows, groups), "int32")
        self.begin = B.alloc_buffer((self.rows, self.chunks + 1), "int32")
        self.extra = B.alloc_buffer((self.rows, (PARTS - 1) * steps, STEP_BYTES), "uint8")
        self.step = B.alloc_buffer((self.rows, (PARTS - 1) * steps), "int32")

    def build(self, x: Any, at: Any, row: Any) -> None:
        """Emit the tables of row ``at`` of the codes ``x`` (uint8, signed code + 128) into row ``row`` of the buffers."""
        p = self.panels
        load = self._source(x, at)
        worst = Register("uint8", BYTES)
        worst.set(v.const(0, BYTES, "uint8"))
        positive, negative = Register("uint32", LANES), Register("uint32", LANES)
        with T.serial(p.groups) as group:
            for register in (positive, negative):
                register.set(v.const(0, LANES, "uint32"))
            with T.serial(self.steps_per_group) as i:
                step = v.let(group * self.steps_per_group + i)
                codes = load(step)
                zero = v.const(128, BYTES, "uint8")
                signs = [v.let(_saturated("usub", codes, zero)), v.let(_saturated("usub", zero, codes))]
                for place, table in enumerate(_tables(*signs)):
                    v.store(self.tables, [row, step, BYTES * place], table, BYTES)
                    worst.set(T.max(worst.get(), table))
                for register, value in zip((positive, negative), signs):
                    register.set(register.get() + _quads(value))
            below, above = (v.let(_sum(register)) for register in (negative, positive))
            total = v.let(above - below)
            B.buffer_store(self.total, total, [row, group])
            planes = p.planes
            base = ((1 << planes.bits) - 1) * -below - planes.centre * total if planes.uniform else -below
            B.buffer_store(self.base, base, [row, group])
        with T.serial(self.chunks + 1) as chunk:
            B.buffer_store(self.begin, T.int32(0), [row, chunk])
        full = v.reduce_lanes(worst.get(), BYTES, T.max)
        with T.If(full == T.uint8(LARGEST)), T.Then():
            self._split(load, row)

    def _source(self, x: Any, at: Any) -> Any:
        """A function from a step to its 16 codes; 128 where a group is padded."""
        p = self.panels
        length = self.steps_per_group * STEP
        if p.groups * length == p.k:
            return lambda step: v.let(v.load(x, [at, step * STEP], STEP))
        copy = B.alloc_buffer((p.groups * length,), "uint8")
        v.sweep(p.groups * length, BYTES, lambda s, n, _: v.store(copy, [s], v.const(128, n, "uint8"), n))

        def group(index: Any, width: int) -> None:
            def move(s: Any, n: int, _: int) -> None:
                v.store(copy, [index * length + s], v.load(x, [at, index * p.group + s], n), n)

            v.sweep(width, BYTES, move)

        with T.serial(p.groups - 1) as index:
            group(index, p.group)
        group(p.groups - 1, p.k - (p.groups - 1) * p.group)
        return lambda step: v.let(v.load(copy, [step * STEP], STEP))

    def _split(self, load: Any, row: Any) -> None:
        """Emit the second pass over a row whose tables do not all fit."""
        count = B.alloc_buffer((1,), "int32", annotations=ON_STACK)
        room = B.alloc_buffer((1,), "int32", annotations=ON_STACK)
        rest = B.alloc_buffer((2, STEP), "uint8", annotations=ON_STACK)
        part = B.alloc_buffer((2, STEP), "uint8", annotations=ON_STACK)
        B.buffer_store(count, T.int32(0), [0])
        with T.serial(self.chunks) as chunk:
            group = v.let(T.truncdiv(chunk, self.chunks_per_group))
            first = v.let((chunk - group * self.chunks_per_group) * self.steps_per_chunk)
            with T.serial(T.min(self.steps_per_group - first, self.steps_per_chunk)) as i:
                step = v.let(group * self.steps_per_group + first + i)
                codes = load(step)
                zero = v.const(128, BYTES, "uint8")
                signs = [v.let(_saturated("usub", codes, zero)), v.let(_saturated("usub", zero, codes))]
                largest = v.reduce_lanes(v.let(_quads(v.let(signs[0] + signs[1]))), LANES, T.max)
                with T.If(largest > T.uint32(LARGEST)), T.Then():
                    for sign, value in enumerate(signs):
                        v.store(rest, [sign, 0], value, STEP)
                    for turn in range(PARTS):
                        left = v.let(T.bitwise_or(v.load(rest, [0, 0], STEP), v.load(rest, [1, 0], STEP)))
                        with T.If(v.reduce_lanes(left, BYTES, T.max) != T.uint8(0)), T.Then():
                            self._take(rest, part, room)
                            tables = _tables(*(v.let(v.load(part, [sign, 0], STEP)) for sign in (0, 1)))
                            for place, table in enumerate(tables):
                                if turn == 0:
                                    v.store(self.tables, [row, step, BYTES * place], table, BYTES)
                                else:
                                    v.store(self.extra, [row, count[0], BYTES * place], table, BYTES)
                            if turn:
                                B.buffer_store(self.step, step, [row, count[0]])
                                B.buffer_store(count, count[0] + 1, [0])
            B.buffer_store(self.begin, count[0], [row, chunk + 1])

    @staticmethod
    def _take(rest: Any, part: Any, room: Any) -> None:
        """Move from ``rest`` to ``part`` what fits, first come first served."""
        with T.serial(TABLES) as table:
            B.buffer_store(room, T.int32(LARGEST), [0])
            with T.serial(STEP // TABLES) as j:
                at = v.let(table * (STEP // TABLES) + j)
                for sign in (0, 1):
                    have = v.let(T.cast(rest[sign, at], "int32"))
                    size = v.let(T.min(have, room[0]))
                    B.buffer_store(part, T.cast(size, "uint8"), [sign, at])
                    B.buffer_store(rest, T.cast(have - size, "uint8"), [sign, at])
                    B.buffer_store(room, room[0] - size, [0])


def look_up(table: Any, second: Any, index: Any) -> Any:
    """The bytes of two registers at 16 indices up to 31 (TBL)."""
    return T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.tbl2", table, second, index)


def pairs(value: Any) -> Any:
    """Sums of neighbouring unsigned bytes in 16 bits (UADALP when added to a register)."""
    return T.call_llvm_pure_intrin("uint16x8", "llvm.aarch64.neon.uaddlp", value)


def bytes_of(values: list[int]) -> Any:
    """A constant register."""
    return T.Shuffle([T.uint8(value) for value in values], list(range(BYTES)))


def _tables(positive: Any, negative: Any) -> list[Any]:
    """The four tables of 16 activations, given their positive and negative parts as unsigned bytes."""
    found = []
    for table in range(TABLES):
        terms = []
        for j in range(4):
            place = 4 * table + j
            index = bytes_of([place if i >> j & 1 else STEP + place for i in range(BYTES)])
            terms.append(v.let(look_up(positive, negative, index)))
        both = [v.let(_saturated("uadd", *terms[:2])), v.let(_saturated("uadd", *terms[2:]))]
        found.append(v.let(_saturated("uadd", *both)))
    return found


def _saturated(operation: str, a: Any, b: Any) -> Any:
    return T.call_llvm_pure_intrin("uint8x16", f"llvm.{operation}.sat", a, b)


def _quads(value: Any) -> Any:
    """Sums of four neighbouring unsigned bytes, uint32x4."""
    return T.call_llvm_pure_intrin("uint32x4", "llvm.aarch64.neon.uaddlp", pairs(value))


def _sum(register: Register) -> Any:
    lanes = v.let(v.bits_of(register.get(), "int32", LANES))
    return v.reduce_lanes(lanes, LANES, v.add)
