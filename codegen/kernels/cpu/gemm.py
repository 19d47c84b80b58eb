"""The loops all GEMM families share: tiles of rows x weight panels, and the fused tail.

    for item in parallel(blocks x panels x tiles):      a tile is 1..mr rows; tiles of a call differ by one row at most
        acc[rows, width] = micro-kernel                 K innermost, accumulators in registers, one variant per height
        for row in tile:                                written once, whatever the height
            y = acc * scale[n] * activation_scale[m] + bias[n];  out = activation(y) + residual

A single row takes several panels at once (``streams``): memory delivers several places in turn faster than one.

An item reads one panel and ``mr`` rows. Consecutive items share the panel and move down the rows, so a panel comes from
memory once per ``block_rows`` rows and otherwise from the first or second cache; threads take contiguous runs of items,
which balances to one tile. (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008, with the
packing of the right-hand side moved to compile time.)
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, StoredCodes, Support
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Emission, Register, Tile, beside, opaque, vectors
from qcompile.codegen.kernels.cpu.lut import group_scales
from qcompile.codegen.kernels.cpu.panels import Panels, integer_format
from qcompile.codegen.kernels.cpu.tail import finish, tail_params
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target

CLOCK = 3e9
"""Cycles per second assumed by `TiledGemm.cost`."""

BANDWIDTH = 40e9
"""Bytes per second of weights assumed by `TiledGemm.cost`."""

ITEMS_PER_THREAD = 4
"""Items each thread should get at least, where the rows alone do not make as many."""


class TiledGemm(LinearKernel):
    """Base of the families; a subclass gives the panel geometry and the micro-kernel.

    Config: ``mr`` rows of a tile, ``vectors`` of columns with ``lanes`` each, ``panels`` per item, ``block_rows`` after
    which the sweep over panels starts again, ``streams``: panels a single row takes at once, ``scales`` (``float16`` or
    ``float32``, of groups).
    """

    kind = "x86"
    """The kind of target."""

    stores_codes = True
    streams: tuple[int, ...] = (1,)
    """Numbers of panels a single row may take at once, best first."""

    float_tile = False
    """Whether the micro-kernel accumulates float32 even for per-channel scales."""

    @abstractmethod
    def lanes(self, target: Target) -> int:
        """32-bit lanes of the registers used."""

    @abstractmethod
    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        """Geometry of the packed weights."""

    @abstractmethod
    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        """Register tiles ``(rows, vectors)``, best first."""

    @abstractmethod
    def unit(self, panels: Panels) -> int:
        """The integer the micro-kernel multiplies every code by (a power of two)."""

    @abstractmethod
    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        """Emit the product of ``rows`` rows from ``first`` on with one panel, ending in stores to ``e.tile``.

        For a single row ``panel`` may be a tuple of several, whose columns follow each other in the tile (`beside`).
        """

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        """Emit what is done once per item, before its panels."""

    def activation_offset(self, problem: LinearProblem) -> int:
        """What the micro-kernel's activations exceed the true codes by."""
        return 128 if problem.activation.bits else 0

    def integers(self, fmt: Format) -> IntFormat | None:
        """The integer format that ``fmt`` is, or None if its codes are no integers with scales."""
        return integer_format(fmt)

    def levels(
        self, problem: LinearProblem, config: dict[str, Any], weight: Quantized
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scales of groups ``(G, N)`` as they are stored, and float32 factors per column ``(N,)``."""
        stored, column = group_scales(problem.weight, weight, config["scales"])
        return stored[0], column

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        """A reason of the family's own not to take the problem, or an empty string."""
        return ""

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        fmt = problem.weight
        if target.kind != self.kind:
            return Support(False, f"{self.name} needs an {self.kind} target, not {target.kind}")
        if self.integers(fmt) is None:
            return Support(False, f"{self.name} does not take {fmt} weights")
        if reason := self.refuse(problem, target):
            return Support(False, reason)
        return Support(True)

    @abstractmethod
    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        """Multiply-adds per cycle of the inner loop, and cycles to unpack one register of codes, once per tile.

        Both as measured on Zen 4 with all operands in cache.
        """

    def panels_per_item(self) -> int:
        """Panels an item covers: more than one if the prologue is worth sharing."""
        return 1

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        lanes = self.lanes(target)
        shapes = self.tiles(problem, target)
        padded = {shape: -(-problem.n // (lanes * shape[1])) * shape[1] for shape in shapes}
        ordered = sorted(shapes, key=lambda shape: (padded[shape] > 1.1 * min(padded.values()), shapes.index(shape)))
        kinds = ("float16", "float32") if problem.weight.group else ("float32",)
        shared = {"panels": self.panels_per_item(), "block_rows": 256, "lanes": lanes}
        several = {nr: usable(self.streams, problem, -(-problem.n // (lanes * nr))) for _, nr in shapes}
        return [
            {"mr": mr, "vectors": nr, "scales": kind, "streams": streams, **shared}
            for kind in kinds
            for wanted in self.streams
            for mr, nr in ordered
            for streams in several[nr]
            if streams == wanted
        ]

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """The slower of arithmetic and reading the weights, plus waking the threads."""
        panels = self.panels(problem, config)
        threads = max(1, problem.threads)
        columns, tiles = panels.count * panels.width, -(-m // config["mr"])
        depth = panels.groups * panels.rows_per_group * panels.step
        rate, cycles = self.speed(problem, target)
        multiply = m * columns * depth / rate
        unpack = tiles * columns * depth / (panels.lanes * panels.depth) * cycles
        span = min(config["panels"], panels.count)
        if threads > 1:
            span = max(min(tiles * panels.count // (ITEMS_PER_THREAD * threads), span), 1)
        items = tiles * -(-panels.count // span)
        balance = -(-items // threads) / max(items, 1)
        stored = columns * depth * panels.bits / 8 + (4 * columns * panels.groups if panels.fmt.group else 0)
        return max((multiply + unpack) * balance / CLOCK, stored / BANDWIDTH) + (2e-6 if threads > 1 else 0)

    # Packing

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        panels = self.panels(problem, config)
        unit = self.unit(panels)
        packed = {"weight": panels.pack_codes(weight)}
        stored: np.ndarray | float = 1
        if not panels.fmt.group:
            column = np.broadcast_to(weight.scale[0].astype(np.float32), problem.n)
        else:
            stored, column = self.levels(problem, config, weight)
            packed["group_scale"] = panels.by_panel(stored)
            stored = stored.astype(np.float64)
        if not panels.fmt.symmetric:
            packed["zero"] = panels.by_panel(panels.zeros(weight))
        if offset := self.activation_offset(problem):
            starts = range(0, problem.k, panels.group)
            total = -offset * unit * (np.add.reduceat(panels.integers(weight), starts, axis=0) * stored).sum(0)
            packed["start"] = panels.columns(total).astype(np.float32 if self.tile_is_float(panels) else np.int32)
        packed["scale"] = panels.columns(column / np.float32(unit))
        return packed

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        signed = panels.fmt.symmetric and panels.bias == 0
        bias = 1 << (panels.bits - 1) if signed else panels.bias
        return StoredCodes(panels.layout, panels.source(), panels.fmt.group, self.unit(panels), bias, signed)

    def tile_is_float(self, panels: Panels) -> bool:
        """Whether a tile holds float32: group scales are applied before groups are added."""
        return bool(panels.fmt.group) or self.float_tile

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Panels) -> list[v.Param]:
        """The parameters of the PrimFunc in the order of `LinearKernel`."""
        k = problem.k
        padded = panels.count * panels.width
        if problem.activation.bits:
            params = [v.Param("x", ("m", k), "uint8"), v.Param("x_scale", ("m",))]
        else:
            params = [v.Param("x", ("m", k))]
        params.append(
            v.Param("weight", (panels.count, panels.groups * panels.rows_per_group, panels.row_bytes), "uint8")
        )
        if panels.fmt.group:
            params.append(v.Param("group_scale", (panels.count, panels.groups, panels.width), config["scales"]))
        if not panels.fmt.symmetric:
            params.append(v.Param("zero", (panels.count, panels.groups, panels.width), "uint8"))
        if self.activation_offset(problem):
            params.append(v.Param("start", (padded,), "float32" if self.tile_is_float(panels) else "int32"))
        return [*params, *tail_params(problem, padded)]

    # Code

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        with v.kernel(name, self.operands(problem, config)) as (builder, names):
            self.emit(problem, config, names, opaque(T.cast(names["m"], "int32")))
        return builder.get()

    def operands(self, problem: LinearProblem, config: dict[str, Any]) -> list[v.Param]:
        """The parameters of the PrimFunc."""
        return self.params(problem, config, self.panels(problem, config))

    def emit(self, problem: LinearProblem, config: dict[str, Any], names: dict[str, Any], m: Any) -> None:
        """Write the code for ``m`` rows and operands called ``names``."""
        panels = self.panels(problem, config)
        if config.get("streams", 1) == 1:
            self._tiles(problem, config, panels, names, m)
            return
        with T.If(m == 1):
            with T.Then():
                self._single_row(problem, config, panels, names, m)
            with T.Else():
                self._tiles(problem, config, panels, names, m)

    def _tiles(self, problem: LinearProblem, config: dict[str, Any], panels: Panels, names: dict, m: Any) -> None:
        """Any number of rows, by tiles and panels."""
        mr = config["mr"]
        span = min(config["panels"], panels.count)
        block = max(1, config["block_rows"] // mr)
        tiles = v.let(T.truncdiv(m + (mr - 1), mr))
        runs = -(-panels.count // span)
        if span > 1 and problem.threads > 1:
            # Few rows: shorter runs of panels, so that every thread gets some.
            fair = opaque(T.truncdiv(tiles * panels.count, ITEMS_PER_THREAD * problem.threads))
            span = opaque(T.max(T.min(fair, span), 1))
            runs = opaque(T.truncdiv(span + (panels.count - 1), span))
        height = v.let(T.truncdiv(m, T.max(tiles, 1)))
        taller = v.let(m - height * tiles)
        items = tiles * runs
        with T.serial(items) if problem.threads == 1 else T.parallel(items) as item:
            sweep = v.let(T.truncdiv(item, runs * block))
            inside = v.let(item - sweep * (runs * block))
            here = v.let(T.min(tiles - sweep * block, block))
            run = opaque(T.truncdiv(inside, here))
            index = v.let(sweep * block + inside - run * here)
            first = opaque(index * height + T.min(index, taller))
            rows = opaque(height + T.cast(index < taller, "int32"))
            e = self._emission(problem, config, panels, names, m)
            self.prologue(e, first, rows)
            if isinstance(span, int) and span == 1:
                self._panel(e, run, first, rows)
            else:
                with T.serial(run * span, T.min((run + 1) * span, panels.count)) as panel:
                    self._panel(e, panel, first, rows)

    def _single_row(self, problem: LinearProblem, config: dict[str, Any], panels: Panels, names: dict, m: Any) -> None:
        """One row, by several panels at a time, which lie as far apart as they can: each is read on where it was left."""
        p, streams = panels, config["streams"]
        share = {"prefetch": config["prefetch"] // streams} if "prefetch" in config else {}
        span = -(-p.count // (ITEMS_PER_THREAD * problem.threads if problem.threads > 1 else 1))
        runs, first = -(-p.count // span), T.int32(0)
        with T.serial(runs) if problem.threads == 1 else T.parallel(runs) as run:
            e = self._emission(problem, {**config, "mr": 1, **share}, p, names, m, streams)
            self.prologue(e, first, T.int32(1))
            begin, end = v.let(run * span), v.let(T.min((run + 1) * span, p.count))
            apart = v.let(T.truncdiv(end - begin, streams))
            with T.serial(begin, begin + apart) as panel:
                self.micro(e, tuple(v.let(panel + i * apart) for i in range(streams)), first, 1)
                with T.serial(streams) as i:
                    finish(problem, names, e.tile, p, p.lanes, panel + i * apart, first, 1, i * p.width)
            with T.serial(begin + streams * apart, end) as panel:
                self.micro(e, panel, first, 1)
                finish(problem, names, e.tile, p, p.lanes, panel, first, 1)

    def _emission(
        self, problem: LinearProblem, config: dict[str, Any], panels: Panels, names: dict, m: Any, streams: int = 1
    ) -> Emission:
        dtype = "float32" if self.tile_is_float(panels) else "int32"
        tile = B.alloc_buffer((config["mr"], streams * panels.width), dtype, annotations=ON_STACK)
        return Emission(problem, panels, config, names, m, tile)

    def load_row(self, e: Emission, panel: Any, row: Any) -> list[list[Any]]:
        """Load one panel row as 32-bit lanes: ``[vector][plane]``, one plane unless the bits of a code are split."""
        p = e.panels
        planes = p.bits if p.planes else 1
        size = p.row_bytes // planes // p.vectors
        raw = []
        for each, vec in itertools.product(beside(panel), range(p.vectors)):
            at = [(plane * p.vectors + vec) * size for plane in range(planes)]
            loads = [v.load(e.names["weight"], [each, row, offset], size) for offset in at]
            raw.append([v.let(v.bits_of(load, "int32", size // 4)) for load in loads])
        return raw

    def zero_codes(self, e: Emission, panel: Any, group: Any) -> list[Any]:
        """Zero points of a group in int32 lanes, by vector."""
        p = e.panels
        loads = [v.load(e.names["zero"], [each, group, at], p.lanes) for each, at in vectors(p, panel)]
        return [v.let(v.cast(load, "int32", p.lanes)) for load in loads]

    def scale_vectors(self, e: Emission, panel: Any, group: Any) -> list[Any]:
        """Scales of a group, float32, by vector."""
        p = e.panels
        loads = [v.load(e.names["group_scale"], [each, group, at], p.lanes) for each, at in vectors(p, panel)]
        return [v.let(v.cast(load, "float32", p.lanes)) for load in loads]

    def by_group(self, e: Emission, panel: Any, dtype: str, rows: int, reduce: Callable[[Any, Tile], None]) -> None:
        """Emit ``tile = start + sum_g scale[g] * reduce(g)``, or without scales if there is one group per column.

        ``reduce(group, sums)`` adds one group into registers of ``dtype``.
        """
        p = e.panels
        at = [each * p.width + start for each, start in vectors(p, panel)]
        places = [(r, vec) for r in range(rows) for vec in range(len(at))]
        sums = [[Register(dtype, p.lanes) for _ in at] for _ in range(rows)]
        kind = "float32" if p.fmt.group else dtype
        if "start" in e.names:
            start = [v.let(v.load(e.names["start"], [n], p.lanes)) for n in at]
        else:
            start = [v.const(0, p.lanes, kind)] * len(at)
        if not p.fmt.group:
            for r, vec in places:
                sums[r][vec].set(start[vec])
            reduce(T.int32(0), sums)
            for r, vec in places:
                v.store(e.tile, [r, vec * p.lanes], sums[r][vec].get(), p.lanes)
            return
        for r, vec in places:
            v.store(e.tile, [r, vec * p.lanes], start[vec], p.lanes)
        with T.serial(p.groups) as group:
            for r, vec in places:
                sums[r][vec].set(v.const(0, p.lanes, dtype))
            reduce(group, sums)
            for vec, scale in enumerate(self.scale_vectors(e, panel, group)):
                for r in range(rows):
                    so_far = v.load(e.tile, [r, vec * p.lanes], p.lanes)
                    value = sums[r][vec].get()
                    value = value if dtype == "float32" else v.cast(value, "float32", p.lanes)
                    v.store(e.tile, [r, vec * p.lanes], vmath.fma(value, scale, so_far), p.lanes)

    def _panel(self, e: Emission, panel: Any, first: Any, rows: Any) -> None:
        for height in range(e.config["mr"], 0, -1):
            with T.If(rows == height), T.Then():
                self.micro(e, panel, first, height)
        finish(e.problem, e.names, e.tile, e.panels, e.panels.lanes, panel, first, rows)


def usable(streams: Sequence[int], problem: LinearProblem, panels: int) -> list[int]:
    """Those of ``streams`` that leave every thread several times as many ``panels``; just 1 if there never is a single row."""
    if problem.m is not None and problem.m > 1:
        return [1]
    return [n for n in streams if n == 1 or panels >= 4 * n * max(problem.threads, 1)]
