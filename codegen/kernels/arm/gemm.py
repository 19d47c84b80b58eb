"""Integer GEMM for ARM: unsigned codes times signed activations, and zero points taken off per group.

    sum_k (u[k, n] - z[g, n]) a[k]  =  sum_k u[k, n] a[k]  -  z[g, n] sum_{k in g} a[k]

An unsigned field of a byte needs no sign extension: one AND or one shift unpacks 16 codes. The sums of activations per group
are taken once per item, which covers several panels. Codes of 8 bits are taken less 128, so that all factors are signed bytes;
symmetric codes of 4 bits keep their signs (`ArmGemm.keeps_signs`). The integers of a group are those of the x86 kernels, and
so are the float operations on them.

A register of weights holds 4 columns x 4 consecutive k; the activations of 16 consecutive k fill one register, and an
instruction takes 4 of them by index. `integers` has the families: SDOT, or 16-bit multiply-adds; `mmla` the one for SMMLA.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.activations import load_words, over_rows
from qcompile.codegen.kernels.arm.panels import UnsignedPanels
from qcompile.codegen.kernels.arm.products import (
    BYTES,
    LANES,
    Accumulator,
    Word,
    repeated,
    schedule_barrier,
    signed,
)
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import ON_STACK, Emission, Register
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.lut import group_scales
from qcompile.codegen.kernels.cpu.panels import Panels, integer_format, largest
from qcompile.codegen.kernels.cpu.refusals import float_activations
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.targets.target import Target

STACK_BYTES = 16 << 10
"""Sums of activations up to this size live on the stack."""

HELD_BYTES = 8 * BYTES
"""Activations of a tile that stay in registers beside its sums."""


class ArmGemm(TiledGemm):
    """What the integer families share. A subclass gives the dot product and the register tiles."""

    kind = "arm"
    depth = 4
    wide = True
    """Whether accumulators have room for codes multiplied by powers of two."""

    def lanes(self, target: Target) -> int:
        return LANES

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Features of the processor."""

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has(*self.needs):
            missing = ", ".join(sorted(set(self.needs) - target.features))
            return f"{self.name} needs {missing}, which {target} does not have"
        if reason := float_activations(self.name, problem):
            return reason
        longest = min(problem.weight.group or problem.k, problem.k)
        fmt = self.integers(problem.weight)
        if fmt is not None and longest * 255 * largest(fmt) * (16 if self.keeps_signs(fmt) else 1) >= 1 << 31:
            return f"{self.name}: {longest} products of 8-bit numbers may overflow an int32 accumulator"
        return ""

    def integers(self, fmt: Format) -> IntFormat | None:
        return integer_format(fmt)

    def levels(
        self, problem: LinearProblem, config: dict[str, Any], weight: Quantized
    ) -> tuple[np.ndarray, np.ndarray]:
        stored, column = group_scales(problem.weight, weight, config["scales"])
        return stored[0], column

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> UnsignedPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return UnsignedPanels(
            problem.k,
            problem.n,
            fmt,
            config["lanes"],
            config["vectors"],
            depth=self.depth,
            twos_complement=self.keeps_signs(fmt),
        )

    def keeps_signs(self, fmt: IntFormat) -> bool:
        """Whether codes are multiplied as signed numbers, at the top of their bytes: 16 times a code of 4 bits.

        So no sum of activations has to be taken off, and an AND or a shift still unpacks 16 codes.
        """
        return self.wide and fmt.symmetric and fmt.bits == 4

    def unit(self, panels: Panels) -> int:
        return 16 if panels.twos_complement else 1

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def panels_per_item(self) -> int:
        return 4

    # Sums of activations

    def needs_sums(self, panels: UnsignedPanels) -> bool:
        """Whether something times the sum of the activations belongs to a group."""
        return not panels.fmt.symmetric or bool(panels.bias)

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        p = e.panels
        if not self.needs_sums(p):
            return
        shape = (e.config["mr"], p.groups)
        small = 4 * shape[0] * shape[1] <= STACK_BYTES
        sums = e.extra["sums"] = B.alloc_buffer(shape, "int32", annotations=ON_STACK if small else {})
        with T.serial(rows) as row:
            at = v.let(first + row)
            with T.serial(p.groups) as group:
                begin = v.let(group * p.group)
                length = v.let(T.min(p.k - begin, p.group))
                total = Register("int32", LANES)
                total.set(v.const(0, LANES, "int32"))
                full = v.let(T.truncdiv(length, BYTES))
                with T.serial(full) as i:
                    total.set(self.add_bytes(total.get(), signed(v.load(e.names["x"], [at, begin + i * BYTES], BYTES))))
                rest = Register("int32", 1)
                rest.set(v.reduce_lanes(v.let(total.get()), LANES, v.add))
                if p.group % BYTES or p.k % BYTES:
                    with T.serial(length - full * BYTES) as i:
                        rest.set(rest.get() + (T.cast(e.names["x"][at, begin + full * BYTES + i], "int32") - 128))
                v.store(sums, [row, group], rest.get(), 1)

    @abstractmethod
    def add_bytes(self, total: Any, x: Any) -> Any:
        """``total`` (int32 lanes) plus 16 bytes, each in some lane."""

    # Micro-kernel

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        """``tile = sum_g scale[g] (sum_k u a - z[g] sum_k a)``, without scales if there is one group."""
        p = e.panels
        kind = "float32" if p.fmt.group else "int32"
        quads = p.width // LANES
        tile = [[Register(kind, LANES) for _ in range(quads)] for _ in range(rows)]
        places = [(r, vec) for r in range(rows) for vec in range(quads)]
        for r, vec in places:
            tile[r][vec].set(v.const(0, LANES, kind))
        if p.fmt.group:
            with T.serial(p.groups) as group:
                held = self.group_operands(e, first, rows, group) if self.holds_operands(e, rows) else None
                for some in [range(quads)] if held is None else [range(quad, quad + 1) for quad in range(quads)]:
                    sums = self.group_sums(e, panel, first, rows, group, some, held)
                    for vec, scale in zip(some, self.scale_vectors(e, panel, group, some)):
                        for r in range(rows):
                            value = v.cast(sums[r][vec - some[0]], "float32", LANES)
                            tile[r][vec].set(vmath.fma(value, scale, tile[r][vec].get()))
                    if held is not None:
                        for line in tile:
                            schedule_barrier(line[some[-1]].get())
        else:
            sums = self.group_sums(e, panel, first, rows, T.int32(0), range(quads))
            for r, vec in places:
                tile[r][vec].set(tile[r][vec].get() + sums[r][vec])
        for r, vec in places:
            v.store(e.tile, [r, vec * LANES], tile[r][vec].get(), LANES)

    def holds_operands(self, e: Emission, rows: int) -> bool:
        """Whether the activations of a group stay in registers while quads of columns are taken one after the other.

        Then the sums of the whole tile stay there too. With longer groups, or several accumulators of a sum, more columns
        share what is loaded.
        """
        p = e.panels
        if p.k % p.group or p.group % max(BYTES, p.step) or self.chunks_between_flushes(p):
            return False
        return rows > 1 and rows * p.group <= HELD_BYTES and len(self.parts(p, rows)) == 1

    def group_operands(self, e: Emission, first: Any, rows: int, group: Any) -> list[list[Any]]:
        """What the codes of a whole group are multiplied by, ``[position in the group][as in factors]``."""
        p = e.panels
        words = BYTES // p.depth
        starts = range(0, p.group, BYTES)
        loaded = [[load_words(e, first + r, group * p.group + at, words) for at in starts] for r in range(rows)]

        def indexed(r: int, at: int) -> Word:
            return Word(loaded[r][at // words], words, at % words, p.depth)

        return [self.factors(rows, indexed, at) for at in range(p.group // p.depth)]

    def factors(self, rows: int, activations: Callable[[int, int], Word], at: int) -> list[Any]:
        """What codes at position ``at`` are multiplied by, one register of bytes per row."""
        return [v.let(repeated(activations(r, at))) for r in range(rows)]

    def group_sums(
        self, e: Emission, panel: Any, first: Any, rows: int, group: Any, quads: range, held: Any = None
    ) -> list[list[Any]]:
        """Emit ``sum_k (u - z) a`` over one group, int32 ``[row][quad of columns]``."""
        p = e.panels
        nothing = v.const(0, LANES, "int32")
        if "sums" not in e.extra:
            return self.products(e, panel, first, group, [nothing] * rows, quads, held)
        totals = [v.let(v.load(e.extra["sums"], [r, group], 1)) for r in range(rows)]
        if p.fmt.symmetric:
            start = [v.let(v.splat(total * self.lowest(e), LANES)) for total in totals]
            return self.products(e, panel, first, group, start, quads, held)
        sums = self.products(e, panel, first, group, [nothing] * rows, quads, held)
        zeros = [v.let(zero - v.const(p.centre, LANES, "int32")) for zero in self.zero_codes(e, panel, group, quads)]
        splats = [v.let(v.splat(total, LANES)) for total in totals]
        return [[v.let(s - zero * splats[r]) for s, zero in zip(line, zeros)] for r, line in enumerate(sums)]

    def lowest(self, e: Emission) -> Any:
        """What the unsigned code 0 of a symmetric format stands for."""
        return -e.panels.bias

    def parts(self, panels: UnsignedPanels, rows: int) -> list[bits.Part]:
        """The accumulators of one column vector."""
        return bits.partial_sums(panels, rows, self.wide)

    def unpack(self, e: Emission, raw: list[Any], index: int, parts: list[bits.Part]) -> Iterator[tuple[int, Any]]:
        """What is multiplied at position ``index`` of every byte: (number of the accumulator, int8 vector)."""
        yield from bits.unpack(e.panels, raw, index, parts)

    @abstractmethod
    def accumulator(self, panels: UnsignedPanels, part: bits.Part, start: Any) -> Accumulator:
        """A new accumulator for one column vector of one row, starting from ``start``."""

    @abstractmethod
    def chunks_between_flushes(self, panels: UnsignedPanels) -> int:
        """Chunks of `over_rows` after which accumulators must be flushed; 0 if never."""

    def products(
        self,
        e: Emission,
        panel: Any,
        first: Any,
        group: Any,
        start: list[Any],
        quads: range,
        held: list[list[Any]] | None = None,
    ) -> list[list[Any]]:
        """Emit ``start[row] + sum_k u a`` over one group, int32 ``[row][quad of columns]``; ``held`` as of `group_operands`."""
        p = e.panels
        rows = len(start)
        parts = self.parts(p, rows)
        zero = v.const(0, LANES, "int32")
        begin = [[first if part == bits.PLAIN else zero for part in parts] for first in start]
        tile = [[[self.accumulator(p, part, at) for part, at in zip(parts, line)] for _ in quads] for line in begin]

        self.multiply(e, panel, first, rows, group, quads, parts, tile, held)
        rest = [zero if bits.PLAIN in parts else first for first in start]
        return [
            [v.let(bits.combine(parts, [part.total() for part in split], rest[r])) for split in line]
            for r, line in enumerate(tile)
        ]

    def multiply(
        self,
        e: Emission,
        panel: Any,
        first: Any,
        rows: int,
        group: Any,
        vectors: range,
        parts: list[bits.Part],
        tile: list[list[list[Accumulator]]],
        held: list[list[Any]] | None,
    ) -> None:
        """Emit the products of one group into ``tile``, ``[operand][vector of columns][part]``."""
        p = e.panels

        def body(line: Any, count: int, operands: Callable[[int], list[Any]]) -> None:
            for i in range(count):
                raw = self.load_weights(e, panel, line + i, vectors)
                for index in range(p.per_byte):
                    a = operands(i * p.per_byte + index)
                    for vec, registers in enumerate(raw):
                        for part, codes in self.unpack(e, registers, index, parts):
                            codes = v.let(codes)
                            for accumulators, operand in zip(tile, a, strict=True):
                                accumulators[vec][part].add(codes, operand)

        def chunk(line: Any, count: int, activations: Callable[[int, int], Word]) -> None:
            body(line, count, lambda at: self.factors(rows, activations, at))

        def flush() -> None:
            for line in tile:
                for accumulators in line:
                    for accumulator in accumulators:
                        accumulator.flush()

        if held is not None:
            body(v.let(group * p.rows_per_group), p.rows_per_group, held.__getitem__)
        else:
            over_rows(e, first, rows, group, chunk, flush, self.chunks_between_flushes(p))

    def zero_codes(self, e: Emission, panel: Any, group: Any, quads: range | None = None) -> list[Any]:
        return self._by_quad(e, "zero", panel, group, "int32", quads)

    def scale_vectors(self, e: Emission, panel: Any, group: Any, quads: range | None = None) -> list[Any]:
        return self._by_quad(e, "group_scale", panel, group, "float32", quads)

    @staticmethod
    def _by_quad(e: Emission, name: str, panel: Any, group: Any, dtype: str, quads: range | None) -> list[Any]:
        at = [quad * LANES for quad in quads or range(e.panels.width // LANES)]
        loads = [v.load(e.names[name], [panel, group, column], LANES) for column in at]
        return [v.let(v.cast(load, dtype, LANES)) for load in loads]

    def load_weights(self, e: Emission, panel: Any, row: Any, vectors: range | None = None) -> list[list[Any]]:
        """Load one panel row, or some ``vectors`` of it: uint8 registers ``[vector][plane]``."""
        p = e.panels
        planes = p.bits if p.planes else 1
        return [
            [
                v.let(v.load(e.names["weight"], [panel, row, (plane * p.vectors + vec) * BYTES], BYTES))
                for plane in range(planes)
            ]
            for vec in vectors or range(p.vectors)
        ]
