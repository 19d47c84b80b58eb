"""From a lowered model to a CUDA program: a host library with the Relax virtual machine's code, a library of kernels.

    linear, row kernels, attention    TIRx            sources of their own, cached, called by name
    everything else                   Relax, dlight   one source
    control, shapes, memory plan      Relax VM        the host library, machine code of this machine

Sources are compiled by nvcc into one library of kernels that needs tvm_ffi and the driver, so that neither a GPU nor
TVM's CUDA run-time is needed to compile.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcompile.codegen.kernels.cuda import attention, build, rowwise
from qcompile.codegen.kernels.cuda.plan import Plan
from qcompile.codegen.onnx_export import share_weights, unchanged
from qcompile.codegen.onnx_export_cuda import places
from qcompile.codegen.relax import cuda as converters
from qcompile.codegen.relax import to_relax
from qcompile.codegen.relax.kernels import KernelCalls, LinearRecord
from qcompile.codegen.relax.pipeline import _build_passes, lower
from qcompile.codegen.relax.program import TensorSpec
from qcompile.targets.cuda import CudaTarget


@dataclass
class CudaProgram:
    """A compiled program that is not on disk yet.

    Attributes:
        executable: host code.
        sources: CUDA sources of the kernels.
        params: packed weights and scratch, in the order ``main`` takes them after its inputs.
        inputs, outputs: what it takes and returns.
        linears, kernels, refusals: for the report.
        target: what for.
    """

    executable: Any
    sources: list[Path]
    params: dict[str, np.ndarray]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    linears: list[LinearRecord]
    kernels: Counter[str]
    refusals: list[tuple[str, str, str]]
    target: CudaTarget

    def export(self, folder: Path) -> None:
        """Write ``model.so`` and ``kernels.so``.

        Raises:
            TargetError: nvcc is missing or refuses a source.
        """
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda path: build.compile_object(path, self.target), self.sources))
        build.link(objects, folder / "kernels.so")
        self.executable.export_library(str(folder / "model.so"), options=["-s", "-Wl,--build-id=none"])

    def share_weights(self, model: ir.Model, external: Callable[[str], ir.ExternalTensor]) -> ir.Model:
        """The quantized ``model`` with its weights read from `params`; see `codegen.onnx_export_cuda`."""
        stored = {name: place for record in self.linears for name, place in places(record, self.params).items()}
        return share_weights(model, stored, external, unchanged(model, self.params))


def build_cuda_program(lowered: ir.Model, target: CudaTarget) -> CudaProgram:
    """Convert, choose kernels, pack weights and generate sources.

    Raises:
        UnsupportedOperatorError: an operator has no conversion.
    """
    program = to_relax(lowered, target=target)
    state = program.state.get(KernelCalls) or KernelCalls()
    cuda = program.state.get(converters.CudaCalls) or converters.CudaCalls()
    sources = [_linear_source(plan, name, target) for name, plan in cuda.plans.items()]
    if cuda.rowwise:
        sources.append(rowwise.source(cuda.rowwise, target))
    if cuda.attention:
        sources.append(attention.source(cuda.attention, target))
    executable, scheduled = _compile_rest(program.mod, target)
    if scheduled:
        sources.append(build.text_source(build.generate_scheduled(scheduled, target), target))
    return CudaProgram(
        executable, sources, program.params, program.inputs, program.outputs, state.linears, state.uses,
        state.refusals, target,
    )  # fmt: skip


def _linear_source(plan: Plan, name: str, target: CudaTarget) -> Path:
    """The kernels of a plan and a function ``name`` that picks one by the rows of its first argument."""
    dispatch = build.dispatch(name, [(entry.rows, f"{name}_{entry.symbol}") for entry in plan.entries])
    make = lambda: plan.functions(f"{name}_")  # noqa: E731
    described = {"plan": plan.describe(), "name": name}
    blocks = {"resident": plan.resident(f"{name}_"), "clusters": plan.clusters(f"{name}_")}
    return build.source(described, make, target, dispatch, **blocks)


def _compile_rest(mod: tvm.IRModule, target: CudaTarget) -> tuple[Any, dict[str, Any]]:
    """The host executable, and the scheduled PrimFuncs it calls by name."""
    with target.tvm_scheduling(), tvm.transform.PassContext(opt_level=3):
        mod = _schedule(lower(mod), target)
        before = {g.name_hint for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
        mod = tvm.transform.Sequential(_build_passes())(mod)
    device = {
        g: f for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and g.name_hint in before
    }  # what the passes added computes shapes, on the host
    host = _Externs({g.name_hint for g in device}).transform(mod)
    functions = {g.name_hint: f.with_attr("global_symbol", g.name_hint) for g, f in device.items()}
    cpu = tvm.target.Target("llvm")
    with cpu, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(host, target=cpu, relax_pipeline=tvm.transform.Sequential([]))
    return executable, functions


def _schedule(mod: tvm.IRModule, target: CudaTarget) -> tvm.IRModule:
    """Bind loops to blocks and threads by dlight's rules.

    Their reductions across threads take the usual combiners only, and those of ONNX that see NaN differ: a function that
    cannot be lowered gets a thread per element.
    """
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Transpose(), gpu.Fallback())
    plain = dict(mod.functions_items())  # the rules change the module they are given
    scheduled = dlight.ApplyDefaultSchedule(*rules)(mod)
    for var, function in scheduled.functions_items():
        if isinstance(function, tirx.PrimFunc) and not _compiles(function, target):
            scheduled.update_func(var, _thread_per_element(plain[var]))
    return scheduled


def _thread_per_element(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Every thread computes one element of the result, and in registers what that takes: one kernel, no memory between."""
    from tvm.s_tir import Schedule
    from tvm.s_tir.dlight.analysis import normalize_prim_func
    from tvm.s_tir.dlight.base import try_inline

    schedule = Schedule(function)
    blocks = try_inline(schedule, normalize_prim_func(schedule))
    *before, last = [info.block_rv for info in blocks]
    loops = list(zip(schedule.get_loops(last), blocks[-1].dom_kind()))
    spatial = [loop for loop, kind in loops if kind == "S"] or [schedule.add_unit_loop(last)]
    schedule.reorder(*spatial, *[loop for loop, kind in loops if kind != "S"])
    block, thread = schedule.split(schedule.fuse(*spatial), factors=[None, 256])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    for producer in reversed(before):
        schedule.compute_at(producer, thread, preserve_unit_loops=True)
        schedule.set_scope(producer, 0, "local")
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def _compiles(function: tirx.PrimFunc, target: CudaTarget) -> bool:
    """Whether TVM can turn a scheduled function into CUDA."""
    with target.tvm():
        try:
            tvm.compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), target=target.tvm())
        except (ValueError, RuntimeError):
            return False
    return True


@mutator
class _Externs(PyExprMutator):
    """Calls of device functions become calls by name."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def transform(self, mod: tvm.IRModule) -> tvm.IRModule:
        """A module of the other functions."""
        kept = {}
        for var, function in mod.functions_items():
            if var.name_hint not in self.names:
                kept[var] = self.visit_expr(function) if isinstance(function, relax.Function) else function
        return tvm.IRModule(kept, attrs=mod.attrs)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """See the class."""
        call = self.visit_expr_post_order(call)
        if isinstance(call.op, tvm.ir.GlobalVar) and call.op.name_hint in self.names:
            return relax.Call(relax.ExternFunc(call.op.name_hint), call.args, call.attrs, call.ty_args)
        return call
