"""The micro-kernel of `LutGemm`: a few rows times one panel, or a single row times several.

for group, chunk of pairs:   int16 += maddubs(pshufb(T, nibbles), (1, 2))
                             float32 tile += scale * sums
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import ON_STACK, beside
from qcompile.codegen.kernels.cpu.lut import PlanePanels
from qcompile.codegen.kernels.cpu.superblocks import NESTED, super_place
from qcompile.codegen.kernels.x86.instructions import PSHUFB, prefetch
from qcompile.codegen.kernels.x86.lut_sums import LANES, Base, Sums
from qcompile.codegen.kernels.x86.lut_tables import TableBuffers

ACCUMULATORS = 8
"""Registers of 16-bit sums a micro-kernel keeps at a time, if one row of one block of columns leaves the choice."""

LINE = 64
"""Bytes of a line of a cache."""

MOST_ACCUMULATORS = 12
"""What does not spill; a tile of more rows goes through its weights several times."""


@dataclass
class LutEmission:
    """What a micro-kernel needs while its PrimFunc is written.

    Attributes:
        names: parameters of the PrimFunc and run-time extents.
        m: number of rows, int32.
        tables: of the rows of the block.
        signed: whether 16-bit sums start from their `Base`.
        grouped: whether groups are added up in float32; otherwise all of K in int32.
        tile: the tile's result ``(rows, width)``, float32 or int32.
        kept: int32 sums of a group ``(rows, planes, width)``, where it is several chunks and ``tile`` is float32.
    """

    problem: LinearProblem
    panels: PlanePanels
    config: dict[str, Any]
    names: dict[str, Any]
    m: Any
    tables: TableBuffers
    signed: bool
    grouped: bool
    tile: Any = None
    kept: Any = None

    @property
    def size(self) -> int:
        """Bytes of a register."""
        return self.config["bytes"]

    @property
    def stored_planes(self) -> int:
        """Planes kept apart."""
        return 1 if self.panels.adjacent else self.panels.planes.bits

    @property
    def block(self) -> int:
        """Columns that a register of weights belongs to."""
        return self.size // self.panels.planes.bits if self.panels.adjacent else self.size

    def room(self, rows: int, panels: int = 1) -> LutEmission:
        """The same with a tile for up to ``rows`` rows and some panels."""
        shape = (rows, panels * self.panels.width)
        tile = B.alloc_buffer(shape, "float32" if self.grouped else "int32", annotations=ON_STACK)
        kept = None
        if self.grouped and self.tables.chunks_per_group > 1:
            kept = B.alloc_buffer((rows, self.stored_planes, shape[1]), "int32", annotations=ON_STACK)
        ahead = self.config["prefetch"] // panels  # of each of them
        return replace(self, tile=tile, kept=kept, config={**self.config, "prefetch": ahead})

    def rolled(self, count: Any) -> Any:
        """``count`` as a loop bound LLVM cannot limit from above, so that it keeps the loop."""
        return T.max(count, count - self.m)

    def nowhere(self, group: Any) -> Any:
        """0, which LLVM must take to change from group to group, as ``begin`` of a first chunk might not be 0.

        Otherwise it carries a tile over groups in registers, of which there are too few: it spills, and stores twice.
        """
        return T.bitwise_and(group, self.tables.begin[0, 0])


def micro(e: LutEmission, panel: Any, first: Any, rows: int) -> None:
    """Emit the product of ``rows`` rows of the block from ``first`` on with one panel, or with several, into ``e.tile``.

    As many columns and rows at a time as registers hold sums of. Planes kept apart leave room for few of them: these take
    turns within a chunk of pairs, whose weights then are in the first cache. Adjacent planes go through all of K in turn,
    but for several panels, from which a single row reads in turn.
    """
    p, several = e.panels, isinstance(panel, tuple)
    registers = 1 if p.adjacent else 2 * p.planes.bits  # that a row needs for one block of columns
    high = rows if registers * rows <= MOST_ACCUMULATORS else max(1, MOST_ACCUMULATORS // registers)
    width = int(e.tile.shape[1])
    wide, blocks = max(1, ACCUMULATORS // (registers * high)), width // e.block
    parts = [
        (range(top, min(top + high, rows)), range(start, min(start + wide, blocks)))
        for top in range(0, rows, high)
        for start in range(0, blocks, wide)
    ]
    for r in range(rows):
        for column in range(0, width, LANES):
            v.store(e.tile, [r, column], v.const(0, LANES, str(e.tile.dtype)), LANES)
    for together in [parts] if several or not p.adjacent else [[part] for part in parts]:
        _product(e, panel, first, together)


def _product(e: LutEmission, panel: Any, first: Any, parts: list[tuple[range, range]]) -> None:
    """Go through all of K once for some rows and blocks of columns, which take turns within a chunk."""
    t, width = e.tables, int(e.tile.shape[1])
    height = 1 + max(rows[-1] for rows, _ in parts)
    with T.serial(e.panels.groups) as group:
        if e.kept is not None:
            for r, plane in itertools.product(range(height), range(e.stored_planes)):
                for column in range(0, width, LANES):
                    v.store(e.kept, [r, plane, column], v.const(0, LANES, "int32"), LANES)
        bases = [Base(e, first + r, group) for r in range(height)]
        with T.serial(t.chunks_per_group) as piece:
            for rows, columns in parts:
                _chunk(e, panel, first, group, piece, rows, columns, bases)
        if t.chunks_per_group > 1:
            for r, index in itertools.chain(*(itertools.product(*part) for part in parts)):
                _add_group(e, panel, group, r, bases[r], index, None)


def _chunk(
    e: LutEmission,
    panel: Any,
    first: Any,
    group: Any,
    piece: Any,
    rows: range,
    blocks: range,
    bases: list[Base],
) -> None:
    """The part of a micro-kernel that keeps its 16-bit sums in registers: some rows and blocks of columns."""
    p, t = e.panels, e.tables
    begin = v.let(piece * t.pairs_per_chunk)
    chunk = v.let(group * t.chunks_per_group + piece)
    sums = [[Sums(e) for _ in blocks] for _ in rows]
    for r, row in zip(rows, sums):
        for block in row:
            block.start(bases[r])
    left = T.min(p.pairs_per_group - begin, t.pairs_per_chunk)
    whole = p.pairs_per_group % t.pairs_per_chunk == 0
    with T.serial(e.rolled(t.pairs_per_chunk if whole else left)) as i:
        pair = v.let(group * p.pairs_per_group + begin + i)
        if rows.start == 0:
            _prefetch(e, panel, pair, blocks)
        _look_up(e, panel, pair, blocks, sums, [(t.tables, first + r, pair) for r in rows])
    for r, row in zip(rows, sums):
        low, high = v.let(t.begin[first + r, chunk]), v.let(t.begin[first + r, chunk + 1])
        with T.serial(low, high) as entry:
            pair = v.let(t.pair[first + r, entry])
            _look_up(e, panel, pair, blocks, [row], [(t.extra, first + r, entry)])
    for r, row in zip(rows, sums):
        for index, block in zip(blocks, row):
            if t.chunks_per_group > 1:
                _keep(e, r, index, block)
            else:
                _add_group(e, panel, group, r, bases[r], index, block)


def _places(e: LutEmission, panel: Any, block: int) -> list[tuple[int, int]]:
    """Where the registers of a block of columns lie in a pair, by plane: number of the panel, and offset."""
    number, local = divmod(block, e.panels.width // e.block)
    step = e.size if e.panels.adjacent else e.block
    return [(number, plane * e.panels.width + local * step) for plane in range(e.stored_planes)]


def _prefetch(e: LutEmission, panel: Any, pair: Any, blocks: range) -> None:
    if not e.config["prefetch"]:
        return
    places = itertools.chain(*(_places(e, panel, block) for block in blocks))
    for number, line in dict.fromkeys((number, at // LINE) for number, at in places):
        prefetch(e.names["weight"], [beside(panel)[number], pair, LINE * line + e.config["prefetch"]])


def _look_up(e: LutEmission, panel: Any, pair: Any, blocks: range, sums: list[list[Sums]], tables: list[Any]) -> None:
    """Add the entries at the nibbles of one pair to the sums of each row."""
    size, nibbles = e.size, []
    for block in blocks:
        for number, at in _places(e, panel, block):
            raw = v.let(v.load(e.names["weight"], [beside(panel)[number], pair, at], size))
            low = v.let(T.bitwise_and(raw, v.const(15, size, "uint8")))
            high = v.let(T.shift_right(raw, v.const(4, size, "uint8")))
            nibbles.append((v.bits_of(low, "int8", size), v.bits_of(high, "int8", size)))
    for row, (buffer, at, index) in zip(sums, tables):
        halves = [v.let(_table(buffer, at, index, half, size)) for half in (0, 1)]
        for i, total in enumerate(row):
            for plane in range(e.stored_planes):
                for table, index in zip(halves, nibbles[i * e.stored_planes + plane]):
                    found = T.call_llvm_pure_intrin(f"int8x{size}", PSHUFB[size // 4], table, index)
                    total.add(plane, v.let(found))


def _table(buffer: Any, row: Any, index: Any, half: int, size: int) -> Any:
    """One table of 16 bytes in every 128-bit lane."""
    table = v.bits_of(v.load(buffer, [row, index, 16 * half], 16), "int8", 16)
    return T.Shuffle([table] * (size // 16), list(range(size)))


def _keep(e: LutEmission, r: int, index: int, block: Sums) -> None:
    """Add a chunk to the sums of its group, where a group is several chunks."""
    for plane in range(e.stored_planes):
        for j, value in enumerate(block.values(plane)):
            column = index * e.block + j * LANES
            if e.kept is not None:
                at = [r, plane, column]
                v.store(e.kept, at, v.load(e.kept, at, LANES) + value, LANES)
            else:
                at = [r, column]
                v.store(e.tile, at, v.load(e.tile, at, LANES) + _times(value, plane), LANES)


def _add_group(e: LutEmission, panel: Any, group: Any, r: int, base: Base, index: int, block: Sums | None) -> None:
    """Add a group of one row to its tile: scales and offsets. Without ``block`` its sums are those kept."""
    planes = e.panels.planes
    number, local = divmod(index * e.block, e.panels.width)
    each = beside(panel)[number]
    if block is not None:
        sums = [block.values(plane) for plane in range(e.stored_planes)]
    for j in range(e.block // LANES):
        place, column = index * e.block + j * LANES, local + j * LANES
        if block is not None:
            here = [values[j] for values in sums]
        elif e.kept is not None:
            here = [v.let(v.load(e.kept, [r, plane, place], LANES)) for plane in range(e.stored_planes)]
        else:
            here = []
        at = [r, e.nowhere(group) + place]
        so_far = v.load(e.tile, at, LANES)
        if e.kept is None and str(e.tile.dtype) == "int32":
            value = so_far if e.signed else so_far + v.splat(base.whole, LANES)
            for plane, part in enumerate(here):
                value = value + _times(part, plane)
            v.store(e.tile, at, value, LANES)
            continue
        value = v.let(so_far)
        if planes.uniform:
            merged = here[0] if e.signed else here[0] + v.splat(base.whole, LANES)
            for plane, part in enumerate(here[1:], 1):
                merged = merged + _times(part, plane)
            real = v.let(v.cast(merged, "float32", LANES))
            if planes.offset == "zero":
                zero = v.cast(v.load(e.names["zero"], [each, group, column], LANES), "int32", LANES)
                centred = v.cast(zero - v.const(planes.centre, LANES, "int32"), "float32", LANES)
                real = v.let(vmath.fma(centred, v.splat(-base.real_total, LANES), real))
            value = v.let(vmath.fma(real, _scale(e, "group_scale", [each, group, column]), value))
        else:
            for plane, part in enumerate(here):
                part = part if e.signed else part + v.splat(base.negative, LANES)
                scale = _scale(e, "group_scale", [each, group, plane, column])
                value = v.let(vmath.fma(v.cast(part, "float32", LANES), scale, value))
        if planes.offset == "free":
            total = base.real_total
            if "block_offset" in e.names:
                offset, total = _scale(e, "block_offset", [each, group, column]), -total
            else:
                offset = _scale(e, "offset", [each, group, column])
            value = v.let(vmath.fma(v.splat(total, LANES), offset, value))
        v.store(e.tile, at, value, LANES)


def _scale(e: LutEmission, name: str, at: list[Any]) -> Any:
    """A parameter of a group, times that of its super-block if there are such."""
    value = v.cast(v.load(e.names[name], at, LANES), "float32", LANES)
    parent = dict(NESTED).get(name)
    if parent not in e.names:
        return value
    outer = v.load(e.names[parent], super_place(e.panels, at), LANES)
    return value * v.cast(outer, "float32", LANES)


def _times(value: Any, plane: int) -> Any:
    """``2^plane`` times an int32 vector."""
    return T.shift_left(value, v.const(plane, LANES, "int32")) if plane else value
