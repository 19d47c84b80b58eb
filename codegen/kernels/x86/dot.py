"""Integer GEMM by byte dot products: weights unpacked to bytes in registers.

* `VnniGemm`: ``vpdpbusd`` (4 products into an int32 lane) of activations ``a + 128`` with signed codes; every accumulator
  starts from ``-128 sum_k q[k, n]`` instead of 0, so that the integer sum is exact. A symmetric code of b bits is brought to the top of its byte,
  which multiplies it by 2^(8-b) and makes its sign bit that of the byte: a mask and at most one shift unpack it.
* `MaddubsGemm`: ``vpmaddubsw`` (2 products into an int16 lane) of unsigned codes with signed activations (`signed`), for
  codes narrow enough that several products fit in int16, then ``vpmaddwd`` by ones into int32.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.gemm import Emission, Register, Tile, TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.unpack import as_bytes, field, repeat_byte
from qcompile.codegen.kernels.x86.signed import PaddedPanels, signed_rows
from qcompile.formats import IntFormat
from qcompile.targets.target import Target

MADDUBS = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
MADDWD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


UNROLLED = 4
"""Panel rows times tile rows a micro-kernel writes out instead of looping."""


class DotGemm(TiledGemm):
    """What the two byte-dot families share: unpacking, activations, and groups."""

    twos_complement = False
    """Whether symmetric codes are unpacked to the top of their byte, sign and all, multiplied by ``2^(8 - bits)``."""

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        signed = self.twos_complement and problem.weight.symmetric
        lanes, vectors = config["lanes"], config["vectors"]
        return Panels(problem.k, problem.n, problem.weight, lanes, vectors, twos_complement=signed)

    def unit(self, panels: Panels) -> int:
        return 1 << (8 - panels.bits) if panels.twos_complement else 1

    # Micro-kernel

    def codes(self, e: Emission, panel: Any, row: Any, zeros: list[Any] | None) -> Iterator[tuple[int, list[Any]]]:
        """Emit the loads of one panel row; yield for each position in it the signed bytes of every vector."""
        p = e.panels
        raw = self.load_row(e, panel, row)
        for index in range(p.per_byte):
            yield index, [v.let(self.signed(p, raw[vec], index, zeros and zeros[vec])) for vec in range(p.vectors)]

    def signed(self, p: Panels, raw: list[Any], index: int, zero: Any) -> Any:
        """Codes less their zero point as signed bytes, times `unit`."""
        if p.bits == 8:
            return as_bytes(raw[0], p.lanes)
        if p.twos_complement:
            return as_bytes(field(raw, index, p, 8), p.lanes)
        low = as_bytes(field(raw, index, p, p.bits), p.lanes)
        return low - (zero if zero is not None else v.const(p.bias, 4 * p.lanes, "int8"))

    def zero_vectors(self, e: Emission, panel: Any, group: Any) -> list[Any] | None:
        """Zero points of a group, each repeated in the bytes of its lane."""
        if e.panels.fmt.symmetric:
            return None
        return [as_bytes(repeat_byte(z, e.panels.lanes), e.panels.lanes) for z in self.zero_codes(e, panel, group)]

    def activations(self, e: Emission, row: Any, k: Any) -> Any:
        """Four consecutive activation bytes of a row in every lane."""
        x, width, lanes = e.names["x"], e.problem.k, e.panels.lanes
        if width >= 4:
            word = v.bits_of(v.load(x, [row, k], 4), "int32", 1)
        else:
            word = T.int32(0)
            for i in range(width):
                word = T.bitwise_or(word, T.shift_left(T.cast(x[row, i], "int32"), T.int32(8 * i)))
        return as_bytes(v.splat(word, lanes), lanes)

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self.reduce(e, panel, first, sums, group))

    def reduce(self, e: Emission, panel: Any, first: Any, sums: Tile, group: Any) -> None:
        """Emit the sum over one group into ``sums[row][vector]``."""
        raise NotImplementedError


class VnniGemm(DotGemm):
    """``vpdpbusd`` on 512-bit registers, or 256-bit ones where there is only AVX-VNNI."""

    name = "x86-vnni"
    twos_complement = True

    def lanes(self, target: Target) -> int:
        return 16 if target.has("avx512", "vnni") else 8

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("vnni") and not target.has("avxvnni"):
            return f"{self.name} needs VNNI, which {target} does not have"
        if not problem.activation.bits:
            return f"{self.name} multiplies integer activations; this operator has float ones"
        return byte_refusal(self.name, problem)

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        return 60.0, 0.5 * bits if 8 % bits else 0.0 if bits == 8 else 0.5

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if not target.has("avx512", "vnni"):
            return [(4, 3), (6, 2), (12, 1)]
        if 8 % problem.weight.bits:  # unpacking bit planes needs registers of its own
            return [(6, 2), (4, 3), (12, 1)]
        if problem.weight.group:  # half of the registers hold the float32 sums over groups
            return [(4, 3), (6, 2), (12, 1)]
        return [(8, 3), (6, 4), (12, 2), (16, 1)]

    def reduce(self, e: Emission, panel: Any, first: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        bits = f"int32x{p.lanes}"
        zeros = self.zero_vectors(e, panel, group)
        with T.serial(p.rows_per_group) as row:
            for index, weights in self.codes(e, panel, group * p.rows_per_group + row, zeros):
                k = self.position(e, group, row, index)
                for r, line in enumerate(sums):
                    a = v.let(self.activations(e, first + r, k))
                    for acc, w in zip(line, weights):
                        name = f"llvm.x86.avx512.vpdpbusd.{32 * p.lanes}"
                        acc.set(T.call_llvm_pure_intrin(bits, name, acc.get(), a, w))


def byte_refusal(name: str, problem: LinearProblem) -> str:
    """Why codes of this format are not signed bytes, or sums do not fit in int32; empty if they are and do."""
    fmt = problem.weight
    if fmt.bits == 8 and not fmt.symmetric:
        return f"{name}: an asymmetric 8-bit code less its zero point needs 9 bits"
    longest = min(fmt.group or problem.k, problem.k)
    if longest * 255 * 128 >= 1 << 31:
        return f"{name}: {longest} products of 8-bit numbers may overflow an int32 accumulator"
    return ""


def products(fmt: IntFormat) -> int:
    """How many sums of two products of unsigned codes with int8 activations fit in int16."""
    return 32767 // (2 * 128 * ((1 << fmt.bits) - 1))


class MaddubsGemm(TiledGemm):
    """``vpmaddubsw`` on 256- or 512-bit registers for codes of at most 7 bits."""

    name = "x86-maddubs"

    def lanes(self, target: Target) -> int:
        return 16 if target.has("avx512") else 8

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("avx2", "fma", "f16c"):
            return f"{self.name} needs AVX2, FMA and F16C, which {target} does not have"
        if not problem.activation.bits:
            return f"{self.name} multiplies integer activations; this operator has float ones"
        if reason := byte_refusal(self.name, problem):
            return reason
        if products(problem.weight) < 1:
            return f"{self.name}: two products with {problem.weight} codes may overflow int16"
        return ""

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def unit(self, panels: Panels) -> int:
        return 1

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> PaddedPanels:
        return PaddedPanels(problem.k, problem.n, problem.weight, config["lanes"], config["vectors"])

    def panels_per_item(self) -> int:
        return 24

    def speed(self, problem: LinearProblem, target: Target) -> tuple[float, float]:
        bits = problem.weight.bits
        rate, unpack = (28.0, 0.7 * bits) if 8 % bits else (42.0, 0.5)
        return (rate, 2 * unpack) if target.has("avx512") else (rate, unpack)

    def tiles(self, problem: LinearProblem, target: Target) -> list[tuple[int, int]]:
        if target.has("avx512"):
            return [(6, 3), (8, 2), (12, 1)]
        return [(5, 2), (3, 3), (4, 2), (12, 1)]

    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        found = super().configs(problem, target)
        return [{**config, "prefetch": ahead} for ahead in (2048, 1024, 0) for config in found]

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        e.extra["rows"] = signed_rows(e, e.panels, first, rows, 4 * e.panels.lanes)

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self._reduce(e, panel, sums, group))

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        """Emit the sum over one group into ``sums[row][vector]``."""
        p = e.panels
        self._offset(e, panel, sums, group)
        limit = products(p.fmt)
        partial = [[Register("int16", 2 * p.lanes) for _ in line] for line in sums]
        together = max(1, min(limit // p.per_byte, p.rows_per_group))  # panel rows between two widenings
        whole = together * p.per_byte <= limit  # otherwise a row is widened within

        def rows(begin: Any, count: int) -> None:
            if whole:
                for register in itertools.chain(*partial):
                    register.set(v.const(0, 2 * p.lanes, "int16"))
            unroll = count if count * len(sums) <= UNROLLED else 1
            with T.serial(e.rolled(count // unroll)) if unroll < count else contextlib.nullcontext(0) as i:
                for j in range(unroll):
                    self._row(e, panel, group, begin + i * unroll + j, partial, sums, 0 if whole else limit)
            if whole:
                widen(p.lanes, partial, sums)

        chunks, rest = divmod(p.rows_per_group, together)
        if chunks == 1:
            rows(0, together)
        elif chunks:
            with T.serial(e.rolled(chunks)) as chunk:
                rows(chunk * together, together)
        if rest:
            rows(chunks * together, rest)

    def _offset(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        """Take the zero point times the sum of the activations off the accumulators."""
        p, zeros = e.panels, None if e.panels.fmt.symmetric else self.zero_codes(e, panel, group)
        for r, line in enumerate(sums):
            total = v.let(e.extra["rows"].total[r, group])
            for vec, acc in enumerate(line):
                zero = v.splat(total * p.bias, p.lanes) if zeros is None else zeros[vec] * v.splat(total, p.lanes)
                acc.set(acc.get() - zero)

    def _row(self, e: Emission, panel: Any, group: Any, row: Any, partial: Tile, sums: Tile, limit: int) -> None:
        """Add the products with one panel row; after every ``limit`` positions, if not 0, widen."""
        p = e.panels
        line = v.let(group * p.rows_per_group + row)
        if e.config["prefetch"]:
            for offset in range(0, p.row_bytes, 64):
                prefetch(e.names["weight"], [panel, line, offset + e.config["prefetch"]])
        raw = self.load_row(e, panel, line)
        for index in range(p.per_byte):
            weights = [v.let(as_bytes(field(planes, index, p, p.bits), p.lanes)) for planes in raw]
            fresh = bool(limit) and index % limit == 0
            for r, registers in enumerate(partial):
                word = e.extra["rows"].word(r, line * p.step + index * p.depth)
                a = v.let(as_bytes(v.splat(word, p.lanes), p.lanes))
                for register, w in zip(registers, weights):
                    pair = T.call_llvm_pure_intrin(f"int16x{2 * p.lanes}", MADDUBS[p.lanes], w, a)
                    register.set(pair if fresh else register.get() + pair)
            if limit and (index % limit == limit - 1 or index == p.per_byte - 1):
                widen(p.lanes, partial, sums)


def widen(lanes: int, partial: Tile, sums: Tile) -> None:
    """Add int16 accumulators to those in int32."""
    ones = v.const(1, 2 * lanes, "int16")
    for line, narrow in zip(sums, partial):
        for acc, short in zip(line, narrow):
            wide = T.call_llvm_pure_intrin(f"int32x{lanes}", MADDWD[lanes], short.get(), ones)
            acc.set(acc.get() + wide)


def prefetch(buffer: Any, at: list[Any]) -> None:
    """Ask for a line of the first cache; the address may lie past the end of the buffer."""
    address = T.address_of(buffer[tuple(at)])
    T.evaluate(T.call_intrin("void", "tirx.prefetch", address, T.int32(0), T.int32(3), T.int32(1)))
