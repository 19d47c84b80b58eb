"""Bit-serial GEMV and GEMM by table look-up on NEON: weights of 1 to 4 bits, ternary ones, sums of scaled bit planes,
and K-quants.

See `cpu.lut` for the method. A call turns the activation codes of a block of rows into tables (`lut_tables`), then goes once
through the weights, 16 consecutive k of a panel at a time, which is four tables:

    for group, chunk of steps:   uint16 += uadalp(tbl2(T0 T1, low nibbles)) + uadalp(tbl2(T2 T3, high nibbles))
                                 float32 tile += scale * sums

A register of weights holds one plane of 8 columns; the two bytes of a column are nibbles of neighbouring tables. The odd bytes
of an index register have bit 4 set, which makes TBL read the second of its two tables, and SRI and BIF replace the four
bits below without touching it. UADALP then adds the two entries of a column, so that a register costs six instructions for 128
one-bit weights: SRI, BIF, and TBL and UADALP twice. SDOT needs 16 for as many, and 16 for 128 two-bit ones where tables need 12.
No instruction is beyond ARMv8.0.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.arm.lut_sums import COLUMNS, Emission, Kept, StepPanels, Sums, Totals
from qcompile.codegen.kernels.arm.lut_tables import STEP, STEP_BYTES, TableBuffers, bytes_of, look_up
from qcompile.codegen.kernels.arm.products import BYTES, LANES, schedule_barrier
from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Register, opaque
from qcompile.codegen.kernels.cpu.gemm import BANDWIDTH, CLOCK
from qcompile.codegen.kernels.cpu.look_up import LookUpGemm, over_tiles
from qcompile.codegen.kernels.cpu.superblocks import (
    NESTED,
    planes_of,
    super_place,
)
from qcompile.codegen.kernels.cpu.tail import finish
from qcompile.formats import SuperBlock
from qcompile.targets.target import Target

CACHE = 256 << 10
"""Bytes the tables of a block of rows may take."""

TURNS = 4
"""Registers of indices: each is read and written by one instruction, which would be a chain over all weights with one."""

IN_FLIGHT = 2
"""Registers of weights that LLVM may reorder among: with all of a step it defers the additions until registers run out."""

PER_CYCLE = 2.8
"""Instructions per cycle that `cost` assumes; the other families' rates stand for about as many."""


class TableLookupGemm(LookUpGemm):
    """TBL on pairs of tables.

    Config: ``columns`` of a panel, ``rows`` of a tile, ``block_rows`` whose tables are built together, ``scales``
    (``float16`` or ``float32``, of groups).
    """

    name = "arm-tbl"

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        if target.kind != "arm":
            return Support(False, f"{self.name} needs an arm target, not {target.kind}")
        if not problem.activation.bits:
            return Support(False, f"{self.name} looks integer activations up; this operator has float ones")
        planes = planes_of(problem.weight)
        if planes is None:
            return Support(False, f"{self.name}: {problem.weight} codes are no sums of scaled bit planes")
        if planes.bits > 4 and not isinstance(problem.weight, SuperBlock):
            return Support(False, f"{self.name}: {planes.bits} look-ups are more work than one byte product")
        if problem.k * 128 << planes.bits >= 1 << 31:
            return Support(False, f"{self.name}: {problem.k} products may overflow an int32 accumulator")
        return Support(True)

    # Geometry

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> StepPanels:
        """Geometry of the packed weights."""
        planes = self.planes(problem)
        return StepPanels(problem.k, problem.n, planes, config["columns"], adjacent=False)

    # Configs and cost

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        planes = self.planes(problem)
        tiles = [(64, 1), (32, 1), (64, 2), (32, 2), (16, 2)]
        if planes.bits > 2:
            tiles = [(32, 1), (16, 2), (64, 1), (32, 2)]
        padded = {columns: -(-problem.n // columns) * columns for columns, _ in tiles}
        order = sorted(tiles, key=lambda t: (padded[t[0]] > 1.1 * min(padded.values()), tiles.index(t)))
        table = -(-problem.k // STEP) * STEP_BYTES
        block = max(2, min(16, CACHE // table // 2 * 2))
        return [
            {"columns": columns, "rows": rows, "block_rows": block, "scales": kind}
            for kind in self.scale_kinds(problem)
            for columns, rows in order
        ]

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """The slower of the instructions and reading the weights, plus building tables and waking the threads."""
        panels = self.panels(problem, config)
        threads, planes = max(1, problem.threads), panels.planes.bits
        blocks = panels.count * panels.width // COLUMNS
        tiles = -(-m // config["rows"])
        steps = panels.groups * panels.steps_per_group
        look_up = blocks * steps * planes * (4 * m + 3 * tiles)
        loop = panels.count * steps * (4 * m + 3 * tiles)
        scale = blocks * panels.groups * m * (12 + 4 * planes)
        balance = -(-panels.count // threads) / panels.count
        width = 2 if config["scales"] == "float16" else 4
        stored = panels.count * (panels.pairs * panels.pair_bytes + panels.groups * panels.width * width)
        work = (look_up + loop + scale) * balance / PER_CYCLE / CLOCK
        tables = m * steps * 65 / min(threads, m) / PER_CYCLE / CLOCK if m else 0.0
        return max(work, stored / BANDWIDTH) + tables + (2e-6 if threads > 1 else 0)

    # Code

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        panels = self.panels(problem, config)
        block, high = config["block_rows"], config["rows"]
        serial = problem.threads == 1
        with v.kernel(name, self.params(problem, config, panels)) as (builder, names):
            m = opaque(T.cast(names["m"], "int32"))
            buffers = TableBuffers(panels, panels.steps_per_group, Sums.steps(problem, panels), block)
            with T.serial(T.truncdiv(m + (block - 1), block)) as index:
                start = v.let(index * block)
                here = v.let(T.min(m - start, block))
                with T.serial(here) if serial else T.parallel(here) as row:
                    buffers.build(names["x"], start + row, row)
                with T.serial(panels.count) if serial else T.parallel(panels.count) as panel:
                    dtype = "float32" if self.grouped(panels.planes) else "int32"
                    tile = B.alloc_buffer((high, panels.width), dtype, annotations=ON_STACK)
                    nibbles = [Register("uint8", BYTES) for _ in range(TURNS)]
                    for register in nibbles:
                        register.set(bytes_of([0, 16] * COLUMNS))
                    e = Emission(problem, panels, names, m, buffers, tile, nibbles)
                    over_tiles(
                        here,
                        high,
                        lambda first, rows: self.micro(e, panel, first, rows),
                        lambda first, rows: finish(problem, names, tile, panels, LANES, panel, start + first, rows),
                    )
        return builder.get()

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        """Emit the product of ``rows`` rows of the block from ``first`` on with one panel, into ``e.tile``."""
        p, t = e.panels, e.tables
        blocks = range(p.width // COLUMNS)
        tile = Totals(e, rows)
        sums = [[Sums(e) for _ in blocks] for _ in range(rows)]
        kept = Kept(e, rows) if t.chunks_per_group > 1 and tile.dtype == "float32" else None
        with T.serial(p.groups) as group:
            if kept is not None:
                kept.clear()
            bases = [v.let(t.base[first + r, group]) for r in range(rows)]
            with T.serial(t.chunks_per_group) as piece:
                begin = v.let(piece * t.steps_per_chunk)
                for r, row in enumerate(sums):
                    for block in row:
                        block.start(bases[r])
                self._steps(e, panel, v.let(group * t.steps_per_group + begin), begin, first, sums)
                for r in range(rows):
                    chunk = v.let(group * t.chunks_per_group + piece)
                    low, high = v.let(t.begin[first + r, chunk]), v.let(t.begin[first + r, chunk + 1])
                    with T.serial(low, high) as entry:
                        self._look_up(e, panel, t.step[first + r, entry], [sums[r]], [(t.extra, first + r, entry)])
                if t.chunks_per_group > 1:
                    for r, row in enumerate(sums):
                        for index, block in enumerate(row):
                            (kept or tile).add_chunk(r, index, block)
            for r, row in enumerate(sums):
                total = v.let(t.total[first + r, group])
                for index, block in enumerate(row):
                    if kept is not None:
                        here = kept.values(r, index)
                    elif t.chunks_per_group == 1:
                        here = block.values()
                    else:
                        here = []
                    self._add_group(e, tile, (panel, group, r, index), here, bases[r], total)
        tile.store()

    def _steps(self, e: Emission, panel: Any, start: Any, begin: Any, first: Any, sums: list[list[Sums]]) -> None:
        """Emit the look-ups of a chunk. The bound of the loop is one that LLVM cannot limit, so that it does not unroll it."""
        t = e.tables
        whole, left = t.steps_per_group % t.steps_per_chunk == 0, t.steps_per_group - begin
        turns = T.max(t.steps_per_chunk, t.steps_per_chunk - e.m) if whole else T.min(left, t.steps_per_chunk)
        with T.serial(turns) as i:
            step = v.let(start + i)
            self._look_up(e, panel, step, sums, [(t.tables, first + r, step) for r in range(len(sums))])

    def _look_up(self, e: Emission, panel: Any, step: Any, sums: list[list[Sums]], tables: list[Any]) -> None:
        """Add the entries at the nibbles of one step to the sums of each row."""
        p = e.panels
        loaded = [
            [v.let(v.load(buffer, [row, at, BYTES * place], BYTES)) for place in range(4)] for buffer, row, at in tables
        ]
        for block in range(p.width // COLUMNS):
            for plane in range(p.planes.bits):
                place = (block * p.planes.bits + plane) * BYTES
                pair, at = (step * 2, place) if place < p.pair_bytes else (step * 2 + 1, place - p.pair_bytes)
                raw = v.let(v.load(e.names["weight"], [panel, pair, at], BYTES))
                index = e.index[(block * p.planes.bits + plane) % TURNS]
                index.set(T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.vsri", index.get(), raw, T.int32(4)))
                high = v.let(index.get())
                low = T.bitwise_or(
                    T.bitwise_and(raw, v.const(15, BYTES, "uint8")), T.bitwise_and(high, v.const(0xF0, BYTES, "uint8"))
                )
                low = v.let(low)
                for row, four in zip(sums, loaded):
                    row[block].add(plane, v.let(look_up(four[0], four[1], low)))
                    row[block].add(plane, v.let(look_up(four[2], four[3], high)))
            if (block + 1) * p.planes.bits % IN_FLIGHT < p.planes.bits:
                schedule_barrier(sums[0][block].registers[0].get())

    def _add_group(self, e: Emission, tile: Totals, at: Any, sums: list[list[Any]], base: Any, total: Any) -> None:
        """Add a group to a block of a row of the tile: offsets and scales. ``sums`` are int32 ``[plane or one][quad]``."""
        panel, group, r, block = at
        planes = e.panels.planes
        column = block * COLUMNS
        for half in range(2):
            here = [values[half] for values in sums]
            if tile.dtype == "int32":
                value = tile.get(r, block, half)
                if not Sums.signed(e.problem, e.panels):
                    value = value + v.splat(base, LANES)
                tile.set(r, block, half, value + here[0] if here else value)
                continue
            if not Sums.signed(e.problem, e.panels):
                here = [v.let(value + v.splat(base, LANES)) for value in here]
            if planes.offset == "zero":
                zero = v.cast(self._half(e.names["zero"], [panel, group, column], half), "int32", LANES)
                here = [v.let(here[0] - (zero - v.const(planes.centre, LANES, "int32")) * v.splat(total, LANES))]
            value = v.let(tile.get(r, block, half))
            for plane, part in enumerate(here):
                place = [panel, group, column] if planes.uniform else [panel, group, plane, column]
                scale = self._scale(e, "group_scale", place, half)
                value = v.let(vmath.fma(v.cast(part, "float32", LANES), scale, value))
            if planes.offset == "free":
                name, factor = ("block_offset", -total) if "block_offset" in e.names else ("offset", total)
                offset = self._scale(e, name, [panel, group, column], half)
                value = v.let(vmath.fma(v.splat(T.cast(factor, "float32"), LANES), offset, value))
            tile.set(r, block, half, value)

    def _scale(self, e: Emission, name: str, at: list[Any], half: int) -> Any:
        """A parameter of a group in float32, times that of its super-block if there are such."""
        value = v.cast(self._half(e.names[name], at, half), "float32", LANES)
        parent = dict(NESTED).get(name)
        if parent not in e.names:
            return value
        return value * v.cast(self._half(e.names[parent], super_place(e.panels, at), half), "float32", LANES)

    @staticmethod
    def _half(buffer: Any, at: list[Any], half: int) -> Any:
        """Four of eight consecutive elements."""
        return v.shuffle(v.load(buffer, at, COLUMNS), range(half * LANES, (half + 1) * LANES))
