"""Reductions over nothing: gives a reduction that may be empty its initialization outside of the reduction's loops.

A TIR reduction initializes its result in the first iteration of its innermost loops. Where those run zero times (an empty
dimension, static or found at run time) the result would be left undefined instead of the reduction's identity.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.stmt import SBlock


def initialize_empty_reductions(mod: tvm.IRModule) -> tvm.IRModule:
    """The module with every possibly empty reduction initialized by a statement before it.

    Kernels whose loops are not the plain nest of the reduction's axes any more (scheduled ones) are left alone.
    """
    for name, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and any(_may_be_empty(b) for b in _reductions(function)):
            mod.update_func(name, _separated(function))
    return mod


def _reductions(function: tirx.PrimFunc) -> list[SBlock]:
    found: list[SBlock] = []

    def visit(statement: SBlock) -> None:
        if statement.init is not None:
            found.append(statement)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return found


def _is_reduction(axis: tirx.IterVar) -> bool:
    return axis.iter_type == tirx.IterVar.CommReduce


def _may_be_empty(block: SBlock) -> bool:
    extents = [axis.dom.extent for axis in block.iter_vars if _is_reduction(axis)]
    return any(not isinstance(e, tirx.IntImm) or int(e) == 0 for e in extents)


def _separated(function: tirx.PrimFunc) -> tirx.PrimFunc:
    schedule = Schedule(tvm.IRModule({"main": function}))
    for block in schedule.get_child_blocks(schedule.get_sblock("root", func_name="main")):
        statement = schedule.get(block)
        if statement.init is None or not _may_be_empty(statement):
            continue
        loops = schedule.get_loops(block)
        spatial = sum(not _is_reduction(axis) for axis in statement.iter_vars)
        if len(loops) != len(statement.iter_vars):
            continue
        schedule.decompose_reduction(block, loops[spatial])
    return schedule.mod["main"]
