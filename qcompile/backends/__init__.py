"""What turns a quantized model into the files of an artifact, and those into something that runs: a module per kind of target.

A backend writes ``model.onnx``, ``program.json`` and whatever its machine needs into the artifact's folder. Modules are
imported when they are used, and loading a program must not import what only compiling needs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qcompile.errors import TargetError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from qcompile.report import Report
    from qcompile.runtime import TensorSpec
    from qcompile.targets.target import Target

__all__ = ["Backend", "Job", "Runner", "get_backend"]

BACKENDS = {
    "x86": "qcompile.backends.cpu:Cpu",
    "arm": "qcompile.backends.arm:Arm",
    "cuda": "qcompile.backends.cuda:Cuda",
    "fpga": "qcompile.backends.fpga:Fpga",
}
"""Where the backend of each kind of target is."""


@dataclass
class Job:
    """One model to emit.

    Attributes:
        folder: the artifact's folder, being written.
        quantized: the quantized stage.
        target: the machine.
        report: receives kernels, refusals and sizes.
        options: what the user chose for this backend (see `Backend.options`).
        emit: other forms wanted (``c`` ...); the compiler itself handles ``mlir``.
        save: keeps a named stage, if the user wants stages.
        stage: shows progress of a named step.
        feeds: calibration samples, for backends that measure once more.
    """

    folder: Path
    quantized: ir.Model
    target: Target
    report: Report
    options: Mapping[str, Any] = field(default_factory=dict)
    emit: tuple[str, ...] = ()
    save: Callable[[str, ir.Model], None] = lambda name, model: None
    stage: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    feeds: Sequence[Mapping[str, np.ndarray]] = ()


class Runner(Protocol):
    """A loaded program."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with inputs by position or by name."""
        ...


class Backend(ABC):
    """The last stages of the pipeline for one kind of target.

    Attributes:
        options: names of the options it takes, with a line of help each.
        emits: other forms it can write.
    """

    options: ClassVar[Mapping[str, str]] = {}
    emits: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def emit(self, job: Job) -> None:
        """Write everything but the report and the manifest into ``job.folder``.

        Raises:
            UnsupportedOperatorError: an operator cannot be compiled for the target.
            ArtifactError: the disk is full.
        """

    @abstractmethod
    def load(self, folder: Path, target: Mapping[str, Any]) -> Runner:
        """Load the program from an artifact, complete or being written.

        Args:
            folder: the artifact.
            target: kind, cpu and features it was compiled for.

        Raises:
            TargetError: this machine cannot run it.
            ArtifactError: something is missing.
        """

    def check_tools(self, target: Target) -> None:
        """Fail before anything is computed if a tool that compiling for ``target`` takes is missing here.

        Raises:
            TargetError: naming it, and how to install it.
        """
        return  # most need none

    def check_options(self, options: Mapping[str, Any], emit: tuple[str, ...]) -> None:
        """Refuse what this backend does not know.

        Raises:
            TargetError: naming the option and those there are.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise TargetError(f"this target has no option {name!r}; it has: {known}")
        for form in emit:
            if form not in self.emits:
                raise TargetError(
                    f"this target cannot emit {form!r}; it can: {', '.join(self.emits) or 'nothing else'}"
                )


def get_backend(kind: str) -> Backend:
    """The backend for targets of ``kind``.

    Raises:
        TargetError: there is none.
    """
    if kind not in BACKENDS:
        raise TargetError(f"nothing compiles for targets of kind {kind!r}; known kinds: {', '.join(BACKENDS)}")
    module, name = BACKENDS[kind].split(":")
    return getattr(importlib.import_module(module), name)()
