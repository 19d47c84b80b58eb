"""Integer GEMM by byte products: unsigned codes times signed activations (`signed`), ``vpmaddubsw``, never saturating.

Codes of at most 7 bits are narrow enough that sums of several products fit in int16; ``vpmaddwd`` by ones then adds them up
in int32. A symmetric code is stored with its offset added, so that unpacking is a shift and a mask.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission, Register, Tile, beside
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import PaddedPanels, Panels
from qcompile.codegen.kernels.cpu.refusals import float_activations, no_avx2
from qcompile.codegen.kernels.cpu.unpack import as_bytes, field
from qcompile.codegen.kernels.cpu.vector import lanes_of
from qcompile.codegen.kernels.x86.instructions import MADDUBS, MADDWD, prefetch
from qcompile.codegen.kernels.x86.signed import signed_rows
from qcompile.codegen.kernels.x86.vnni import byte_refusal
from qcompile.targets.target import Target

UNROLLED = 4
"""Panel rows times tile rows a micro-kernel writes out instead of looping."""


def products(top: int) -> int:
    """How many sums of two products of unsigned codes up to ``top`` with int8 activations fit in int16."""
    return 32767 // (2 * 128 * top)


class MaddubsGemm(TiledGemm):
    """``vpmaddubsw`` on 256- or 512-bit registers for codes of at most 7 bits."""

    name = "x86-maddubs"
    streams = (4, 2, 1)

    def lanes(self, target: Target) -> int:
        return lanes_of(target)

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if reason := no_avx2(self.name, target) or float_activations(self.name, problem):
            return reason
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return byte_refusal(self.name, problem, fmt) or self.refuse_codes(problem)

    def refuse_codes(self, problem: LinearProblem) -> str:
        """Why the unsigned numbers are no bytes whose products fit in int16, or an empty string."""
        if products(self.largest(problem)) < 1:
            return f"{self.name}: two products with {problem.weight} codes may overflow int16"
        return ""

    def activation_offset(self, problem: LinearProblem) -> int:
        return 0

    def unit(self, panels: Panels) -> int:
        return 1

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> PaddedPanels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return PaddedPanels(problem.k, problem.n, fmt, config["lanes"], config["vectors"])

    def largest(self, problem: LinearProblem) -> int:
        """The largest unsigned number that multiplies activations."""
        return (1 << problem.weight.bits) - 1

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
        return [{**config, "prefetch": ahead} for ahead in (2048, 1024, 4096, 0) for config in found]

    def prologue(self, e: Emission, first: Any, rows: Any) -> None:
        e.extra["rows"] = signed_rows(e, e.panels, first, rows, 4 * e.panels.lanes)

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self._reduce(e, panel, sums, group))

    def _reduce(self, e: Emission, panel: Any, sums: Tile, group: Any) -> None:
        """Emit the sum over one group into ``sums[row][vector]``; panels take turns between two widenings."""
        p = e.panels
        self._offset(e, panel, sums, group)
        limit = products(self.largest(e.problem))
        partial = [[Register("int16", 2 * p.lanes) for _ in range(p.vectors)] for _ in sums]
        turns = [
            (each, [line[i * p.vectors : (i + 1) * p.vectors] for line in sums]) for i, each in enumerate(beside(panel))
        ]
        together = max(1, min(limit // p.per_byte, p.rows_per_group))  # panel rows between two widenings
        whole = together * p.per_byte <= limit  # otherwise a row is widened within

        def rows(begin: Any, count: int) -> None:
            unroll = count if count * len(sums) <= UNROLLED else 1
            for each, here in turns:
                if whole:
                    for register in itertools.chain(*partial):
                        register.set(v.const(0, 2 * p.lanes, "int16"))
                with T.serial(e.rolled(count // unroll)) if unroll < count else contextlib.nullcontext(0) as i:
                    for j in range(unroll):
                        self._row(e, each, group, begin + i * unroll + j, partial, here, 0 if whole else limit)
                if whole:
                    widen(p.lanes, partial, here)

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
                zero = v.splat(total * self.zero(e), p.lanes) if zeros is None else zeros[vec] * v.splat(total, p.lanes)
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
            weights = [v.let(self.decoded(e, as_bytes(field(planes, index, p, p.bits), p.lanes))) for planes in raw]
            fresh = bool(limit) and index % limit == 0
            for r, registers in enumerate(partial):
                word = e.extra["rows"].word(r, line * p.step + index * p.depth)
                a = v.let(as_bytes(v.splat(word, p.lanes), p.lanes))
                for register, w in zip(registers, weights):
                    pair = T.call_llvm_pure_intrin(f"int16x{2 * p.lanes}", MADDUBS[p.lanes], w, a)
                    register.set(pair if fresh else register.get() + pair)
            if limit and (index % limit == limit - 1 or index == p.per_byte - 1):
                widen(p.lanes, partial, sums)

    def zero(self, e: Emission) -> int:
        """The unsigned number that stands for 0, where all groups share it."""
        return e.panels.bias

    def decoded(self, e: Emission, codes: Any) -> Any:
        """The unsigned numbers that codes (bytes) stand for."""
        return codes


def widen(lanes: int, partial: Tile, sums: Tile) -> None:
    """Add int16 accumulators to those in int32."""
    ones = v.const(1, 2 * lanes, "int16")
    for line, narrow in zip(sums, partial):
        for acc, short in zip(line, narrow):
            wide = T.call_llvm_pure_intrin(f"int32x{lanes}", MADDWD[lanes], short.get(), ones)
            acc.set(acc.get() + wide)
