"""Super-blocks in the bit-serial kernels: the scale of a block is an integer times the float of its super-block.

    y[n] = sum_g d[g // s, n] a[g, n] sum_k q a[k]  -  m[g // s, n] b[g, n] sum_k a[k]

Kernels store ``a`` and ``b`` as integers, ``d`` and ``m`` as float16 with a power of two per column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.lut import PlanePanels, PlaneSum, plane_sum
from qcompile.codegen.kernels.cpu.panels import half_scales
from qcompile.formats import Format, SuperBlock
from qcompile.formats.superblock import SUPER

NESTED = (("group_scale", "super_scale"), ("block_offset", "super_offset"))
"""Parameters of the blocks of a super-block, and what they are multiplied by."""


def planes_of(fmt: Format) -> PlaneSum | None:
    """The planes of ``fmt``: those of `plane_sum`, or of integers in super-blocks."""
    if isinstance(fmt, SuperBlock):
        half = 1 << (fmt.bits - 1)
        return (
            PlaneSum(fmt.bits, fmt.group, bias=half) if fmt.symmetric else PlaneSum(fmt.bits, fmt.group, offset="free")
        )
    return plane_sum(fmt)


def pack_super_blocks(panels: PlanePanels, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Integers of blocks as they are, floats of super-blocks as float16 and a power of two per column."""
    supers = {name: array for name, array in parts.items() if name.startswith("super")}
    _, column = half_scales(np.concatenate(list(supers.values())))
    packed = {"group_scale": panels.by_panel(parts["block_scale"])}
    packed["super_scale"] = panels.by_panel((supers["super_scale"] / column).astype(np.float16))
    if "super_offset" in supers:
        packed["block_offset"] = panels.by_panel(parts["block_offset"])
        packed["super_offset"] = panels.by_panel((supers["super_offset"] / column).astype(np.float16))
    return {**packed, "scale": panels.columns(column)}


def super_block_params(panels: PlanePanels) -> list[v.Param]:
    """The parameters of a PrimFunc for the arrays of `pack_super_blocks`, but ``scale``."""
    blocks = (panels.count, panels.groups, panels.width)
    supers = (panels.count, -(-panels.k // SUPER), panels.width)
    params = []
    for name, parent in NESTED if panels.planes.offset == "free" else NESTED[:1]:
        params += [v.Param(name, blocks, "int8"), v.Param(parent, supers, "float16")]
    return params


def super_place(panels: PlanePanels, at: list[Any]) -> list[Any]:
    """Where the float of a super-block lies, given the place ``[panel, group, column]`` of a block."""
    panel, group, column = at
    return [panel, T.truncdiv(group, SUPER // panels.group), column]
