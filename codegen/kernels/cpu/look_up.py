"""What the bit-serial families share, whatever the processor: the packed arrays, and the tiles of a block of rows.

See `lut` for the method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, StoredCodes
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import opaque
from qcompile.codegen.kernels.cpu.lut import PlanePanels, PlaneSum, group_scales
from qcompile.codegen.kernels.cpu.superblocks import pack_super_blocks, planes_of, super_block_params
from qcompile.codegen.kernels.cpu.tail import tail_params
from qcompile.formats import Quantized, SuperBlock


class LookUpGemm(LinearKernel):
    """Base of the families; a subclass gives the geometry and the code. Config: ``scales`` (``float16``, ``float32``)."""

    stores_codes = True

    @abstractmethod
    def panels(self, problem: LinearProblem, config: dict[str, Any]) -> PlanePanels:
        """Geometry of the packed weights."""

    @staticmethod
    def planes(problem: LinearProblem) -> PlaneSum:
        """The planes of the weight format."""
        planes = planes_of(problem.weight)
        assert planes is not None
        return planes

    @staticmethod
    def grouped(planes: PlaneSum) -> bool:
        """Whether groups are added up in float32; otherwise all of K in int32."""
        return bool(planes.group) or not planes.uniform or planes.offset != "constant"

    def scale_kinds(self, problem: LinearProblem) -> tuple[str, ...]:
        """Types that scales of groups may have."""
        if isinstance(problem.weight, SuperBlock):
            return ("float16",)
        return ("float16", "float32") if self.grouped(self.planes(problem)) else ("float32",)

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        panels = self.panels(problem, config)
        packed = {"weight": panels.pack_codes(weight)}
        if not self.grouped(panels.planes):
            return {**packed, "scale": panels.columns(weight.scale[0].astype(np.float32))}
        if isinstance(problem.weight, SuperBlock):
            return {**packed, **pack_super_blocks(panels, problem.weight.parts(weight))}
        scale, column = group_scales(problem.weight, weight, config["scales"])
        packed["group_scale"] = panels.by_panel(scale[0] if panels.planes.uniform else scale)
        if panels.planes.offset == "zero":
            assert weight.zero_point is not None
            packed["zero"] = panels.by_panel(weight.zero_point.astype(np.uint8))
        if panels.planes.offset == "free":
            packed["offset"] = panels.by_panel((weight.aux["offset"] / column).astype(config["scales"]))
        return {**packed, "scale": panels.columns(column)}

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes:
        panels = self.panels(problem, config)
        bias = panels.planes.bias if panels.planes.offset == "constant" else 0
        return StoredCodes(panels.layout, panels.source(), panels.planes.group, bias=bias)

    def operands(self, problem: LinearProblem, config: dict[str, Any]) -> list[v.Param]:
        """The parameters of the PrimFunc."""
        return self.params(problem, config, self.panels(problem, config))

    def params(self, problem: LinearProblem, config: dict[str, Any], panels: PlanePanels) -> list[v.Param]:
        """The parameters of the PrimFunc in the order of `LinearKernel`."""
        groups = (panels.count, panels.groups)
        planes = () if panels.planes.uniform else (panels.planes.bits,)
        params = [v.Param("x", ("m", problem.k), "uint8"), v.Param("x_scale", ("m",))]
        params.append(v.Param("weight", (panels.count, panels.pairs, panels.pair_bytes), "uint8"))
        if isinstance(problem.weight, SuperBlock):
            params += super_block_params(panels)
        elif self.grouped(panels.planes):
            params.append(v.Param("group_scale", (*groups, *planes, panels.width), config["scales"]))
            if panels.planes.offset == "zero":
                params.append(v.Param("zero", (*groups, panels.width), "uint8"))
            if panels.planes.offset == "free":
                params.append(v.Param("offset", (*groups, panels.width), config["scales"]))
        return [*params, *tail_params(problem, panels.count * panels.width)]


def over_tiles(here: Any, high: int, product: Callable[[Any, int], None], finish: Callable[[Any, Any], None]) -> None:
    """Emit tiles of up to ``high`` rows that cover ``here`` rows and differ by one at most.

    ``product(first, rows)`` is emitted once for every height, ``finish(first, rows)``, whose ``rows`` is an expression, once.
    """
    tiles = v.let(T.truncdiv(here + (high - 1), high))
    height = v.let(T.truncdiv(here, tiles))
    taller = v.let(here - height * tiles)
    with T.serial(tiles) as t:
        first = opaque(t * height + T.min(t, taller))
        rows = opaque(height + T.cast(t < taller, "int32"))
        for count in range(high, 0, -1):
            with T.If(rows == count), T.Then():
                product(first, count)
        finish(first, rows)
