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

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, Support
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.gemm import ON_STACK, Register, finish, opaque
from qcompile.codegen.kernels.cpu.lut import PAIR, PlanePanels, PlaneSum, group_scales, plane_sum
from qcompile.codegen.kernels.x86.dot import MADDUBS, MADDWD
from qcompile.codegen.kernels.x86.lut_tables import BYTES, TableBuffers
from qcompile.formats import Quantized
from qcompile.targets.target import Target

PSHUFB = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}

CACHE = 256 << 10
"""Bytes the tables of a block of rows may take."""


@dataclass
class LutEmission:
    """What a micro-kernel needs while its PrimFunc is written."""

    problem: LinearProblem
    panels: PlanePanels
    config: dict[str, Any]
    names: dict[str, Any]
    m: Any
    tables: TableBuffers
    tile: Any = None
    sums: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def rolled(self, count: Any) -> Any:
        """``count`` as a loop bound LLVM cannot limit from above, so that it keeps the loop."""
        return T.max(count, count - self.m)


class LutGemm(LinearKernel):
    """``vpshufb`` on 256- or 512-bit registers.

    Config: ``bytes`` of a register, ``columns`` of a panel in registers of int32 lanes, ``rows`` of a tile, ``block_rows``
    whose tables are built together, ``prefetch`` bytes ahead, ``scales`` (``float16`` or ``float32``, of groups).
    """

    name = "x86-lut"

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        if target.kind != "x86":
            return Support(False, f"{self.name} needs an x86 target, not {target.kind}")
        if not target.has("avx2", "fma", "f16c"):
            return Support(False, f"{self.name} needs AVX2, FMA and F16C, which {target} does not have")
        if not problem.activation.bits:
            return Support(False, f"{self.name} looks integer activations up; this operator has float ones")
        planes = plane_sum(problem.weight)
        if planes is None:
            return Support(False, f"{self.name}: {problem.weight} codes are no sums of scaled bit planes")
        if planes.bits > 4:
            return Support(False, f"{self.name}: {planes.bits} planes are slower than byte products")
        if problem.k * 128 * 15 >= 1 << 31:
            return Support(False, f"{self.name}: {problem.k} products may overflow an int32 accumulator")
        return Support(True)

    # Geometry

    def planes(self, problem: LinearProblem) -> PlaneSum:
        """The planes of the weight format."""
        planes = plane_sum(problem.weight)
        assert planes is not None
        return planes

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> PlanePanels:
        """Geometry of the packed weights."""
        planes = self.planes(problem)
        adjacent = planes.uniform and planes.bits in (2, 4)
        return PlanePanels(problem.k, problem.n, planes, config["columns"], adjacent)

    def grouped(self, panels: PlanePanels) -> bool:
        """Whether groups are added up in float32; otherwise all of K in int32."""
        planes = panels.planes
        return bool(planes.group) or not planes.uniform or planes.offset != "constant"

    def pairs_per_chunk(self, problem: LinearProblem, panels: PlanePanels) -> int:
        """Pairs whose sums fit in 16 bits, signed where multiply-add reads them again."""
        largest = 128 if problem.activation.granularity == "tensor" else 127
        bits, top = panels.planes.bits, 65535
        weight = (3 if bits == 2 else 3) if panels.adjacent else 1
        if panels.adjacent and bits == 4:
            top = 32767
        return min(panels.pairs_per_group, top // (PAIR * largest * weight))

    # Packing

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        panels = self.panels(problem, config)
        packed = {"weight": panels.pack_codes(weight)}
        if not self.grouped(panels):
            return {**packed, "scale": panels.columns(weight.scale[0].astype(np.float32))}
        scale, column = group_scales(problem.weight, weight, config["scales"])
        packed["group_scale"] = panels.by_panel(scale)
        if panels.planes.offset == "zero":
            assert weight.zero_point is not None
            packed["zero"] = panels.by_panel(weight.zero_point.astype(np.uint8))
        if panels.planes.offset == "free":
            packed["offset"] = panels.by_panel((weight.aux["offset"] / column).astype(config["scales"]))
        return {**packed, "scale": panels.columns(column)}

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: PlanePanels) -> list[v.Param]:
        """The parameters of the PrimFunc in the order of `LinearKernel`."""
        groups = (panels.count, panels.groups)
        planes = 1 if panels.planes.uniform else panels.planes.bits
        params = [v.Param("x", ("m", problem.k), "uint8"), v.Param("x_scale", ("m",))]
        params.append(v.Param("weight", (panels.count, panels.pairs, panels.pair_bytes), "uint8"))
        if self.grouped(panels):
            params.append(v.Param("group_scale", (*groups, planes, panels.width), config["scales"]))
            if panels.planes.offset == "zero":
                params.append(v.Param("zero", (*groups, panels.width), "uint8"))
            if panels.planes.offset == "free":
                params.append(v.Param("offset", (*groups, panels.width), config["scales"]))
        params.append(v.Param("scale", (panels.count * panels.width,)))
        if problem.epilogue.bias:
            params.append(v.Param("bias", (problem.n,)))
        if problem.epilogue.residual:
            params.append(v.Param("residual", ("m", problem.n)))
        return [*params, v.Param("out", ("m", problem.n), output=True)]

    # Configs and cost

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        size = 64 if target.has("avx512") else 32
        planes = self.planes(problem)
        per_vector = size // planes.bits if planes.uniform and planes.bits in (2, 4) else size
        widths = sorted({per_vector * count for count in (1, 2, 4, 8) if 16 <= per_vector * count <= 128})
        padded = {width: -(-problem.n // width) * width for width in widths}
        order = sorted(widths, key=lambda w: (padded[w] > 1.1 * min(padded.values()), abs(w - 64), w))
        table = -(-problem.k // PAIR) * BYTES
        block = max(4, min(16, CACHE // table // 4 * 4))
        kinds = ("float16", "float32") if self.grouped(self.panels(problem, {"columns": 64})) else ("float32",)
        return [
            {"bytes": size, "columns": width, "rows": rows, "block_rows": block, "prefetch": ahead, "scales": kind}
            for kind in kinds
            for width in order
            for ahead in (2048, 1024, 4096, 0)
            for rows in (4, 2)
        ]

    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        raise NotImplementedError

    # Code

    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        panels = self.panels(problem, config)
        block, high = config["block_rows"], config["rows"]
        with v.kernel(name, self.params(problem, config, panels)) as (builder, names):
            m = opaque(T.cast(names["m"], "int32"))
            buffers = TableBuffers(panels, self.pairs_per_chunk(problem, panels), block)
            with T.serial(T.truncdiv(m + (block - 1), block)) as index:
                start = v.let(index * block)
                here = v.let(T.min(m - start, block))
                with T.serial(here) if problem.threads == 1 else T.parallel(here) as row:
                    buffers.build(names["x"], start + row, row)
                with T.serial(panels.count) if problem.threads == 1 else T.parallel(panels.count) as panel:
                    dtype = "float32" if self.grouped(panels) else "int32"
                    tile = B.alloc_buffer((high, panels.width), dtype, annotations=ON_STACK)
                    e = LutEmission(problem, panels, config, names, m, buffers, tile)
                    if buffers.chunks_per_group > 1 and self.grouped(panels):
                        kept = 1 if panels.adjacent else panels.planes.bits
                        e.sums = B.alloc_buffer((high, kept, panels.width), "int32", annotations=ON_STACK)
                    tiles = v.let(T.truncdiv(here + (high - 1), high))
                    height = v.let(T.truncdiv(here, tiles))
                    taller = v.let(here - height * tiles)
                    with T.serial(tiles) as t:
                        first = opaque(t * height + T.min(t, taller))
                        rows = opaque(height + T.cast(t < taller, "int32"))
                        for count in range(high, 0, -1):
                            with T.If(rows == count), T.Then():
                                self.micro(e, panel, first, count)
                        finish(problem, names, tile, panels, BYTES // 4, panel, start + first, rows)
        return builder.get()

    def micro(self, e: LutEmission, panel: Any, first: Any, rows: int) -> None:
        """Emit the product of ``rows`` rows of the block from ``first`` on with one panel, into ``e.tile``."""
        size, p = e.config["bytes"], e.panels
        columns = size // p.planes.bits if p.adjacent else size  # of one block of vectors that belong together
        together = max(1, (8 if p.adjacent else 4 // p.planes.bits) // rows)
        blocks = p.width // columns
        start = 0
        while start < blocks:
            count = min(together, blocks - start)
            self._columns(e, panel, first, rows, start, count)
            start += count

    def _columns(self, e: LutEmission, panel: Any, first: Any, rows: int, start: int, count: int) -> None:
        """The part of a micro-kernel that keeps its 16-bit sums in registers: ``count`` column blocks from ``start``."""
        p, t, lanes = e.panels, e.tables, BYTES // 4
        size = e.config["bytes"]
        columns = size // p.planes.bits if p.adjacent else size
        span = range(start * columns, (start + count) * columns, lanes)
        for r in range(rows):
            for column in span:
                zero = v.const(0, lanes, str(e.tile.dtype))
                v.store(e.tile, [r, column], zero, lanes)
        accumulators = self._accumulators(e, rows, count)
        flat = [register for row in accumulators for block in row for plane in block for register in plane]
        with T.serial(p.groups) as group:
            if e.sums is not None:
                for r in range(rows):
                    for plane in range(int(e.sums.shape[1])):
                        for column in span:
                            v.store(e.sums, [r, plane, column], v.const(0, lanes, "int32"), lanes)
            with T.serial(t.chunks_per_group) as piece:
                begin = v.let(piece * t.pairs_per_chunk)
                chunk = v.let(group * t.chunks_per_group + piece)
                for register in flat:
                    register.set(v.const(0, size // 2, "int16"))
                left = T.min(p.pairs_per_group - begin, t.pairs_per_chunk)
                bound = t.pairs_per_chunk if p.pairs_per_group % t.pairs_per_chunk == 0 else left
                with T.serial(e.rolled(bound)) as i:
                    pair = v.let(group * p.pairs_per_group + begin + i)
                    self._prefetch(e, panel, pair, start, count, rows)
                    self._look_up(e, panel, pair, start, accumulators, [(t.tables, first + r, pair) for r in range(rows)])
                for r in range(rows):
                    low, high = v.let(t.begin[first + r, chunk]), v.let(t.begin[first + r, chunk + 1])
                    with T.serial(low, high) as entry:
                        pair = v.let(t.pair[first + r, entry])
                        self._look_up(e, panel, pair, start, [accumulators[r]], [(t.extra, first + r, entry)])
                if t.chunks_per_group > 1:
                    self._keep(e, accumulators, start, count)
            for r in range(rows):
                self._add_group(e, panel, first, group, r, accumulators[r], start, count)

    def _accumulators(self, e: LutEmission, rows: int, count: int) -> list[list[list[list[Register]]]]:
        """Registers of 16-bit sums by row, column block, plane and half."""
        half = e.config["bytes"] // 2
        planes, halves = (1, 1) if e.panels.adjacent else (e.panels.planes.bits, 2)
        return [
            [[[Register("int16", half) for _ in range(halves)] for _ in range(planes)] for _ in range(count)]
            for _ in range(rows)
        ]

    def _prefetch(self, e: LutEmission, panel: Any, pair: Any, start: int, count: int, rows: int) -> None:
        ahead = e.config["prefetch"]
        if not ahead or rows > 1:
            return
        per_block = e.panels.pair_bytes * e.config["bytes"] // (e.panels.width * (e.panels.planes.bits if False else 1))
        for offset in range(0, e.panels.pair_bytes, 64):
            address = T.address_of(e.names["weight"][panel, pair, offset + ahead])
            hint = (T.int32(0), T.int32(3), T.int32(1))
            T.evaluate(T.call_intrin("void", "tirx.prefetch", address, *hint))

    def _look_up(self, e: LutEmission, panel: Any, pair: Any, start: int, accumulators: Any, tables: Any) -> None:
        """Add the entries at the nibbles of one pair to the accumulators of each row."""
        p, size = e.panels, e.config["bytes"]
        blocks = len(accumulators[0])
        nibbles = []
        for block in range(start, start + blocks):
            planes = []
            for plane in range(1 if p.adjacent else p.planes.bits):
                at = block * size if p.adjacent else plane * p.width + block * size
                raw = v.let(v.load(e.names["weight"], [panel, pair, at], size))
                low = v.let(T.bitwise_and(raw, v.const(15, size, "uint8")))
                high = v.let(T.shift_right(raw, v.const(4, size, "uint8")))
                planes.append((v.bits_of(low, "int8", size), v.bits_of(high, "int8", size)))
            nibbles.append(planes)
        for row, (buffer, at, index) in zip(accumulators, tables):
            halves = [v.let(self._table(buffer, at, index, half, size)) for half in (0, 1)]
            for block, planes in zip(row, nibbles):
                for registers, (low, high) in zip(block, planes):
                    found = [
                        v.let(T.call_llvm_pure_intrin(f"int8x{size}", PSHUFB[size], table, index))
                        for table, index in zip(halves, (low, high))
                    ]
                    if p.adjacent:
                        (register,) = registers
                        a, b = (self._merge(value, (1, 2), size) for value in found)
                        register.set(register.get() + a + b)
                    else:
                        for register, upper in zip(registers, (0, 1)):
                            mixed = T.Shuffle(found, _interleave(size, upper))
                            register.set(register.get() + self._merge(mixed, (1, 1), size))

    @staticmethod
    def _table(buffer: Any, row: Any, index: Any, half: int, size: int) -> Any:
        """One table of 16 bytes in every 128-bit lane."""
        table = v.bits_of(v.load(buffer, [row, index, 16 * half], 16), "int8", 16)
        return T.Shuffle([table] * (size // 16), list(range(size)))

    @staticmethod
    def _merge(value: Any, weights: tuple[int, int], size: int) -> Any:
        """Unsigned bytes times ``weights``, added in pairs to 16 bits."""
        factors = v.bits_of(v.const(weights[0] + (weights[1] << 8), size // 2, "int16"), "int8", size)
        return T.call_llvm_pure_intrin(f"int16x{size // 2}", MADDUBS[size // 4], value, factors)

    def _values(self, e: LutEmission, block: list[list[Register]], plane: int) -> list[Any]:
        """The 16-bit sums of a plane (of all, if adjacent) of one column block as int32x8, in column order."""
        size, lanes = e.config["bytes"], BYTES // 4
        if e.panels.adjacent and e.panels.planes.bits == 4:
            (register,) = block[0]
            factors = v.bits_of(v.const(1 + (4 << 16), size // 4, "int32"), "int16", size // 2)
            wide = v.let(
                T.call_llvm_pure_intrin(f"int32x{size // 4}", MADDWD[size // 4], register.get(), factors)
            )
            return [v.let(v.shuffle(wide, range(i, i + lanes))) for i in range(0, size // 4, lanes)]
        halves = block[plane]
        values = []
        for i in range(size // 2 // lanes):
            for register in halves:
                part = v.shuffle(register.get(), range(i * lanes, (i + 1) * lanes))
                values.append(v.let(v.cast(v.bits_of(part, "uint16", lanes), "int32", lanes)))
        return values

    def _keep(self, e: LutEmission, accumulators: Any, start: int, count: int) -> None:
        """Add a chunk to the sums of its group, where a group is several chunks."""
        target = e.tile if e.sums is None else e.sums
        size, lanes = e.config["bytes"], BYTES // 4
        columns = size // e.panels.planes.bits if e.panels.adjacent else size
        for r, row in enumerate(accumulators):
            for i, block in enumerate(row):
                for plane in range(len(block)):
                    for j, value in enumerate(self._values(e, block, plane)):
                        column = (start + i) * columns + j * lanes
                        if e.sums is None:
                            moved = T.shift_left(value, v.const(plane, lanes, "int32")) if plane else value
                            at = [r, column]
                        else:
                            moved, at = value, [r, plane, column]
                        v.store(target, at, v.load(target, at, lanes) + moved, lanes)

    def _add_group(
        self, e: LutEmission, panel: Any, first: Any, group: Any, r: int, row: Any, start: int, count: int
    ) -> None:
        """Add a group of one row to its tile: scales and offsets."""
        p, planes, t = e.panels, e.panels.planes, e.tables
        size, lanes = e.config["bytes"], BYTES // 4
        columns = size // planes.bits if p.adjacent else size
        negative, total = v.let(t.negative[first + r, group]), v.let(t.total[first + r, group])
        whole = (1 << planes.bits) - 1
        base = v.let(whole * negative - planes.bias * total if planes.offset == "constant" else whole * negative)
        for i, block in enumerate(row):
            at = (start + i) * columns
            sums = [
                self._values(e, block, plane)
                if t.chunks_per_group == 1
                else [v.let(v.load(e.sums, [r, plane, c], lanes)) for c in range(at, at + columns, lanes)]
                if e.sums is not None
                else []
                for plane in range(len(block))
            ]
            for j in range(columns // lanes):
                column = at + j * lanes
                so_far = v.load(e.tile, [r, column], lanes)
                if not self.grouped(p):
                    value = so_far + v.splat(base, lanes)
                    for plane, values in enumerate(sums):
                        if values:
                            value = value + T.shift_left(values[j], v.const(plane, lanes, "int32"))
                    v.store(e.tile, [r, column], value, lanes)
                    continue
                value = v.let(so_far)
                if planes.uniform:
                    merged = sums[0][j]
                    for plane, values in enumerate(sums[1:], 1):
                        merged = merged + T.shift_left(values[j], v.const(plane, lanes, "int32"))
                    real = v.let(v.cast(merged + v.splat(base, lanes), "float32", lanes))
                    if planes.offset == "zero":
                        zero = v.cast(v.load(e.names["zero"], [panel, group, column], lanes), "int32", lanes)
                        factor = v.splat(T.cast(-total, "float32"), lanes)
                        real = v.let(vmath.fma(v.cast(zero, "float32", lanes), factor, real))
                    value = v.let(vmath.fma(real, self._scale(e, "group_scale", [panel, group, 0, column]), value))
                else:
                    for plane, values in enumerate(sums):
                        real = v.cast(values[j] + v.splat(negative, lanes), "float32", lanes)
                        scale = self._scale(e, "group_scale", [panel, group, plane, column])
                        value = v.let(vmath.fma(real, scale, value))
                if planes.offset == "free":
                    factor = v.splat(T.cast(total, "float32"), lanes)
                    value = v.let(vmath.fma(factor, self._scale(e, "offset", [panel, group, column]), value))
                v.store(e.tile, [r, column], value, lanes)

    @staticmethod
    def _scale(e: LutEmission, name: str, at: list[Any]) -> Any:
        lanes = BYTES // 4
        return v.cast(v.load(e.names[name], at, lanes), "float32", lanes)


def _interleave(size: int, upper: int) -> list[int]:
    """The pattern of ``punpcklbw`` (``punpckhbw``): bytes of two registers in turns, within 128-bit lanes."""
    pattern = []
    for lane in range(0, size, 16):
        for i in range(8 * upper, 8 * upper + 8):
            pattern += [lane + i, size + lane + i]
    return pattern
