"""Runs small ONNX models through the Relax back end and compares them with ONNX's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompile.codegen.relax import RelaxProgram, compile_relax, to_relax
from qcompile.targets.target import Target


def parse(body: str, opset: int = 23) -> onnx.ModelProto:
    """A model from ONNX's text syntax for a graph."""
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {body}')


class Compiled:
    """A model compiled once, to be called with inputs of several shapes."""

    def __init__(self, model: onnx.ModelProto, target: Target | None = None, **options: Any) -> None:
        import tvm
        from tvm import relax

        self.model = model
        self.program: RelaxProgram = to_relax(ir.from_proto(model), target=target, **options)
        executable = compile_relax(self.program, target, schedule=False, opt_level=0)
        self.machine = relax.VirtualMachine(executable, tvm.cpu())
        self.params = [tvm.runtime.tensor(p) for p in self.program.params.values()]

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        import tvm

        result = self.machine["main"](*(tvm.runtime.tensor(x) for x in inputs), *self.params)
        results = [result] if len(self.program.outputs) == 1 else list(result)
        return [r.numpy() for r in results]

    def check(self, *inputs: np.ndarray, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """Asserts that the outputs agree with the reference evaluator's."""
        names = [i.name for i in self.model.graph.input]
        expected = ReferenceEvaluator(self.model).run(None, dict(zip(names, inputs)))
        for actual, wanted in zip(self(*inputs), expected, strict=True):
            assert actual.shape == np.shape(wanted)
            assert actual.dtype == np.asarray(wanted).dtype
            np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)


def check(body: str, *inputs: np.ndarray, opset: int = 23) -> None:
    """Compiles a graph and compares it with the reference for one set of inputs."""
    Compiled(parse(body, opset)).check(*inputs)
