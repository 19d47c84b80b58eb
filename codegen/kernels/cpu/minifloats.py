"""GEMM of weights that are small floats (e4m3, e5m2, e3m2 and others of 5 to 8 bits), whatever the processor.

A float16 has 5 exponent bits. The bits of a float with ``X <= 5`` of them, its sign moved to the top of 16 bits and the rest
``5 - X`` places further down, are those of a float16 of the same mantissa, whose exponent counts from another bias, also where
it is subnormal:

    value = 2^(15 - bias) * float16(bits),     bias = 2^(X - 1) - 1

So two shifts and a mask, and the processor's conversion to float32, decode any of them exactly; the factor goes into the
scales. Activations are float32, or int8 codes converted to it. The product of both has at most 12 significant bits.

A 32-bit lane holds four consecutive k of a column. Taken as 16-bit lanes, its even bytes give k and k + 2, its odd ones k + 1
and k + 3, of half the columns of a register each. Activations are laid out in that order and multiplied in pairs; the two sums
of a column are added when a group ends.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import Emission, Register, Tile
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import IndexPanels
from qcompile.codegen.kernels.cpu.unpack import field
from qcompile.formats import Format, IntFormat, Quantized
from qcompile.formats.levels import LevelFormat

ORDER = (0, 2, 1, 3)
"""Where the activations of four consecutive k lie."""

PAD = 16
"""Elements between the end of a row and the next: rows a power of two apart would fall on the same lines of the cache."""


def half_bits(codes: np.ndarray, bits: int, shift: int) -> np.ndarray:
    """The float16 numbers, ``(...)``, that codes of ``bits`` bits become."""
    word = codes.astype(np.uint16) << (16 - bits)
    return (word & 0x8000 | (word & 0x7FFF) >> shift).astype(np.uint16).view(np.float16)


@functools.cache
def half_shift(fmt: Format) -> tuple[int, float] | None:
    """``5 - X`` and the factor ``2^(15 - bias)`` of a format of small floats; None if its codes are no such bits."""
    if not isinstance(fmt, LevelFormat):
        return None
    used = ~np.isnan(fmt.table)
    codes, table = np.flatnonzero(used), fmt.table[used].astype(np.float64)
    for shift in range(5):
        halves = half_bits(codes, fmt.bits, shift).astype(np.float64)
        place = int(np.argmax(np.abs(table)))
        if not np.isfinite(halves).all() or halves[place] == 0:
            continue
        factor = table[place] / halves[place]
        if np.frexp(factor)[0] == 0.5 and (halves * factor == table).all():
            return shift, float(factor)
    return None


class MinifloatGemm(TiledGemm):
    """Base of the families; a subclass says for which processors and gives the register tiles."""

    float_tile = True

    def integers(self, fmt: Format) -> IntFormat | None:
        """Bit patterns behave like integers of their width as far as packing is concerned."""
        return IntFormat(fmt.bits, fmt.group) if fmt.bits > 4 and half_shift(fmt) is not None else None

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def unit(self, panels: Any) -> int:
        return 1

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> IndexPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return IndexPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"])

    def panels_per_item(self) -> int:
        return 8

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        packed = super().pack(problem, config, weight)
        return {**packed, "scale": packed["scale"] * np.float32(_decoding(problem.weight)[1])}

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels, fmt = self.panels(problem, config), problem.weight
        levels = half_bits(np.arange(1 << fmt.bits), fmt.bits, _decoding(fmt)[0]).astype(np.float32)
        return StoredCodes(
            panels.layout, panels.source(), panels.fmt.group, levels=np.nan_to_num(levels, posinf=0, neginf=0)
        )

    # Code

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        """Copy the rows as float32, in the order of `ORDER`, every group padded with zeros to whole panel rows."""
        p = e.panels
        span = p.rows_per_group * p.step
        out = e.extra["rows"] = B.alloc_buffer((e.config["mr"], p.groups * span + PAD), "float32")

        def floats(row: Any, k: Any, lanes: int) -> Any:
            x = v.load(e.names["x"], [first + row, k], lanes)
            if not e.problem.activation.bits:
                return x
            return v.cast(v.cast(x, "int32", lanes) - v.const(128, lanes, "int32"), "float32", lanes)

        def group(row: Any, index: Any, width: int) -> None:
            k, place = v.let(index * p.group), v.let(index * span)

            def fours(start: Any, lanes: int, _: int) -> None:
                moved = v.shuffle(
                    v.let(floats(row, k + start, lanes)), [4 * (i // 4) + ORDER[i % 4] for i in range(lanes)]
                )
                v.store(out, [row, place + start], moved, lanes)

            def zeros(start: Any, lanes: int, _: int) -> None:
                v.store(out, [row, place + -(-width // 4) * 4 + start], v.const(0, lanes), lanes)

            whole = width // 4 * 4
            v.sweep(whole, 4 * p.lanes, fours)
            for i in range(4 if width % 4 else 0):
                value = floats(row, k + whole + i, 1) if whole + i < width else T.float32(0)
                B.buffer_store(out, value, [row, place + whole + ORDER[i]])
            v.sweep(span - -(-width // 4) * 4, p.lanes, zeros)

        with T.serial(rows) as row:
            if p.groups > 1:
                with T.serial(p.groups - 1) as index:
                    group(row, index, p.group)
            group(row, T.int32(p.groups - 1), p.k - (p.groups - 1) * p.group)

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "float32", rows, lambda group, sums: self._reduce(e, panel, sums, group))

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        # One row alone would wait for its own sums: even and odd k get registers of their own.
        chains = 2 if len(sums) == 1 else 1
        halves = [
            [[[Register("float32", p.lanes) for _ in range(2)] for _ in range(chains)] for _ in line] for line in sums
        ]
        registers = [register for line in halves for parts in line for pair in parts for register in pair]
        for register in registers:
            register.set(v.const(0, p.lanes))
        with T.serial(e.rolled(p.rows_per_group)) as row:
            line = v.let(group * p.rows_per_group + row)
            raw = self.load_row(e, panel, line)
            for index in range(p.per_byte):
                codes = [v.let(field(planes, index, p, 8)) for planes in raw]
                for odd in range(2):
                    weights = [self.decoded(e, words, odd) for words in codes]
                    for r, columns in enumerate(halves):
                        two = v.load(e.extra["rows"], [r, line * p.step + index * p.depth + 2 * odd], 2)
                        pair = v.splat(v.bits_of(two, "int64", 1), p.lanes // 2)
                        a = v.let(v.bits_of(pair, "float32", p.lanes))
                        for parts, pieces in zip(columns, weights):
                            for register, w in zip(parts[odd % chains], pieces):
                                register.set(vmath.fma(a, w, register.get()))
        for columns, added in zip(halves, sums):
            for parts, acc in zip(columns, added):
                low, high = ([pair[half].get() for pair in parts] for half in range(2))
                acc.set(acc.get() + _columns(sum(low[1:], low[0]), sum(high[1:], high[0]), p.lanes))

    @staticmethod
    def decoded(e: Emission, words: Any, odd: int) -> list[Any]:
        """The even or odd bytes of 32-bit lanes, codes at the top of a byte, as float32: two registers."""
        lanes, (shift, _) = e.panels.lanes, _decoding(e.problem.weight)
        short = v.bits_of(words, "int16", 2 * lanes)
        if not odd:
            short = T.shift_left(short, v.const(8, 2 * lanes, "int16"))
        if shift:  # the sign is copied downwards, and masked
            short = T.shift_right(short, v.const(shift, 2 * lanes, "int16"))
        if shift or odd:
            mask = (0x8000 | 0x7F00 >> shift) - 0x10000
            short = T.bitwise_and(short, v.const(mask, 2 * lanes, "int16"))
        floats = v.let(v.cast(v.bits_of(v.let(short), "float16", 2 * lanes), "float32", 2 * lanes))
        return [v.let(v.shuffle(floats, range(start, start + lanes))) for start in (0, lanes)]


def _decoding(fmt: Format) -> tuple[int, float]:
    found = half_shift(fmt)
    assert found is not None
    return found


def _columns(low: Any, high: Any, lanes: int) -> Any:
    """Sums of neighbouring lanes of two registers."""
    both = [low, high]
    return T.Shuffle(both, list(range(0, 2 * lanes, 2))) + T.Shuffle(both, list(range(1, 2 * lanes, 2)))
