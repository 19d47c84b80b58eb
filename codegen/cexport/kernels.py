"""Kernels with a C ABI: one object file whose functions take raw pointers and depend on nothing but libm.

A PrimFunc becomes

    int32_t name(T *buffer..., U *scratch..., int32_t *failed, int64_t extent...)

with its buffers in order; one pointer per temporary that is too large for the stack or whose size is only known at run
time (`Kernel.scratch` says how many elements it needs); ``failed`` if it makes checks, which receives the number of the
first one that failed, counted from 1 (see `Kernel.checks`), and is left alone otherwise; then the extents its shapes leave
open. It always returns 0. Parallel loops become serial ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from qcompile.targets.target import Target

STACK_BYTES = 4096
"""Temporaries of constant size up to this many bytes live on the stack, unless the kernel put them there itself."""

ON_STACK = "disable_lower_builtin"


@dataclass(frozen=True)
class Buffer:
    """A pointer a kernel takes.

    Attributes:
        name: in the kernel.
        dtype: of its elements.
        shape: integers or TIR expressions over the kernel's extents.
    """

    name: str
    dtype: str
    shape: tuple[Any, ...]


@dataclass
class Kernel:
    """The C signature of one function; see the module docstring.

    Attributes:
        name: the symbol.
        buffers: inputs and outputs in order.
        scratch: temporaries the caller provides, aligned to 64 bytes.
        extents: TIR variables, passed as int64.
        checks: (kind of error, message) of the checks it makes.
    """

    name: str
    buffers: list[Buffer]
    scratch: list[Buffer] = field(default_factory=list)
    extents: list[Any] = field(default_factory=list)
    checks: list[tuple[str, str]] = field(default_factory=list)


def build_object(functions: Mapping[str, tirx.PrimFunc], target: Target) -> tuple[Any, dict[str, Kernel]]:
    """Compile functions for ``target``.

    Args:
        functions: by the symbol they get.
        target: the machine.

    Returns:
        The module (``write_to_file("x.o")``, ``inspect_source("asm")``) and the signatures by name.
    """
    machine = target.tvm()
    mod = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    mod = tirx.transform.BindTarget(machine.with_host(machine))(mod)
    mod = tvm.transform.Sequential(_to_loops())(mod)
    kernels: dict[str, Kernel] = {}
    plain = {}
    for variable, function in mod.functions_items():
        name = variable.name_hint
        plain[name], kernels[name] = _with_pointers(name, function)
    mod = tvm.transform.Sequential(_to_machine())(tvm.IRModule(plain))
    return tvm.target.codegen.build_module(mod, machine), kernels


def _to_loops() -> list[Any]:
    """TVM's own pipeline up to flat buffers whose lifetimes are known."""
    s, t = s_tir.transform, tirx.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.AnnotateIrregularLoop(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        t.StorageRewrite(),
    ]


def _to_machine() -> list[Any]:
    s, t = s_tir.transform, tirx.transform
    return [
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.FP8ComputeLegalize(),
        t.FP8StorageLegalize(),
        t.BF16StorageLegalize(),
        t.LowerIntrin(),
    ]


def _with_pointers(name: str, function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, Kernel]:
    """Replace buffer parameters by pointers, temporaries by parameters, and asserts by return codes."""
    kernel = Kernel(name, [])
    pointers, scalars, declared = [], [], []
    for param in function.params:
        if not tirx.is_buffer_var(param):
            scalars.append(param)
            continue
        pointer = tirx.Var(f"{param.name}_p", tirx.buffer_data_pointer_type(param))
        pointers.append(pointer)
        if isinstance(param.ty.elem_offset, tirx.Var):
            declared.append(tirx.Bind(param.ty.elem_offset, tirx.const(0, str(param.ty.elem_offset.ty.dtype))))
        declared.append(tirx.DeclBuffer(param, data=pointer))
        kernel.buffers.append(Buffer(param.name, str(param.ty.dtype), tuple(param.ty.shape)))
    scratch: list[Any] = []
    status = tirx.decl_buffer((1,), "int32", name="failed")
    failed = tirx.Var("failed_p", tirx.buffer_data_pointer_type(status))

    def allocate(node: tirx.AllocBuffer) -> Any:
        buffer, shape = node.buffer, node.buffer.ty.shape
        dtype = buffer.ty.dtype
        small = all(isinstance(e, tirx.IntImm) for e in shape)
        if small and ON_STACK not in (node.annotations or {}):
            size = tvm.runtime.DataType(str(dtype)).itemsize
            for e in shape:
                size *= int(e)
            small = size <= STACK_BYTES
        if small:
            return node
        pointer = tirx.Var(f"scratch{len(scratch)}_p", tirx.buffer_data_pointer_type(buffer))
        scratch.append(pointer)
        kernel.scratch.append(Buffer(f"scratch{len(scratch) - 1}", str(dtype), tuple(shape)))
        return tirx.DeclBuffer(buffer, data=pointer)

    def check(node: tirx.AssertStmt) -> Any:
        kernel.checks.append((str(node.error_kind.value), "".join(str(part.value) for part in node.message_parts)))
        report = tirx.BufferStore(status, tirx.const(len(kernel.checks), "int32"), [tirx.const(0, "int32")])
        leave = tirx.Return(tirx.const(0, "int32"))
        return tirx.IfThenElse(tirx.Not(node.condition), tirx.SeqStmt([report, leave]), None)

    def serial(node: tirx.For) -> Any:
        if node.kind != tirx.ForKind.PARALLEL:
            return node
        return tirx.For(node.loop_var, node.min, node.extent, tirx.ForKind.SERIAL, node.body)

    rewrites = [(tirx.AllocBuffer, allocate), (tirx.AssertStmt, check), (tirx.For, serial)]
    body = tvm_ffi.structural_map(function.body, rewrites, order="post")
    if kernel.checks:
        declared.append(tirx.DeclBuffer(status, data=failed))
    params = [*pointers, *scratch, *([failed] if kernel.checks else []), *scalars]
    open_extents = tirx.analysis.undefined_vars(tirx.SeqStmt([*declared, body]), params)
    kernel.extents = [*scalars, *open_extents]
    body = tirx.SeqStmt([*declared, body, tirx.Return(tirx.const(0, "int32"))])
    attrs = function.attrs
    made = tirx.PrimFunc([*params, *open_extents], body, ret_type=tvm.ir.PrimType("int32"), attrs=attrs)
    return made.with_attr("calling_conv", 0), kernel
