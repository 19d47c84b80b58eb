"""CPUs: a library for the Relax virtual machine, and packed weights it shares with ``model.onnx``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qcompile import tensors
from qcompile.backends import Backend, Job
from qcompile.errors import ArtifactError, TargetError
from qcompile.runtime import Program, TensorSpec, aligned

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompile.targets.target import Target

MIN_FREE_BYTES = 50_000_000


class Cpu(Backend):
    """Compiles and loads programs for x86; other processors derive from it."""

    options: ClassVar[Mapping[str, str]] = {"name": "prefix of the symbols of the C library (model)"}
    emits = ("c",)

    def emit(self, job: Job) -> None:
        """Write library, weights, ``model.onnx`` and ``program.json``."""
        from qcompile.codegen.program import build_program
        from qcompile.passes.lower import lower
        from qcompile.passes.lower.cache import keep_cache

        with job.stage("lower"):
            lowered = lower(job.quantized, codes=True, factors=True, experts=True)
            job.save("lowered", lowered)
        with job.stage("generate code"):
            program = build_program(lowered, job.target, keep_cache(lowered))
            # Weights first: a full disk is then met by code that can say so; the code generator would abort the process.
            places = tensors.save(job.folder / "weights.safetensors", program.params)
            require_space(job.folder, Path(tempfile.gettempdir()))
            (job.folder / "lib").mkdir()
            program.export(job.folder / "lib" / "model.so", self.linker(job.target))
            job.report.tensors = {name: place.length for name, place in places.items()}
            save_onnx(program, places, job.quantized, job.folder)
            write_program(job.folder, program, job.target, program.relax.step)
            describe(job.report, program)
        if "c" in job.emit:
            from qcompile.codegen.cexport.emit import write_library

            with job.stage("write the C library"):
                name = job.options.get("name", "model")
                write_library(program.relax, job.target, job.folder / "c", name, Path(job.report.model).name)

    def linker(self, target: Target) -> Callable[[str, list[str]], None] | None:
        """What links objects into a shared library, for other machines than this one."""
        return None

    def check(self, target: Mapping[str, Any]) -> None:
        """Raise `TargetError` unless this machine runs programs for ``target``."""
        check_machine(target)

    def load(self, folder: Path, target: Mapping[str, Any]) -> Program:
        """Load library and weights."""
        self.check(target)
        content = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        functions = [content, *([content["step"]] if "step" in content else [])]
        arrays = tensors.load(folder / "weights.safetensors")
        wanted = {name for function in functions for name in function["parameters"]}
        if missing := sorted(wanted - arrays.keys()):
            raise ArtifactError(f"{folder / 'weights.safetensors'} lacks the tensor {missing[0]!r}")
        weights = {name: aligned(arrays[name]) for name in wanted}
        main, *steps = ((*_specs(f), [weights[name] for name in f["parameters"]]) for f in functions)
        program = Program(folder / "lib" / "model.so", *main)
        if steps:
            program.step = program.function("step", *steps[0], content["step"]["written"])
        return program


def _specs(function: Mapping[str, Any]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a function as ``program.json`` states them."""
    inputs, outputs = (
        [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in function[key]] for key in ("inputs", "outputs")
    )
    return inputs, outputs


def check_machine(target: Mapping[str, Any]) -> None:
    """Fail if this machine lacks an instruction-set feature the program uses.

    Raises:
        TargetError: naming the target, what is missing, and what to do.
    """
    if target["kind"] != "x86":
        raise TargetError(f"the program was compiled for {target['kind']}/{target['cpu']}, not for this machine")
    from qcompile.targets.x86 import host_features

    if missing := sorted(set(target["features"]) - host_features()):
        raise TargetError(
            f"the program was compiled for {target['kind']}/{target['cpu']}; this machine lacks {', '.join(missing)}: "
            "compile again for `native`, or for `x86-64-v3`, which every x86 machine with AVX2 runs"
        )


def save_onnx(program: Any, places: Mapping[str, Any], quantized: ir.Model, folder: Path) -> None:
    """Write ``model.onnx``: the quantized model with its weights read from ``weights.safetensors``."""
    import onnx_ir as ir

    def external(name: str) -> ir.ExternalTensor:
        array, place = program.params[name], places[name]
        return ir.ExternalTensor(
            "weights.safetensors",
            place.offset,
            place.length,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=f"packed.{name}",
            base_dir=folder,
        )

    ir.save(program.share_weights(quantized, external), folder / "model.onnx")


def write_program(folder: Path, program: Any, target: Any, step: Any = None) -> None:
    """Write ``program.json``: what the library and its function ``step`` take and return, and which products it computes."""
    shapes = (
        (p.k, p.n, str(p.weight), str(p.activation))
        for p in dict.fromkeys(record.problem for record in program.linears)
    )
    content = {
        "inputs": [dataclasses.asdict(s) for s in program.inputs],
        "outputs": [dataclasses.asdict(s) for s in program.outputs],
        "parameters": [name for name in program.params if step is None or name not in step.extra],
        "target": {"kind": target.kind, "cpu": target.cpu, "features": sorted(target.features)},
        "products": [dict(zip(("k", "n", "weight", "activation"), shape)) for shape in dict.fromkeys(shapes)],
    }
    if step is not None:
        content["step"] = {
            "inputs": [dataclasses.asdict(s) for s in step.inputs],
            "outputs": [dataclasses.asdict(s) for s in step.outputs],
            "parameters": step.params,
            "written": step.written,
        }
    text = json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"
    (folder / "program.json").write_text(text, encoding="utf-8")


def require_space(*folders: Path) -> None:
    """Fail if a disk has no room for the library and its object files.

    Raises:
        ArtifactError: naming the folder.
    """
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < MIN_FREE_BYTES:
            raise ArtifactError(
                f"the disk of {folder} has {free / 1e6:.0f} MB left; {MIN_FREE_BYTES / 1e6:.0f} MB are needed"
            )


def describe(report: Any, program: Any) -> None:
    """Enter the kernels chosen, and those refused, into the report's layers."""
    layers = {layer.name: layer for layer in report.layers}
    for use in program.linears:
        report.kernels[use.family.name] = report.kernels.get(use.family.name, 0) + 1
        for name in use.sites:
            if (layer := layers.get(name)) is not None:
                layer.kernel, layer.kernel_reason, layer.refused = use.family.name, use.reason, dict(use.refused)
    for name, count in program.kernels.items():
        report.kernels[name] = report.kernels.get(name, 0) + count
    for what, where, reason in program.refusals:
        report.refuse(what, where, reason)
