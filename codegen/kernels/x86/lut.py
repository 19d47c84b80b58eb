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

import itertools
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem, Support
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import opaque
from qcompile.codegen.kernels.cpu.gemm import BANDWIDTH, CLOCK, usable
from qcompile.codegen.kernels.cpu.look_up import LookUpGemm, over_tiles
from qcompile.codegen.kernels.cpu.lut import PAIR, PlanePanels
from qcompile.codegen.kernels.cpu.refusals import no_avx2
from qcompile.codegen.kernels.cpu.superblocks import planes_of
from qcompile.codegen.kernels.cpu.tail import finish
from qcompile.codegen.kernels.x86.instructions import prefetch
from qcompile.codegen.kernels.x86.lut_micro import LINE, LutEmission, micro
from qcompile.codegen.kernels.x86.lut_sums import LANES
from qcompile.codegen.kernels.x86.lut_tables import BYTES, TableBuffers
from qcompile.targets.target import Target

CACHE = 256 << 10
"""Bytes the tables of a block of rows may take, and at most those of weights that are asked for while tables are built."""


class LutGemm(LookUpGemm):
    """``vpshufb`` on 256- or 512-bit registers.

    Config: ``bytes`` of a register, ``columns`` of a panel in registers of int32 lanes, ``rows`` of a tile, ``streams``:
    panels a single row takes at once, ``block_rows`` whose tables are built together, ``prefetch`` bytes ahead, ``scales``
    (``float16`` or ``float32``, of groups), ``early``: lines of weights asked for with every pair of tables, so that memory
    is not idle until the first of them is used (0 if left out).
    """

    name = "x86-lut"

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        if target.kind != "x86":
            return Support(False, f"{self.name} needs an x86 target, not {target.kind}")
        if reason := no_avx2(self.name, target):
            return Support(False, reason)
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
        """Pairs whose sums fit in 16 bits, signed where multiply-add reads them again. Signed sums wrap around until they fit."""
        if self.signed(problem, panels):
            return panels.pairs_per_group
        weight, top = (3 if panels.adjacent else 1), (32767 if panels.adjacent and panels.planes.bits == 4 else 65535)
        return min(panels.pairs_per_group, top // (PAIR * _largest(problem) * weight))

    def signed(self, problem: LinearProblem, panels: PlanePanels) -> bool:
        """Whether the 16-bit sums of a group may start from what belongs to no plane, so that they end as signed numbers."""
        planes = panels.planes
        if panels.adjacent and planes.bits == 4:
            return False
        weight = planes.reach if panels.adjacent else 1
        return panels.pairs_per_group * PAIR * _largest(problem) * weight <= 32767

    # Configs and cost

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        size = 64 if target.has("avx512") else 32
        planes = self.planes(problem)
        per_vector = size // planes.bits if planes.uniform and planes.bits in (2, 4) else size
        widths = sorted({per_vector * count for count in (1, 2, 4, 8) if 16 <= per_vector * count <= 128})
        padded = {width: -(-problem.n // width) * width for width in widths}
        likely = 32 if planes.bits < 4 else 64  # a single row shares loads of tables among several panels
        order = sorted(widths, key=lambda w: (padded[w] > 1.1 * min(padded.values()), abs(w - likely), w))
        table = -(-problem.k // PAIR) * BYTES
        block = max(4, min(16, CACHE // table // 4 * 4))
        fixed = {"bytes": size, "block_rows": block}
        found: list[dict[str, Any]] = [
            {**fixed, "columns": width, "rows": rows, "streams": streams, "prefetch": ahead, "scales": kind}
            for kind in self.scale_kinds(problem)
            for width in order
            for ahead, streams in itertools.product((2048, 1024, 4096, 0), self.streams(problem, width))
            for rows in (4, 2)
        ]
        few_weights = problem.k * problem.n * planes.bits <= 8 * CACHE  # bits
        if not few_weights or (problem.m or 1) > 1:
            return found
        # Asking early pays if the loop then asks further ahead than tables did.
        early = [{**config, "early": 1, "prefetch": far} for config in found for far in (8192, 4096)]
        return found + [config for i, config in enumerate(early) if config not in early[:i]]

    def streams(self, problem: LinearProblem, width: int) -> list[int]:
        """Numbers of panels a single row takes at once."""
        several, panels = (2, 4, 1) if self.planes(problem).bits > 2 else (4, 2, 1), -(-problem.n // width)
        if problem.threads == 1 and problem.m in (None, 1):
            return [n for n in several if n <= panels]
        return usable(several, problem, panels)

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
        with v.kernel(name, self.operands(problem, config)) as (builder, names):
            self.emit(problem, config, names, opaque(T.cast(names["m"], "int32")))
        return builder.get()

    def emit(self, problem: LinearProblem, config: dict[str, Any], names: dict[str, Any], m: Any) -> None:
        """Write the code for ``m`` rows and operands called ``names``."""
        panels, block = self.panels(problem, config), config["block_rows"]
        tables = TableBuffers(panels, self.pairs_per_chunk(problem, panels), block)
        signed, grouped = self.signed(problem, panels), self.grouped(panels.planes)
        e = LutEmission(problem, panels, config, names, m, tables, signed, grouped)
        ask = (lambda pair: self._ask(panels, config, names, pair)) if config.get("early") else None
        with T.serial(T.truncdiv(m + (block - 1), block)) as index:
            start = v.let(index * block)
            here = v.let(T.min(m - start, block))
            with T.serial(here) if problem.threads == 1 else T.parallel(here) as row:
                tables.build(names["x"], start + row, row, ask)
            self._panels(e, start, here)

    @staticmethod
    def _ask(panels: PlanePanels, config: dict[str, Any], names: dict[str, Any], pair: Any) -> None:
        """Ask for a line of scales, and for the next lines of the panels a single row takes first, in turn."""
        streams, lines = config["streams"], config["early"]
        if "group_scale" in names:
            length = LINE // (2 if config["scales"] == "float16" else 4)
            leading = [0] * (len(names["group_scale"].shape) - 1)
            prefetch(names["group_scale"], [*leading, pair * length])
        for line in range(lines):
            at = v.let(pair * lines + line)
            panel = T.truncmod(at, streams) * (panels.count // streams)
            prefetch(names["weight"], [panel, 0, T.truncdiv(at, streams) * LINE])

    @staticmethod
    def _panels(e: LutEmission, start: Any, here: Any) -> None:
        """All panels for a block of ``here`` rows from ``start`` on; for a single row several at a time, far apart."""
        p, streams = e.panels, e.config["streams"]
        apart, rest = divmod(p.count, streams)
        items = apart + rest  # of `streams` panels, but for the last few
        with T.serial(items) if e.problem.threads == 1 else T.parallel(items) as item:
            several = item < apart
            if streams > 1:
                with T.If(T.And(several, here == 1)), T.Then():
                    wide = e.room(1, streams)
                    micro(wide, tuple(v.let(item + i * apart) for i in range(streams)), 0, 1)
                    with T.serial(streams) as i:
                        panel = item + i * apart
                        finish(e.problem, e.names, wide.tile, p, LANES, panel, start, 1, i * p.width)
            one_by_one = T.Select(several, T.Select(here > 1, streams, 0), 1) if streams > 1 else 1
            with T.serial(one_by_one) as i:
                panel = v.let(item + T.Select(several, i, streams - 1) * apart if streams > 1 else item)
                tile = e.room(e.config["rows"])
                over_tiles(
                    here,
                    e.config["rows"],
                    lambda first, rows: micro(tile, panel, first, rows),
                    lambda first, rows: finish(e.problem, e.names, tile.tile, p, LANES, panel, start + first, rows),
                )


def _largest(problem: LinearProblem) -> int:
    """Largest magnitude of an activation code: that of a static quantizer may be -128."""
    return 128 if problem.activation.granularity == "tensor" else 127
