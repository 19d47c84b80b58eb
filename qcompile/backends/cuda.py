"""NVIDIA GPUs: a library of kernels, host code for the Relax virtual machine, packed weights.

Compiling needs nvcc and no GPU. Running needs torch with CUDA, whose tensors go in and come out without copies, on torch's
current stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile import tensors
from qcompile.backends import Backend, Job
from qcompile.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompile.runtime_cuda import CudaProgram

WORKSPACE = "workspace."


class Cuda(Backend):
    """Compiles and loads programs for CUDA."""

    def emit(self, job: Job) -> None:
        """Write kernels, host library, weights, ``model.onnx`` and ``program.json``."""
        from qcompile.backends.cpu import describe, save_onnx, write_program
        from qcompile.codegen.kernels.cuda.kronecker import refusal
        from qcompile.codegen.program_cuda import build_cuda_program
        from qcompile.passes.lower import lower
        from qcompile.targets.cuda import CudaTarget

        assert isinstance(job.target, CudaTarget)
        with job.stage("lower"):
            target = job.target
            lowered = lower(job.quantized, factors=True, mixes=lambda *row: not refusal(*row, target))
            job.save("lowered", lowered)
            _report_products(job, lowered)
            for node in lowered.graph:
                if node.op_type == "ExpertMatMul":
                    reason = "there is no kernel: the codes that are picked become floats, at a byte each in memory"
                    job.report.refuse("kernel of experts", node.name or "experts", reason)
        with job.stage("generate code"):
            program = build_cuda_program(lowered, job.target)
            weights = {name: a for name, a in program.params.items() if not name.startswith(WORKSPACE)}
            places = tensors.save(job.folder / "weights.safetensors", weights)
            job.report.tensors = {name: place.length for name, place in places.items()}
        with job.stage("compile kernels"):
            (job.folder / "lib").mkdir()
            program.export(job.folder / "lib")
            scratch = {name: a for name, a in program.params.items() if name.startswith(WORKSPACE)}
            write_program(job.folder, program, job.target)
            _add(job.folder / "program.json", scratch={n: [list(a.shape), str(a.dtype)] for n, a in scratch.items()})
            save_onnx(program, places, job.quantized, job.folder)
            describe(job.report, program)

    def load(self, folder: Path, target: Mapping[str, Any]) -> CudaProgram:
        """Load kernels, host library and weights onto torch's current device."""
        check_machine(target)
        from qcompile.runtime import TensorSpec
        from qcompile.runtime_cuda import CudaProgram

        content = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        arrays = tensors.load(folder / "weights.safetensors")
        names = [n for n in content["parameters"] if n not in content["scratch"]]
        if missing := [n for n in names if n not in arrays]:
            raise ArtifactError(f"{folder / 'weights.safetensors'} lacks the tensor {missing[0]!r}")
        inputs, outputs = (
            [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in content[key]]
            for key in ("inputs", "outputs")
        )
        parameters = [content["scratch"].get(n) or arrays[n] for n in content["parameters"]]
        return CudaProgram(folder / "lib", parameters, inputs, outputs)


def check_machine(target: Mapping[str, Any]) -> None:
    """Fail unless torch's current device executes code for ``target``.

    Raises:
        TargetError: naming what is missing.
    """
    try:
        import torch
    except ImportError:
        raise TargetError(f"programs for {target['cpu']} need torch with CUDA to run; it is not installed") from None
    if not torch.cuda.is_available():
        raise TargetError(f"the program was compiled for {target['cpu']}; torch sees no CUDA device here")
    number = target["cpu"].removeprefix("sm_")
    wanted = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
    have = torch.cuda.get_device_capability()
    same = have == wanted if number.endswith("a") else have[0] == wanted[0] and have[1] >= wanted[1]
    if not same:
        raise TargetError(
            f"the program was compiled for {target['cpu']}; this device has compute capability {have[0]}.{have[1]}: "
            f"compile again with --target cuda --arch sm_{have[0]}{have[1]}{'a' if have == (9, 0) else ''}"
        )


def _report_products(job: Job, lowered: ir.Model) -> None:
    """Kronecker products that no row kernel computes."""
    from qcompile.codegen.kernels.cuda.kronecker import refusal
    from qcompile.targets.cuda import CudaTarget

    assert isinstance(job.target, CudaTarget)
    for node in lowered.graph:
        if node.op_type != "Kronecker":
            continue
        ends = [v.shape[-1] if v is not None and v.shape is not None else None for v in node.inputs]
        reason = "what reads the product is not one quantizer"
        if all(isinstance(end, int) for end in ends) and len(ends) == 3:
            width, left, right = (int(str(end)) for end in ends)
            reason = refusal(width, (left, right), job.target) or reason
        job.report.refuse("row kernel of a Kronecker product", node.name or "Kronecker", reason)


def _add(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}, separators=(",", ":")) + "\n", encoding="utf-8")
