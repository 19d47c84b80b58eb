"""From a lowered model to a program: library, packed weights, and how to read those weights back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.codegen.onnx_export import StoredExperts, StoredWeight, share_weights, unchanged
from qcompile.codegen.relax import (
    compile_relax,
    convolutions,  # noqa: F401  (registers its converters)
    experts,  # noqa: F401  (the same)
    to_relax,
)
from qcompile.codegen.relax.kernels import KernelCalls, LinearRecord
from qcompile.codegen.relax.program import RelaxProgram, TensorSpec
from qcompile.errors import QcompileError
from qcompile.targets.target import Target


@dataclass
class BuiltProgram:
    """A compiled program that is not on disk yet.

    Attributes:
        relax: the converted model.
        executable: TVM executable.
        params: packed weights in the order ``main`` takes them, then those that only ``step`` takes.
        inputs, outputs: what it takes and returns.
        linears: one record per linear kernel.
        kernels: uses of the other kernels.
        refusals: what was left to general code: (what, where, reason).
    """

    relax: RelaxProgram
    executable: Any
    params: dict[str, np.ndarray]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    linears: list[LinearRecord]
    kernels: Counter[str]
    refusals: list[tuple[str, str, str]]

    def export(self, path: str | os.PathLike[str], link: Callable[[str, list[str]], None] | None = None) -> None:
        """Link the shared library.

        Args:
            path: where to put it.
            link: for other machines than this one: links objects (second argument) into a shared library (first).
        """
        if link is None:
            # -s: symbols are a fifth of the file; --build-id would be one more thing to differ between equal compiles.
            self.executable.export_library(os.fspath(Path(path)), options=["-s", "-Wl,--build-id=none"])
        else:
            self.executable.export_library(os.fspath(Path(path)), fcompile=lambda out, files, **_: link(out, files))

    def share_weights(self, model: ir.Model, external: Callable[[str], ir.ExternalTensor]) -> ir.Model:
        """The quantized ``model`` with its weights read from `params`; see `codegen.onnx_export`."""
        stored = {name: place for record in self.linears for name, place in _places(record)}
        return share_weights(model, stored, external, unchanged(model, self.params))


def build_program(lowered: ir.Model, target: Target, step: ir.Model | None = None) -> BuiltProgram:
    """Convert, choose kernels, pack weights and generate code.

    Args:
        step: the same as a step that appends to its cache in place, a second function of the program if it can be converted.

    Raises:
        UnsupportedOperatorError: an operator has no conversion.
    """
    refused = []
    try:
        program = to_relax(lowered, target=target, step=step)
    except QcompileError as error:
        if step is None:
            raise
        program = to_relax(lowered, target=target)
        refused.append(("keep the cache in place", "decoding step", str(error)))
    calls = program.state.get(KernelCalls) or KernelCalls()
    executable = compile_relax(program, target)
    return BuiltProgram(
        program, executable, program.params, program.inputs, program.outputs, calls.linears, calls.uses,
        [*calls.refusals, *refused],
    )  # fmt: skip


def _places(record: LinearRecord) -> list[tuple[str, StoredWeight]]:
    """Where each of the merged weights of a kernel lies."""
    codes = record.family.stored(record.problem, record.config)
    if codes is None:
        return []
    if record.experts:
        return [(name, StoredExperts(codes, record.packed, 0, record.problem.n)) for name in record.weights]
    found, start = [], 0
    for name, width in zip(record.weights, record.parts):
        found.append((name, StoredWeight(codes, record.packed, start, start + width)))
        start += width
    return found
