"""From a Relax program to machine code: legalize, fuse, schedule, plan memory, build."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompile.codegen.relax.initialization import initialize_empty_reductions
from qcompile.codegen.relax.program import RelaxProgram
from qcompile.codegen.relax.shape_functions import order_shape_functions
from qcompile.targets.target import Target


def compile_relax(
    program: RelaxProgram | tvm.IRModule,
    target: Target | None = None,
    *,
    fuse: bool = True,
    schedule: bool = True,
    opt_level: int = 3,
) -> Any:
    """Compiles a program; run it with ``relax.VirtualMachine(executable, tvm.cpu())["main"](*inputs, *params)``.

    Args:
        program: what :func:`to_relax` returned (its module is not modified).
        target: the machine; this one's LLVM default when ``None``.
        fuse: merge chains of element-wise kernels into one kernel each.
        schedule: apply the target's schedules (loops parallel, vectorised, tiled); without it kernels stay plain loops.
        opt_level: LLVM's optimisation level.

    Returns:
        A ``tvm.runtime.Executable``.
    """
    mod = program.mod if isinstance(program, RelaxProgram) else program
    tvm_target = target.tvm() if target is not None else tvm.target.Target("llvm")
    if opt_level != 3:
        tvm_target = tvm.target.Target({**_as_dict(tvm_target), "opt-level": opt_level})
    with tvm_target, tvm.transform.PassContext(opt_level=3):
        mod = lower(mod, fuse=fuse)
        if schedule and target is not None:
            mod = _schedule(mod, target)
        mod = initialize_empty_reductions(mod)
        return tvm.compile(mod, target=tvm_target, relax_pipeline=tvm.transform.Sequential(_build_passes()))


def lower(mod: tvm.IRModule, *, fuse: bool = True) -> tvm.IRModule:
    """The target-independent passes: every operator a kernel, chains of kernels fused."""
    entries = [name for name in ("main", "step") if name in mod]
    passes = [
        relax.transform.EliminateCommonSubexpr(),
        # a reshape stays one: the virtual machine makes a view of it
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.DeadCodeElimination(entries),
    ]
    if fuse:
        passes += [
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(entries),
        ]
    return tvm.transform.Sequential(passes)(mod)


def _build_passes() -> list[Any]:
    """What brings a module of kernels and calls to the virtual machine."""
    t = relax.transform
    return [
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        order_shape_functions,
        t.AttachGlobalSymbol(),
    ]


def _schedule(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """The schedules of the target's kind, where there are any."""
    if target.kind not in ("x86", "arm"):
        return mod
    try:
        from qcompile.codegen.relax.schedule_cpu import schedule_cpu
    except ModuleNotFoundError as error:
        if error.name != "qcompile.codegen.relax.schedule_cpu":
            raise
        return mod
    return schedule_cpu(mod, target)


def _as_dict(target: tvm.target.Target) -> dict[str, Any]:
    return {str(k): v for k, v in target.export().items()}
