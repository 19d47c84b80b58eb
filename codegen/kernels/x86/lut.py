"""Bit-serial GEMV and GEMM by table look-up: weights of 1 to 4 bits, ternary ones, and any sum of scaled bit planes.

See `cpu.lut` for the method and the layout. Every call turns the activation codes of a block of rows into tables, which
stay in the second cache, and then goes once through the weights:

    for block of rows:
        tables of every row                                          lut_tables
        for panel in parallel(panels):  for tile of rows in block:
            for group, chunk of pairs:   int16 += maddubs(pshufb(T, nibbles), (1, 2))
                                         float32 tile += scale * sums
            y = tile * column scale * activation scale + bias ...

A vector of weights is two index vectors (low and high nibbles, three instructions) and, per row, two ``vpshufb`` with a
multiply-add and an addition each: 9 instructions for 128 two-bit weights and one row. Planes with scales of their own
must not be added up in one lane; bytes of both tables are interleaved instead and added in pairs, 11 instructions for 256
one-bit weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.gemm import BANDWIDTH, CLOCK, ON_STACK, finish, opaque
from qcompile.codegen.kernels.cpu.look_up import LookUpGemm, over_tiles
from qcompile.codegen.kernels.cpu.lut import PAIR, PlanePanels
from qcompile.codegen.kernels.cpu.superblocks import (
    NESTED,
    planes_of,
    super_place,
)
from qcompile.codegen.kernels.x86.instructions import PSHUFB, prefetch
from qcompile.codegen.kernels.x86.lut_sums import LANES, Base, Sums
from qcompile.codegen.kernels.x86.lut_tables import BYTES, TableBuffers
from qcompile.targets.target import Target

CACHE = 256 << 10
"""Bytes the tables of a block of rows may take."""


ACCUMULATORS = 8
"""Registers of 16-bit sums a micro-kernel keeps at a time, if one row of one block of columns leaves the choice."""

MOST_ACCUMULATORS = 12
"""What does not spill; a tile of more rows goes through its weights several times."""


@dataclass
class LutEmission:
    """What a micro-kernel needs while its PrimFunc is written.

    Attributes:
        names: parameters of the PrimFunc and run-time extents.
        m: number of rows, int32.
        tables: of the rows of the block.
        tile: the tile's result ``(rows, width)``, float32, or int32 where one group is all of K.
        signed: whether 16-bit sums start from their `Base`.
        kept: int32 sums of a group ``(rows, planes, width)``, where it is several chunks and ``tile`` is float32.
        start: first column in ``tile`` of the panel at hand.
    """

    problem: LinearProblem
    panels: PlanePanels
    config: dict[str, Any]
    names: dict[str, Any]
    m: Any
    tables: TableBuffers
    tile: Any
    signed: bool
    kept: Any = None
    start: Any = 0

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

    def rolled(self, count: Any) -> Any:
        """``count`` as a loop bound LLVM cannot limit from above, so that it keeps the loop."""
        return T.max(count, count - self.m)

    def nowhere(self, group: Any) -> Any:
        """0, which LLVM must take to change from group to group, as ``begin`` of a first chunk might not be 0.

        Otherwise it carries a tile over groups in registers, of which there are too few: it spills, and stores twice.
        """
        return T.bitwise_and(group, self.tables.begin[0, 0])


class LutGemm(LookUpGemm):
    """``vpshufb`` on 256- or 512-bit registers.

    Config: ``bytes`` of a register, ``columns`` of a panel in registers of int32 lanes, ``rows`` of a tile, ``streams``: its
    panels, ``block_rows`` whose tables are built together, ``prefetch`` bytes ahead, ``scales`` (``float16`` or ``float32``, of groups).
    """

    name = "x86-lut"

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        if target.kind != "x86":
            return Support(False, f"{self.name} needs an x86 target, not {target.kind}")
        if not target.has("avx2", "fma", "f16c"):
            return Support(False, f"{self.name} needs AVX2, FMA and F16C, which {target} does not have")
        if not problem.activation.bits:
            return Support(False, f"{self.name} looks integer activations up; this operator has float ones")
        planes = planes_of(problem.weight)
        if planes is None:
            return Support(False, f"{self.name}: {problem.weight} codes are no sums of scaled bit planes")
        if planes.bits > 7:
            return Support(False, f"{self.name}: {planes.bits} look-ups are slower than one byte product")
        if problem.k * 128 * 15 >= 1 << 31:
            return Support(False, f"{self.name}: {problem.k} products may overflow an int32 accumulator")
        return Support(True)

    # Geometry

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> PlanePanels:
        """Geometry of the packed weights."""
        planes = self.planes(problem)
        adjacent = planes.uniform and planes.bits in (2, 4)
        turns = 0 if adjacent else config["bytes"]
        return PlanePanels(problem.k, problem.n, planes, config["columns"], adjacent, turns)

    def pairs_per_chunk(self, problem: LinearProblem, panels: PlanePanels) -> int:
        """Pairs whose sums fit in 16 bits, signed where multiply-add reads them again."""
        weight, top = (3 if panels.adjacent else 1), (32767 if panels.adjacent and panels.planes.bits == 4 else 65535)
        return min(panels.pairs_per_group, top // (PAIR * _largest(problem) * weight))

    def signed(self, problem: LinearProblem, panels: PlanePanels) -> bool:
        """Whether the 16-bit sums of a group may start from what belongs to no plane, so that they end as signed numbers."""
        planes = panels.planes
        if panels.adjacent and planes.bits == 4:
            return False
        weight = max(planes.centre, 3 - planes.centre) if panels.adjacent else 1
        return panels.pairs_per_group * PAIR * _largest(problem) * weight <= 32767

    # Configs and cost

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        size = 64 if target.has("avx512") else 32
        planes = self.planes(problem)
        per_vector = size // planes.bits if planes.uniform and planes.bits in (2, 4) else size
        widths = sorted({per_vector * count for count in (1, 2, 4, 8) if 16 <= per_vector * count <= 128})
        padded = {width: -(-problem.n // width) * width for width in widths}
        likely = 128 if planes.bits == 1 else 64  # loads of tables are shared by the columns of a panel
        order = sorted(widths, key=lambda w: (padded[w] > 1.1 * min(padded.values()), abs(w - likely), w))
        table = -(-problem.k // PAIR) * BYTES
        block = max(4, min(16, CACHE // table // 4 * 4))
        fixed = {"bytes": size, "block_rows": block}
        return [
            {**fixed, "columns": width, "rows": rows, "streams": streams, "prefetch": ahead, "scales": kind}
            for kind in self.scale_kinds(problem)
            for width in order
            for ahead, streams in itertools.product((2048, 1024, 4096, 0), self.streams(problem, width))
            for rows in (4, 2)
        ]

    def streams(self, problem: LinearProblem, width: int) -> list[int]:
        """Numbers of panels of a tile: memory delivers two at once faster than one, however far ahead it is asked."""
        count = -(-problem.n // width)
        return [n for n in (2, 1) if count % n == 0 and (n == 1 or count >= 4 * n * max(problem.threads, 1))]

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """The slower of arithmetic and reading the weights, plus building tables and waking the threads.

        Instructions per cycle as measured on Zen 3; registers of 64 bytes are taken to issue at half the rate, and nothing
        is known of how they compare with VNNI, so that estimates for such a processor carry a margin.
        """
        panels = self.panels(problem, config)
        threads = max(1, problem.threads)
        wide = config["bytes"] == 64
        registers = panels.count * panels.pairs * panels.pair_bytes / config["bytes"]
        tiles = -(-m // config["rows"])
        look_up = registers * (m * (6 if panels.adjacent else 8) + 3 * tiles)
        kept = 1 if panels.planes.uniform else panels.planes.bits
        scale = m * panels.count * panels.groups * panels.width / LANES * (5 + 5 * kept)
        cycles = (look_up + scale) / (1.7 if wide else 3.3) * (1.5 if target.has("vnni") else 1.0)
        tables = m * panels.pairs * 8
        shared = min(threads, m)
        balance = -(-panels.count // threads) / panels.count
        width = 2 if config["scales"] == "float16" else 4
        stored = panels.count * (panels.pairs * panels.pair_bytes + panels.groups * panels.width * width * kept)
        work = max(cycles * balance / CLOCK, stored / BANDWIDTH)
        return work + tables / shared / CLOCK + (2e-6 if threads > 1 else 0)

    # Code

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        panels = self.panels(problem, config)
        block, high = config["block_rows"], config["rows"]
        beside = replace(panels, width=panels.width * config["streams"])
        with v.kernel(name, self.params(problem, config, panels)) as (builder, names):
            m = opaque(T.cast(names["m"], "int32"))
            buffers = TableBuffers(panels, self.pairs_per_chunk(problem, panels), block)
            with T.serial(T.truncdiv(m + (block - 1), block)) as index:
                start = v.let(index * block)
                here = v.let(T.min(m - start, block))
                with T.serial(here) if problem.threads == 1 else T.parallel(here) as row:
                    buffers.build(names["x"], start + row, row)
                with T.serial(beside.count) if problem.threads == 1 else T.parallel(beside.count) as panel:
                    dtype = "float32" if self.grouped(panels.planes) else "int32"
                    tile = B.alloc_buffer((high, beside.width), dtype, annotations=ON_STACK)
                    e = LutEmission(problem, panels, config, names, m, buffers, tile, self.signed(problem, panels))
                    if buffers.chunks_per_group > 1 and dtype == "float32":
                        e.kept = B.alloc_buffer((high, e.stored_planes, beside.width), "int32", annotations=ON_STACK)
                    over_tiles(
                        here,
                        high,
                        lambda first, rows: self.micro(e, panel, first, rows),
                        lambda first, rows: finish(problem, names, tile, beside, LANES, panel, start + first, rows),
                    )
        return builder.get()

    def micro(self, e: LutEmission, panel: Any, first: Any, rows: int) -> None:
        """Emit the product of ``rows`` rows of the block from ``first`` on with one panel, into ``e.tile``.

        As many columns and rows at a time as registers hold sums of. Planes kept apart leave room for few of them: these take
        turns within a chunk of pairs, whose weights then are in the first cache. Adjacent planes go through all of K in turn.
        With several ``streams`` their panels take turns within a chunk, too, if a single row has to wait for memory.
        """
        p, t = e.panels, e.tables
        registers = 1 if p.adjacent else 2 * p.planes.bits  # that a row needs for one block of columns
        high = rows if registers * rows <= MOST_ACCUMULATORS else max(1, MOST_ACCUMULATORS // registers)
        wide, blocks = max(1, ACCUMULATORS // (registers * high)), p.width // e.block
        parts = [
            (range(top, min(top + high, rows)), range(start, min(start + wide, blocks)))
            for top in range(0, rows, high)
            for start in range(0, blocks, wide)
        ]
        for r in range(rows):
            for column in range(0, p.width * e.config["streams"], LANES):
                v.store(e.tile, [r, column], v.const(0, LANES, str(e.tile.dtype)), LANES)
        if rows == 1:
            self._product(
                e, panel, first, [parts] if e.config["streams"] > 1 or not p.adjacent else [[x] for x in parts]
            )
            return
        with self._streams(e, panel) as (here, each):
            one = replace(here, config={**e.config, "streams": 1})
            self._product(one, each, first, [[x] for x in parts] if p.adjacent else [parts])

    def _product(self, e: LutEmission, panel: Any, first: Any, turns: list[list[tuple[range, range]]]) -> None:
        """Go through all of K once for each list of rows and blocks of columns in ``turns``."""
        p, t = e.panels, e.tables
        for together in turns:
            height = 1 + max(rows[-1] for rows, _ in together)
            with T.serial(p.groups) as group:
                if e.kept is not None:
                    with self._streams(e, panel) as (here, _):
                        for r, plane in itertools.product(range(height), range(e.stored_planes)):
                            for column in range(0, p.width, LANES):
                                v.store(e.kept, [r, plane, here.start + column], v.const(0, LANES, "int32"), LANES)
                bases = [Base(e, first + r, group) for r in range(height)]
                with T.serial(t.chunks_per_group) as piece, self._streams(e, panel) as (here, each):
                    for rows, columns in together:
                        self._chunk(here, each, first, group, piece, rows, columns, bases)
                if t.chunks_per_group > 1:
                    with self._streams(e, panel) as (here, each):
                        for r, index in itertools.chain(*(itertools.product(*part) for part in together)):
                            self._add_group(here, each, group, r, bases[r], index, None)

    @contextlib.contextmanager
    def _streams(self, e: LutEmission, panel: Any) -> Iterator[tuple[LutEmission, Any]]:
        """A loop over the panels of a tile: the emission and the panel of each."""
        count = e.config["streams"]
        if count == 1:
            yield e, panel
            return
        with T.serial(count) as stream:
            yield replace(e, start=stream * e.panels.width), panel * count + stream

    def _chunk(
        self,
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
            if blocks.start == 0 and rows.start == 0:
                self._prefetch(e, panel, pair)
            self._look_up(e, panel, pair, blocks, sums, [(t.tables, first + r, pair) for r in rows])
        for r, row in zip(rows, sums):
            low, high = v.let(t.begin[first + r, chunk]), v.let(t.begin[first + r, chunk + 1])
            with T.serial(low, high) as entry:
                pair = v.let(t.pair[first + r, entry])
                self._look_up(e, panel, pair, blocks, [row], [(t.extra, first + r, entry)])
        for r, row in zip(rows, sums):
            for index, block in zip(blocks, row):
                if t.chunks_per_group > 1:
                    self._keep(e, r, index, block)
                else:
                    self._add_group(e, panel, group, r, bases[r], index, block)

    def _prefetch(self, e: LutEmission, panel: Any, pair: Any) -> None:
        if not e.config["prefetch"]:
            return
        for line in range(0, e.panels.pair_bytes, 64):
            prefetch(e.names["weight"], [panel, pair, line + e.config["prefetch"]])

    def _look_up(
        self, e: LutEmission, panel: Any, pair: Any, blocks: range, sums: list[list[Sums]], tables: list[Any]
    ) -> None:
        """Add the entries at the nibbles of one pair to the sums of each row."""
        p, size = e.panels, e.size
        nibbles = []
        for block in blocks:
            for plane in range(e.stored_planes):
                at = block * size if p.adjacent else plane * p.width + block * size
                raw = v.let(v.load(e.names["weight"], [panel, pair, at], size))
                low = v.let(T.bitwise_and(raw, v.const(15, size, "uint8")))
                high = v.let(T.shift_right(raw, v.const(4, size, "uint8")))
                nibbles.append((v.bits_of(low, "int8", size), v.bits_of(high, "int8", size)))
        for row, (buffer, at, index) in zip(sums, tables):
            halves = [v.let(self._table(buffer, at, index, half, size)) for half in (0, 1)]
            for i, total in enumerate(row):
                for plane in range(e.stored_planes):
                    for table, index in zip(halves, nibbles[i * e.stored_planes + plane]):
                        found = T.call_llvm_pure_intrin(f"int8x{size}", PSHUFB[size // 4], table, index)
                        total.add(plane, v.let(found))

    @staticmethod
    def _table(buffer: Any, row: Any, index: Any, half: int, size: int) -> Any:
        """One table of 16 bytes in every 128-bit lane."""
        table = v.bits_of(v.load(buffer, [row, index, 16 * half], 16), "int8", 16)
        return T.Shuffle([table] * (size // 16), list(range(size)))

    def _keep(self, e: LutEmission, r: int, index: int, block: Sums) -> None:
        """Add a chunk to the sums of its group, where a group is several chunks."""
        for plane in range(e.stored_planes):
            for j, value in enumerate(block.values(plane)):
                column = index * e.block + j * LANES
                if e.kept is not None:
                    at = [r, plane, e.start + column]
                    v.store(e.kept, at, v.load(e.kept, at, LANES) + value, LANES)
                else:
                    at = [r, e.start + column]
                    v.store(e.tile, at, v.load(e.tile, at, LANES) + _times(value, plane), LANES)

    def _add_group(
        self, e: LutEmission, panel: Any, group: Any, r: int, base: Base, index: int, block: Sums | None
    ) -> None:
        """Add a group of one row to its tile: scales and offsets. Without ``block`` its sums are those kept."""
        planes = e.panels.planes
        if block is not None:
            sums = [block.values(plane) for plane in range(e.stored_planes)]
        for j in range(e.block // LANES):
            column = index * e.block + j * LANES
            if block is not None:
                here = [values[j] for values in sums]
            elif e.kept is not None:
                here = [v.let(v.load(e.kept, [r, plane, e.start + column], LANES)) for plane in range(e.stored_planes)]
            else:
                here = []
            at = [r, e.nowhere(group) + e.start + column]
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
                    zero = v.cast(v.load(e.names["zero"], [panel, group, column], LANES), "int32", LANES)
                    centred = v.cast(zero - v.const(planes.centre, LANES, "int32"), "float32", LANES)
                    real = v.let(vmath.fma(centred, v.splat(-base.real_total, LANES), real))
                value = v.let(vmath.fma(real, self._scale(e, "group_scale", [panel, group, column]), value))
            else:
                for plane, part in enumerate(here):
                    part = part if e.signed else part + v.splat(base.negative, LANES)
                    scale = self._scale(e, "group_scale", [panel, group, plane, column])
                    value = v.let(vmath.fma(v.cast(part, "float32", LANES), scale, value))
            if planes.offset == "free":
                total = base.real_total
                if "block_offset" in e.names:
                    offset, total = self._scale(e, "block_offset", [panel, group, column]), -total
                else:
                    offset = self._scale(e, "offset", [panel, group, column])
                value = v.let(vmath.fma(v.splat(total, LANES), offset, value))
            v.store(e.tile, at, value, LANES)

    @staticmethod
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


def _largest(problem: LinearProblem) -> int:
    """Largest magnitude of an activation code: that of a static quantizer may be -128."""
    return 128 if problem.activation.granularity == "tensor" else 127
