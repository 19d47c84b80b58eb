"""Run ARM kernels on numpy arrays, on this machine if it is one or under qemu, and count their instructions.

    program = Executable({"gemm": primfunc}, target)
    program.call("gemm", x, scale, weight, out)           # out is overwritten
    program.counts({"gemm": [x, scale, weight, out]})     # instructions executed inside each function

Counts are exact and the same in every run; they say how much work a kernel is, not how long it takes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.codegen.cexport.extents import evaluate
from qcompile.codegen.cexport.kernels import Kernel, build_object
from qcompile.errors import TargetError
from qcompile.targets import arm
from qcompile.targets.target import Target

HERE = Path(__file__).parent
INTEGER = (1 << 64) - 1

Call = tuple[str, Sequence[np.ndarray]]


class Executable:
    """PrimFuncs compiled for an ARM target and linked with ``driver.c``.

    Args:
        functions: PrimFuncs by name, built for one core.
        target: the machine.
        sources: further C files to link, with kernels of the same signature named in ``extra``.
        flags: arguments of the C compiler for those.

    Raises:
        TargetError: there is no compiler or no emulator.
    """

    def __init__(
        self,
        functions: Mapping[str, Any],
        target: Target,
        extra: Iterable[str] = (),
        objects: Iterable[Path] = (),
        flags: Sequence[str] = (),
    ) -> None:
        self.target = target
        self._run = arm.emulator(target)
        self._folder = Path(tempfile.mkdtemp(prefix="qcompile-arm-"))
        weakref.finalize(self, shutil.rmtree, self._folder, True)
        self.kernels: dict[str, Kernel] = {}
        linked = list(objects)
        if functions:
            module, self.kernels = build_object(functions, target)
            module.write_to_file(str(self._folder / "kernels.o"))
            self.assembly = module.inspect_source("asm")
            linked.append(self._folder / "kernels.o")
        self._names = [*self.kernels, *extra]
        source = self._folder / "main.c"
        declared = "".join(f"extern int {name}();\n" for name in self._names)
        table = ", ".join(f"(kernel){name}" for name in self._names)
        source.write_text(
            f"typedef int (*kernel)();\n{declared}static const kernel kernels[] = {{{table}}};\n"
            f'#include "{HERE / "driver.c"}"\n'
        )
        self._program = self._folder / "program"
        cc = arm.static_compiler(target)
        cc.run("-O1", "-std=gnu11", "-w", *cc.static, *flags, source, *linked, "-o", self._program, "-lm", "-lpthread")

    def call(self, name: str, *arrays: np.ndarray, offset: int = 0) -> None:
        """Call one kernel; the arrays that are outputs are overwritten."""
        self.calls([(name, arrays)], offset)

    def calls(self, calls: Sequence[Call], offset: int = 0, repeat: int = 1, qemu: Sequence[str] = ()) -> str:
        """Make several calls in one process; returns what it printed.

        Args:
            calls: (name, arrays in the order of the kernel's buffers).
            offset: distance of every array's address from a multiple of 64 bytes.
            repeat: times each call is made.
            qemu: further arguments of the emulator.

        Raises:
            TargetError: the program ended abnormally.
            IndexError: a kernel refused its arguments.
        """
        cases, results = self._folder / "cases", self._folder / "results"
        writable: list[np.ndarray] = []
        with open(cases, "wb") as file:
            file.write(np.uint64(len(calls)).tobytes())
            for name, arrays in calls:
                arguments = self._arguments(name, arrays)
                file.write(np.array([self._names.index(name), repeat, len(arguments)], np.uint64).tobytes())
                for value in arguments:
                    if isinstance(value, int):
                        file.write(np.array([INTEGER, value % (1 << 64)], np.uint64).tobytes())
                    else:
                        data = np.ascontiguousarray(value)
                        file.write(np.array([data.nbytes, offset], np.uint64).tobytes())
                        file.write(data.tobytes())
                        writable.append(value)
        command = [*self._run[:1], *qemu, *self._run[1:]] if self._run else []
        done = subprocess.run([*command, self._program, cases, results], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"the kernels ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        answer = memoryview(results.read_bytes())
        for array in writable:
            array[...] = np.frombuffer(answer[: array.nbytes], array.dtype).reshape(array.shape)
            answer = answer[array.nbytes :]
        self._check(calls, writable)
        return done.stdout + done.stderr

    def counts(self, calls: Mapping[str, Sequence[np.ndarray]]) -> dict[str, int]:
        """Instructions executed in each function of the program while the calls were made.

        Raises:
            TargetError: this machine is no emulated one, or there is no C compiler for the plugin.
        """
        if not self._run:
            raise TargetError("instructions are counted under qemu, not on an ARM machine")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise TargetError("counting instructions needs a C compiler for this machine")
        plugin = self._folder / "count.so"
        if not plugin.exists():
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", plugin, HERE / "count.c"], check=True)
        printed = self.calls(list(calls.items()), qemu=("-plugin", str(plugin), "-d", "plugin"))
        found = (line.split() for line in printed.splitlines() if line.startswith("count "))
        return {name: int(number) for _, name, number in found}

    def _arguments(self, name: str, arrays: Sequence[np.ndarray]) -> list[Any]:
        kernel = self.kernels.get(name)
        if kernel is None:
            return list(arrays)
        values: dict[Any, int] = {}
        for buffer, array in zip(kernel.buffers, arrays, strict=True):
            for extent, have in zip(buffer.shape, array.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    values.setdefault(extent, have)
        scratch = []
        for buffer in kernel.scratch:
            kind, _, lanes = buffer.dtype.partition("x")
            size = int(np.prod([evaluate(e, values) for e in buffer.shape], dtype=np.int64)) * int(lanes or 1)
            scratch.append(np.full(size, 77, kind))
        failed = [np.zeros(1, np.int32)] if kernel.checks else []
        return [*arrays, *scratch, *failed, *(values[v] for v in kernel.extents)]

    def _check(self, calls: Sequence[Call], written: list[np.ndarray]) -> None:
        rest = iter(written)
        for name, arrays in calls:
            kernel = self.kernels.get(name)
            for _ in range(len(arrays) + (len(kernel.scratch) if kernel else 0)):
                next(rest)
            if kernel and kernel.checks and (number := int(next(rest)[0])):
                raise IndexError(kernel.checks[number - 1][1])
