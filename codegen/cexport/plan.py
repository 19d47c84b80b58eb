"""From a Relax function to a list of kernel calls and a memory plan.

The function must be straight: calls of kernels (``call_tir``), views (``reshape``), tuples, and comparisons of shapes that
are only known at run time. Every temporary gets a *slot* of the workspace. Its life begins with the call that writes it
and ends with the last one that reads it or a view of it; temporaries whose lives do not meet may share a slot, which is as
large as the largest of them. Extents may be open, so the size of a slot is an expression; slots are matched by what sizes
would be at `NOMINAL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from qcompile.codegen.cexport.extents import evaluate
from qcompile.codegen.cexport.kernels import Kernel
from qcompile.errors import UnsupportedOperatorError

NOMINAL = 64
"""The value assumed for every open extent when slots are chosen."""

ALIGNMENT = 64


@dataclass
class Storage:
    """Memory that tensors live in.

    Attributes:
        kind: ``input``, ``output``, ``weight`` or ``workspace``.
        name: of the input, output or weight.
        dtype, shape: of the tensor that defined it; extents are integers or TIR expressions.
        data: content of a constant.
        begin, end: indices of the first and last step that use it.
        slot: number of the workspace slot.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[Any, ...]
    data: np.ndarray | None = None
    begin: int = 0
    end: int = 0
    slot: int = -1

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return int(tvm.runtime.DataType(self.dtype).itemsize)

    def nominal(self) -> int:
        """Bytes where every open extent is `NOMINAL`."""
        return int(np.prod([at_nominal(e) for e in self.shape], dtype=np.int64)) * self.element


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: its bytes with some shape."""

    storage: Storage
    dtype: str
    shape: tuple[Any, ...]


@dataclass
class Call:
    """One kernel call.

    Attributes:
        kernel: its signature.
        tensors: inputs and outputs in order.
        scratch: storage of its temporaries.
        extents: values of its open extents, as expressions over those of the program.
    """

    kernel: Kernel
    tensors: list[Tensor]
    scratch: list[Storage]
    extents: list[Any]


@dataclass
class Compare:
    """A check that elements of an int64 tensor are what the program was compiled to assume."""

    tensor: Tensor
    expected: list[Any]


@dataclass
class Copy:
    """An output that is an input, a weight, or another output."""

    source: Tensor
    target: Storage


@dataclass
class Plan:
    """What the executor does.

    Attributes:
        extents: open extents of the program, in the order they first appear in its inputs.
        inputs, outputs, weights: storage the caller provides; weights include constants.
        steps: in order.
        slots: members of every slot of the workspace.
    """

    extents: list[Any]
    inputs: list[Storage]
    outputs: list[Storage]
    weights: list[Storage]
    steps: list[Call | Compare | Copy] = field(default_factory=list)
    slots: list[list[Storage]] = field(default_factory=list)


def at_nominal(expr: Any) -> int:
    """The value of an extent where all open ones are `NOMINAL`."""
    if isinstance(expr, int):
        return expr
    return evaluate(expr, dict.fromkeys(tirx.analysis.undefined_vars(expr), NOMINAL))


def make_plan(
    function: relax.Function, kernels: dict[str, Kernel], inputs: Sequence[str], outputs: Sequence[str]
) -> Plan:
    """Plan ``function``, whose first parameters are ``inputs`` and the others weights.

    Raises:
        UnsupportedOperatorError: it has control flow, or sizes that depend on the values of tensors.
    """
    return _Planner(function, kernels, list(inputs), list(outputs)).plan


class _Planner:
    def __init__(
        self, function: relax.Function, kernels: dict[str, Kernel], inputs: list[str], outputs: list[str]
    ) -> None:
        self.kernels = kernels
        self.values: dict[Any, Any] = {}
        self.temporaries: list[Storage] = []
        storages = []
        for i, param in enumerate(function.params):
            kind, name = ("input", inputs[i]) if i < len(inputs) else ("weight", param.name)
            storages.append(Storage(kind, name, str(param.ty.dtype), _extents(param.ty.shape)))
            self.values[param] = _whole(storages[-1])
        self.plan = Plan([], storages[: len(inputs)], [], storages[len(inputs) :])
        for storage in self.plan.inputs:
            for extent in storage.shape:
                if isinstance(extent, tirx.Var) and not any(extent.same_as(e) for e in self.plan.extents):
                    self.plan.extents.append(extent)
        for block in function.body.blocks:
            for binding in block.bindings:
                self._bind(binding)
        self._finish(self._value(function.body.body), outputs)
        self._assign_slots()

    # Bindings

    def _bind(self, binding: Any) -> None:
        value = binding.value
        if isinstance(binding, relax.MatchCast):
            self.values[binding.var] = self._match(binding)
        elif isinstance(value, relax.Call):
            name = value.op.name if hasattr(value.op, "name") else str(value.op)
            handler = {
                "relax.call_tir": self._call_tir,
                "relax.reshape": self._reshape,
                "relax.tensor_to_shape": lambda call: ("shape", self._value(call.args[0])),
            }.get(name)
            if handler is None:
                raise UnsupportedOperatorError(
                    f"{binding.var.name}: the C library has no {name}; it holds straight programs of kernels only"
                )
            self.values[binding.var] = handler(value)
        elif isinstance(value, relax.If):
            raise UnsupportedOperatorError(f"{binding.var.name}: the C library has no control flow")
        else:
            self.values[binding.var] = self._value(value)

    def _value(self, expr: Any) -> Any:
        if isinstance(expr.ty, tvm.ir.PrimType):
            return int(expr) if isinstance(expr, tirx.IntImm) else expr
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return [self._value(e) for e in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return tuple(expr.values)
        if hasattr(expr, "value") and hasattr(expr.ty, "dtype"):
            return self._constant(expr)
        raise UnsupportedOperatorError(f"the C library has no {type(expr).__name__}")

    def _constant(self, expr: Any) -> Tensor:
        for storage in self.plan.weights:
            if storage.data is not None and storage.name == f"constant{id(expr)}":
                return _whole(storage)
        data = expr.value.numpy()
        known = next((s for s in self.plan.weights if s.data is not None and _same(s.data, data)), None)
        if known is None:
            number = sum(s.data is not None for s in self.plan.weights)
            known = Storage("weight", f"constant.{number}", str(data.dtype), data.shape, data)
            self.plan.weights.append(known)
        return _whole(known)

    def _reshape(self, call: relax.Call) -> Tensor:
        tensor = self._value(call.args[0])
        return Tensor(tensor.storage, tensor.dtype, tuple(self._value(call.args[1])))

    def _match(self, binding: relax.MatchCast) -> Any:
        value = self._value(binding.value)
        expected = _extents(binding.ty.shape) if hasattr(binding.ty, "shape") else tuple(binding.ty.values)
        if isinstance(value, Tensor):
            return Tensor(value.storage, value.dtype, expected)
        _, tensor = value
        for extent in expected:
            if not isinstance(extent, int):
                self._known(extent, "a shape that is computed at run time")
        step = len(self.plan.steps)
        self.plan.steps.append(Compare(tensor, list(expected)))
        tensor.storage.end = step
        return expected

    def _call_tir(self, call: relax.Call) -> Any:
        kernel = self.kernels[call.args[0].name_hint]
        operands = self._value(call.args[1])
        step = len(self.plan.steps)
        types = call.ty_args[0]
        single = not isinstance(types, relax.TupleType)
        results = []
        for ty in [types] if single else types.fields:
            shape = _extents(ty.shape)
            for extent in shape:
                self._known(extent, kernel.name)
            results.append(_whole(self._temporary(str(ty.dtype), shape, step)))
        tensors = [*(o for o in operands if isinstance(o, Tensor)), *results]
        # Scalars are the first extents of a kernel, in their order.
        bound: dict[Any, Any] = dict(zip(kernel.extents, (o for o in operands if not isinstance(o, Tensor))))
        for buffer, tensor in zip(kernel.buffers, tensors, strict=True):
            for extent, have in zip(buffer.shape, tensor.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    bound.setdefault(extent, have)
            tensor.storage.end = max(tensor.storage.end, step)
        if missing := [v.name for v in kernel.extents if v not in bound]:
            raise UnsupportedOperatorError(f"kernel {kernel.name}: nothing says what {missing[0]} is")
        scratch = []
        for buffer in kernel.scratch:
            kind, _, lanes = buffer.dtype.partition("x")
            shape = tuple(_substitute(e, bound) for e in buffer.shape)
            scratch.append(self._temporary(kind, (*shape, int(lanes or 1)), step))
        self.plan.steps.append(Call(kernel, tensors, scratch, [bound[v] for v in kernel.extents]))
        return results[0] if single else results

    def _temporary(self, dtype: str, shape: tuple[Any, ...], step: int) -> Storage:
        self.temporaries.append(Storage("workspace", f"t{len(self.temporaries)}", dtype, shape, None, step, step))
        return self.temporaries[-1]

    def _known(self, extent: Any, where: str) -> None:
        """Fail if an extent is not one of the program's inputs'."""
        if isinstance(extent, int):
            return
        for var in tirx.analysis.undefined_vars(extent):
            if not any(var.same_as(e) for e in self.plan.extents):
                raise UnsupportedOperatorError(
                    f"{where}: the extent {var.name} depends on values, and the C library plans its memory before it runs"
                )

    # Results and memory

    def _finish(self, result: Any, names: list[str]) -> None:
        tensors = result if isinstance(result, list) else [result]
        for name, tensor in zip(names, tensors, strict=True):
            storage = tensor.storage
            if storage.kind == "workspace":
                # The kernel writes straight to the caller's memory.
                storage.kind, storage.name = "output", name
                self.temporaries.remove(storage)
                self.plan.outputs.append(storage)
                storage.shape = tensor.shape
            else:
                output = Storage("output", name, tensor.dtype, tensor.shape)
                self.plan.outputs.append(output)
                self.plan.steps.append(Copy(tensor, output))

    def _assign_slots(self) -> None:
        free_from: list[int] = []  # first step at which a slot may be used again
        sizes: list[int] = []
        for storage in sorted(self.temporaries, key=lambda s: (s.begin, -s.nominal())):
            size = storage.nominal()
            free = [i for i, step in enumerate(free_from) if step < storage.begin]
            fitting = [i for i in free if sizes[i] >= size]
            if fitting:
                slot = min(fitting, key=lambda i: sizes[i])
            elif free:
                slot = max(free, key=lambda i: sizes[i])
            else:
                slot = len(self.plan.slots)
                self.plan.slots.append([])
                free_from.append(-1)
                sizes.append(0)
            storage.slot = slot
            self.plan.slots[slot].append(storage)
            sizes[slot] = max(sizes[slot], size)
            free_from[slot] = storage.end


def _extents(shape: Any) -> tuple[Any, ...]:
    return tuple(int(e) if isinstance(e, tirx.IntImm) else e for e in shape.values)


def _whole(storage: Storage) -> Tensor:
    return Tensor(storage, storage.dtype, storage.shape)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _substitute(expr: Any, bound: dict[Any, Any]) -> Any:
    """``expr`` over a kernel's extents as one over the program's."""
    if isinstance(expr, int):
        return expr
    values = {var: tirx.const(v, "int64") if isinstance(v, int) else v for var, v in bound.items()}

    def replace(var: tirx.Var) -> Any:
        return next((value for key, value in values.items() if key.same_as(var)), var)

    return tvm_ffi.structural_map(expr, (tirx.Var, replace))
