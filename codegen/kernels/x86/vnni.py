"""Integer GEMM by ``vpdpbusd``: four products of activations ``a + 128`` with signed codes into an int32 lane.

Every accumulator starts from ``-128 sum_k q[k, n]`` instead of 0, so that the integer sum is exact. A symmetric code of b bits is
brought to the top of its byte, which multiplies it by 2^(8-b) and makes its sign bit that of the byte: a mask and at most
one shift unpack it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission, Tile, position
from qcompile.codegen.kernels.cpu.gemm import TiledGemm
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.codegen.kernels.cpu.refusals import float_activations, overflow
from qcompile.codegen.kernels.cpu.unpack import as_bytes, field, repeat_byte
from qcompile.formats import IntFormat
from qcompile.targets.target import Target


class VnniGemm(TiledGemm):
    """``vpdpbusd`` on 512-bit registers, or 256-bit ones where there is only AVX-VNNI."""

    name = "x86-vnni"

    def lanes(self, target: Target) -> int:
        return 16 if target.has("avx512", "vnni") else 8

    def refuse(self, problem: LinearProblem, target: Target) -> str:
        if not target.has("vnni") and not target.has("avxvnni"):
            return f"{self.name} needs VNNI, which {target} does not have"
        if reason := float_activations(self.name, problem):
            return reason
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return byte_refusal(self.name, problem, fmt)

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

    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> Panels:
        fmt = self.integers(problem.weight)
        assert fmt is not None
        return Panels(problem.k, problem.n, fmt, config["lanes"], config["vectors"], twos_complement=fmt.symmetric)

    def unit(self, panels: Panels) -> int:
        return 1 << (8 - panels.bits) if panels.twos_complement else 1

    # Micro-kernel

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        self.by_group(e, panel, "int32", rows, lambda group, sums: self._reduce(e, panel, first, sums, group))

    def _reduce(self, e: Emission, panel: Any, first: Any, sums: Tile, group: Any) -> None:
        p = e.panels
        bits = f"int32x{p.lanes}"
        zeros = self.zero_vectors(e, panel, group)
        with T.serial(p.rows_per_group) as row:
            for index, weights in self.codes(e, panel, group * p.rows_per_group + row, zeros):
                k = position(e, group, row, index)
                for r, line in enumerate(sums):
                    a = v.let(self.activations(e, first + r, k))
                    for acc, w in zip(line, weights):
                        name = f"llvm.x86.avx512.vpdpbusd.{32 * p.lanes}"
                        acc.set(T.call_llvm_pure_intrin(bits, name, acc.get(), a, w))

    def codes(self, e: Emission, panel: Any, row: Any, zeros: list[Any] | None) -> Iterator[tuple[int, list[Any]]]:
        """Emit the loads of one panel row; yield for each position in it the signed bytes of every vector."""
        p = e.panels
        raw = self.load_row(e, panel, row)
        for index in range(p.per_byte):
            yield index, [v.let(self.signed(p, raw[vec], index, zeros and zeros[vec])) for vec in range(len(raw))]

    def signed(self, p: Panels, raw: list[Any], index: int, zero: Any) -> Any:
        """Codes less their zero point as signed bytes, times `unit`."""
        if p.bits == 8:
            return as_bytes(raw[0], p.lanes)
        if zero is None:
            return as_bytes(field(raw, index, p, 8), p.lanes)
        return as_bytes(field(raw, index, p, p.bits), p.lanes) - zero

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


def byte_refusal(name: str, problem: LinearProblem, fmt: IntFormat) -> str:
    """Why codes of this format are not signed bytes, or sums do not fit in int32; empty if they are and do."""
    if fmt.bits == 8 and not fmt.symmetric:
        return f"{name}: an asymmetric 8-bit code less its zero point needs 9 bits"
    return overflow(name, problem.k, fmt.group)
