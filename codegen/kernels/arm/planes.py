"""Bit planes with a scale of their own (hierarchical linear quantization) on ARM.

    y[n] = sum_g ( sum_p s[p, g, n] sum_{k in g} b_p[k, n] a[k]  +  o[g, n] sum_{k in g} a[k] ),      b_p in 0, 1

A plane is a mask of -1 or 0 per code (CMTST) and one dot product, whose sum is taken negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.arm import bits
from qcompile.codegen.kernels.arm.activations import over_rows
from qcompile.codegen.kernels.arm.integers import DotGemm, NeonGemm
from qcompile.codegen.kernels.arm.panels import UnsignedPanels
from qcompile.codegen.kernels.arm.products import LANES, Word, repeated
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import Emission, Register
from qcompile.codegen.kernels.cpu.lut import group_scales
from qcompile.formats import BitPlane, Format, IntFormat, Quantized


class PlaneDotGemm(DotGemm):
    """SDOT of masks."""

    name = "arm-planes-sdot"

    def integers(self, fmt: Format) -> IntFormat | None:
        return IntFormat(fmt.bits, fmt.group or MAX_GROUP, symmetric=False) if isinstance(fmt, BitPlane) else None

    def speed(self, problem: LinearProblem, target: Any) -> tuple[float, float]:
        return 32.0 / problem.weight.bits, 0.5 * problem.weight.bits

    def configs(self, problem: LinearProblem, target: Any) -> list[dict[str, Any]]:
        return [
            {"mr": mr, "vectors": nr, "scales": kind, "panels": 4, "block_rows": 256, "lanes": LANES}
            for kind in ("float16", "float32")
            for mr, nr in ((2, 2), (1, 4))
        ]

    # Packing

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        panels = self.panels(problem, config)
        stored, column = group_scales(problem.weight, weight, config["scales"])
        offset = (weight.aux["offset"] / column).astype(config["scales"])
        return {
            "weight": panels.pack_codes(weight),
            "group_scale": np.stack([panels.by_panel(s) for s in stored], axis=2),
            "offset": panels.by_panel(offset),
            "scale": panels.columns(column),
        }

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: Any) -> list[v.Param]:
        groups = (panels.count, panels.groups)
        found = []
        for param in super().params(problem, config, panels):
            if param.name == "group_scale":
                found.append(v.Param("group_scale", (*groups, panels.bits, panels.width), config["scales"]))
            elif param.name == "zero":
                found.append(v.Param("offset", (*groups, panels.width), config["scales"]))
            else:
                found.append(param)
        return found

    # Code

    def micro(self, e: Emission, panel: Any, first: Any, rows: int) -> None:
        p = e.panels
        tile = [[Register("float32", LANES) for _ in range(p.vectors)] for _ in range(rows)]
        for line in tile:
            for register in line:
                register.set(v.const(0, LANES, "float32"))
        with T.serial(p.groups) as group:
            sums = self.plane_sums(e, panel, first, rows, group)
            totals = [v.let(T.cast(v.load(e.extra["sums"], [r, group], 1), "float32")) for r in range(rows)]
            for vec in range(p.vectors):
                at = vec * LANES
                offset = v.let(v.cast(v.load(e.names["offset"], [panel, group, at], LANES), "float32", LANES))
                scales = [
                    v.let(v.cast(v.load(e.names["group_scale"], [panel, group, plane, at], LANES), "float32", LANES))
                    for plane in range(p.bits)
                ]
                for r in range(rows):
                    value = tile[r][vec].get()
                    for scale, total in zip(scales, sums[r][vec]):
                        value = v.let(vmath.fma(v.cast(total, "float32", LANES), scale, value))
                    tile[r][vec].set(vmath.fma(v.splat(totals[r], LANES), offset, value))
        for r in range(rows):
            for vec in range(p.vectors):
                v.store(e.tile, [r, vec * LANES], tile[r][vec].get(), LANES)

    def plane_sums(self, e: Emission, panel: Any, first: Any, rows: int, group: Any) -> list[list[list[Any]]]:
        """Emit ``sum_k b_p a`` over one group, int32 ``[row][vector][plane]``."""
        p: UnsignedPanels = e.panels
        part = bits.Part(0, -1, True)
        zero = v.const(0, LANES, "int32")
        tile = [
            [[self.accumulator(p, part, zero) for _ in range(p.bits)] for _ in range(p.vectors)] for _ in range(rows)
        ]

        def body(line: Any, count: int, activations: Callable[[int, int], Word]) -> None:
            for i in range(count):
                raw = self.load_weights(e, panel, line + i)
                for index in range(p.per_byte):
                    a = [v.let(repeated(activations(r, i * p.per_byte + index))) for r in range(rows)]
                    for vec in range(p.vectors):
                        for plane in range(p.bits):
                            mask = v.let(bits.plane(p, raw[vec], index, plane))
                            for r in range(rows):
                                tile[r][vec][plane].add(mask, a[r])

        def flush() -> None:
            for line in tile:
                for planes in line:
                    for accumulator in planes:
                        accumulator.flush()

        over_rows(e, first, rows, group, body, flush, self.chunks_between_flushes(p))
        return [
            [[v.let(bits.combine([part], [acc.total()], zero)) for acc in planes] for planes in line] for line in tile
        ]


MAX_GROUP = 1 << 30
"""Stands for one group per column, whose scales are still kept by group."""


class PlaneNeonGemm(PlaneDotGemm):
    """The same without SDOT."""

    name = "arm-planes-neon"
    needs = NeonGemm.needs
    wide = NeonGemm.wide
    add_bytes = NeonGemm.add_bytes
    accumulator = NeonGemm.accumulator

    def chunks_between_flushes(self, panels: UnsignedPanels) -> int:
        return max(1, 32767 // (2 * 128) // (max(16, panels.step) // LANES))
