"""Write a program as a C library: kernels in an object file, a generated executor, a header, weights, and a CMake file.

    kernels.o       machine code, see `cexport.kernels`
    NAME.h NAME.c   the interface, and the calls in their order with a static memory plan (`cexport.plan`)
    weights.bin     packed weights and constants, each aligned to 64 bytes
    weights.S       the same as a symbol, for those who want one file
    CMakeLists.txt  a target NAME

The library needs a C compiler and libm. It runs on one core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tvm
from tvm import relax, tirx

from qcompile.codegen.cexport.extents import c_expression
from qcompile.codegen.cexport.kernels import Kernel, build_object
from qcompile.codegen.cexport.plan import ALIGNMENT, Call, Compare, Copy, Plan, Storage, make_plan
from qcompile.codegen.relax.initialization import initialize_empty_reductions
from qcompile.codegen.relax.pipeline import lower
from qcompile.codegen.relax.program import RelaxProgram
from qcompile.codegen.relax.schedule_cpu import schedule_cpu
from qcompile.errors import UnsupportedOperatorError
from qcompile.targets.target import Target

C_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "uint16_t",
    "bfloat16": "uint16_t",
    "bool": "uint8_t",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

_C99 = """auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while"""
_OWN = "w t at failed extents weights inputs outputs workspace"

KEYWORDS = frozenset((*_C99.split(), *_OWN.split()))
"""Words of C99, and what the executor itself calls its variables."""

FIRST_CHECK = 2
"""Status of the first check of a kernel; 1 is a negative extent."""


def write_library(program: RelaxProgram, target: Target, folder: Path, name: str, title: str = "") -> Plan:
    """Write the C library into ``folder``.

    Args:
        program: the converted model.
        target: the machine.
        folder: where to put the files; made if it is not there.
        name: prefix of all symbols, a C identifier.
        title: what to call the model in comments.

    Returns:
        What was planned.

    Raises:
        UnsupportedOperatorError: the program has control flow, or sizes that depend on values.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in KEYWORDS:
        raise UnsupportedOperatorError(f"{name!r} cannot prefix the symbols of a C library; give it a C identifier")
    function, module, kernels = build_kernels(program, target, name)
    plan = make_plan(function, kernels, [s.name for s in program.inputs], [s.name for s in program.outputs])
    folder.mkdir(parents=True, exist_ok=True)
    module.write_to_file(str(folder / "kernels.o"))
    offsets, size = _write_weights(folder / "weights.bin", plan, program.params)
    view = _Writer(plan, name, offsets).view()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), keep_trailing_newline=True
    )
    environment.filters["format_dot"] = lambda extent: f".{extent} = ..."
    view |= {"name": name, "title": title or name, "target": str(target), "weights_bytes": size}
    for template, output in (
        ("model.h.j2", f"{name}.h"),
        ("model.c.j2", f"{name}.c"),
        ("weights.S.j2", "weights.S"),
        ("CMakeLists.txt.j2", "CMakeLists.txt"),
    ):
        (folder / output).write_text(environment.get_template(template).render(view), encoding="utf-8")
    return plan


def build_kernels(program: RelaxProgram, target: Target, name: str) -> tuple[relax.Function, Any, dict[str, Kernel]]:
    """The straight ``main`` of a program, its kernels' machine code, and their signatures by name in ``main``."""
    machine = target.tvm()
    with machine, tvm.transform.PassContext(opt_level=3):
        mod = initialize_empty_reductions(schedule_cpu(lower(_main_alone(program)), target))
        mod = tvm.transform.Sequential([relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking()])(mod)
        functions = {v.name_hint: f for v, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
        others = [v.name_hint for v, f in mod.functions_items() if not isinstance(f, tirx.PrimFunc)]
        if others != ["main"]:
            raise UnsupportedOperatorError(f"the C library has no control flow; the program has functions {others}")
        module, kernels = build_object({f"{name}_{k}": f for k, f in functions.items()}, target)
    return mod["main"], module, {k: kernels[f"{name}_{k}"] for k in functions}


def _main_alone(program: RelaxProgram) -> tvm.IRModule:
    """A C library has no state: it calls ``main``."""
    if program.step is None:
        return program.mod
    functions = {v: f for v, f in program.mod.functions_items() if v.name_hint != "step"}
    return relax.transform.DeadCodeElimination(["main"])(tvm.IRModule(functions))


def _write_weights(path: Path, plan: Plan, params: dict[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """Write weights and constants; returns their offsets by name, and the size of the file."""
    arrays = list(params.values())
    offsets: dict[str, int] = {}
    with open(path, "wb") as file:
        for i, storage in enumerate(plan.weights):
            array = storage.data if storage.data is not None else arrays[i]
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offsets[storage.name] = file.tell()
            file.write(np.ascontiguousarray(array).tobytes())
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        return offsets, file.tell()


class _Writer:
    """Turns a plan into what the templates need."""

    def __init__(self, plan: Plan, name: str, offsets: dict[str, int]) -> None:
        self.plan, self.name, self.offsets = plan, name, offsets
        self.names = {var: field for var, field in zip(plan.extents, c_fields([v.name for v in plan.extents]))}
        self.fields: dict[int, str] = {}
        for storages in (plan.inputs, plan.outputs):
            for storage, field in zip(storages, c_fields([s.name for s in storages])):
                self.fields[id(storage)] = field
        self.messages = ["ok", "an extent is negative"]

    def view(self) -> dict[str, Any]:
        called = {s.kernel.name: s.kernel for s in self.plan.steps if isinstance(s, Call)}
        return {
            "extents": list(self.names.values()),
            "inputs": [self._tensor(s) for s in self.plan.inputs],
            "outputs": [self._tensor(s) for s in self.plan.outputs],
            "kernels": [{"symbol": k.name, "parameters": self._parameters(k)} for k in called.values()],
            "slots": [self._sizes(members) for members in self.plan.slots],
            "steps": [line for step in self.plan.steps for line in self._step(step)],
            "bad_extent": 1,
            "messages": [_quoted(m) for m in self.messages],
        }

    def _tensor(self, storage: Storage) -> dict[str, str]:
        shape = ", ".join(str(e) if isinstance(e, int) else c_expression(e, self.names) for e in storage.shape)
        return {
            "field": self.fields[id(storage)],
            "ctype": C_TYPES[storage.dtype],
            "describe": f"{storage.dtype}[{shape}]".replace("*/", "* /"),
            "bytes": self._bytes(storage),
        }

    def _sizes(self, members: Sequence[Storage]) -> list[str]:
        return list(dict.fromkeys(self._bytes(s) for s in members))

    def _bytes(self, storage: Storage) -> str:
        product = storage.element
        terms = []
        for extent in storage.shape:
            if isinstance(extent, int):
                product *= extent
            else:
                terms.append(c_expression(extent, self.names))
        return " * ".join([*terms, str(product)])

    @staticmethod
    def _parameters(kernel: Kernel) -> str:
        pointers = ["void *"] * (len(kernel.buffers) + len(kernel.scratch))
        failed = ["int32_t *"] if kernel.checks else []
        return ", ".join([*pointers, *failed, *["int64_t"] * len(kernel.extents)]) or "void"

    def _pointer(self, storage: Storage) -> str:
        if storage.kind == "input":
            return f"(void *)inputs->{self.fields[id(storage)]}"
        if storage.kind == "output":
            return f"outputs->{self.fields[id(storage)]}"
        if storage.kind == "weight":
            return f"(void *)(w + {self.offsets[storage.name]})"
        return f"t + at[{storage.slot}]"

    def _extent(self, value: Any) -> str:
        return str(value) if isinstance(value, int) else c_expression(value, self.names)

    def _step(self, step: Call | Compare | Copy) -> list[str]:
        if isinstance(step, Copy):
            target = step.target
            source = self._pointer(step.source.storage)
            return [f"memcpy({self._pointer(target)}, {source}, (size_t)({self._bytes(target)}));"]
        if isinstance(step, Compare):
            return self._compare(step)
        kernel = step.kernel
        arguments = [self._pointer(t.storage) for t in step.tensors] + [self._pointer(s) for s in step.scratch]
        arguments += ["&failed"] if kernel.checks else []
        arguments += [self._extent(e) for e in step.extents]
        lines = [f"{kernel.name}({', '.join(arguments)});"]
        if kernel.checks:
            first = self._status([message for _, message in kernel.checks])
            lines.append(f"if (failed) return failed + {first - 1};")
        return lines

    def _compare(self, step: Compare) -> list[str]:
        status = self._status(["the shapes of the inputs do not fit together"])
        at = f"((const {C_TYPES[step.tensor.dtype]} *)({self._pointer(step.tensor.storage)}))"
        return [
            f"if ({at}[{i}] != {self._extent(expected)}) return {status};" for i, expected in enumerate(step.expected)
        ]

    def _status(self, messages: list[str]) -> int:
        """Status of the first of ``messages``, which follow each other."""
        for start in range(FIRST_CHECK, len(self.messages)):
            if self.messages[start : start + len(messages)] == messages:
                return start
        self.messages += messages
        return len(self.messages) - len(messages)


def c_fields(names: Sequence[str]) -> list[str]:
    """C identifiers for names, all different."""
    found: list[str] = []
    for name in names:
        field = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
        if field[0].isdigit() or field in KEYWORDS:
            field = f"_{field}"
        base, number = field, 2
        while field in found:
            field, number = f"{base}_{number}", number + 1
        found.append(field)
    return found


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


__all__ = ["build_kernels", "c_fields", "write_library"]
