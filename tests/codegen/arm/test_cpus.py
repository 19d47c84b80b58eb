"""Every processor of ``--cpu``: LLVM knows it, and what is compiled for it runs, under qemu with no more than it has."""

import numpy as np
import pytest

from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.formats import parse_activation, parse_format
from qcompile.targets import arm


@pytest.mark.parametrize("cpu", arm.TARGETS)
def test_programs_run(cpu, emulation, capfd):
    from qcompile.codegen.kernels.arm.harness import Executable

    target = arm.linux(arm.TARGETS[cpu])
    problem = LinearProblem(40, 12, parse_format("int4/g32"), parse_activation("int8"), m=3)
    choice = select(problem, target)
    rng = np.random.default_rng(0)
    weight = problem.weight.encode(rng.normal(size=(40, 12)).astype(np.float32))
    x, scale = rng.integers(1, 256, (3, 40)).astype(np.uint8), np.full(3, 0.01, np.float32)
    out, packed = np.empty((3, 12), np.float32), choice.family.pack(problem, choice.config, weight)
    row = Rowwise(12, activation="relu", quantize="", f32_output=True)
    positive = np.empty((3, 12), np.float32)
    functions = {"gemm": choice.family.build(problem, choice.config, target, "gemm"), "relu": row.build(target, "relu")}
    program = Executable(functions, target)
    assert "not a recognized" not in capfd.readouterr().err
    program.call("gemm", x, scale, *packed.values(), out)
    expected = choice.family.reference(problem, x, scale, weight)
    np.testing.assert_allclose(out, expected, atol=2e-3 * np.abs(expected).max())
    program.call("relu", out, positive)
    np.testing.assert_array_equal(positive, np.maximum(out, 0))
    uses = {"sdot": "dotprod", "smmla": "i8mm"}
    assert all(f"\t{name}\t" not in program.assembly or target.has(feature) for name, feature in uses.items())
