"""Operators of the domain `qcompile.kernel` in a program: by shared CPU kernels, and by general code elsewhere."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompile.codegen.kernels.cpu.rope import Rope
from qcompile.codegen.kernels.x86.harness import AVX2
from qcompile.codegen.relax.kernels import KernelCalls
from qcompile.codegen.relax.testing import Compiled
from qcompile.targets.target import Target

RNG = np.random.default_rng(3)
HEADER = '<ir_version: 10, opset_import: ["" : 23, "qcompile.kernel" : 1]>'
TARGETS = pytest.mark.parametrize("target", [AVX2, None], ids=["kernel", "general"])


def compiled(body: str, target: Target | None, **constants: np.ndarray) -> Compiled:
    model = onnx.parser.parse_model(f"{HEADER} {body}")
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Compiled(model, target)


@TARGETS
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_embedding(target: Target | None, dtype: str) -> None:
    codes = RNG.integers(-127, 128, (80, 19)).astype(np.int8)
    scale = RNG.uniform(0.01, 1, (80, 1)).astype(np.float32)
    body = f"""g ({dtype}[batch, sequence] ids) => (float[batch, sequence, 19] y)
    {{ y = qcompile.kernel.Embedding (codes, scale, ids) }}"""
    program = compiled(body, target, codes=codes, scale=scale)
    assert program.program.state[KernelCalls].uses["embedding"] == 1
    for shape in [(1, 1), (2, 7), (3, 0)]:
        ids = RNG.integers(-80, 80, shape).astype(dtype)
        (got,) = program(ids)
        np.testing.assert_array_equal(got, (codes * scale)[ids])


def test_an_id_outside_of_the_table_is_an_error() -> None:
    codes, scale = np.ones((80, 16), np.int8), np.ones((80, 1), np.float32)
    body = "g (int64[n] ids) => (float[n, 16] y) { y = qcompile.kernel.Embedding (codes, scale, ids) }"
    program = compiled(body, AVX2, codes=codes, scale=scale)
    with pytest.raises(IndexError, match="outside of the table"):
        program(np.array([3, 80]))


@TARGETS
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("batches", "rotary"), [("1", 8), ("batch", 8), ("1", 4)])
def test_rope(target: Target | None, interleaved: int, batches: str, rotary: int) -> None:
    """Two heads of 8 are rotated, a third is copied."""
    half = rotary // 2
    body = f"""g (float[batch, sequence, 24] x, float[{batches}, sequence, {half}] cos,
                  float[{batches}, sequence, {half}] sin) => (float[batch, sequence, 24] y)
    {{ y = qcompile.kernel.Rope <heads: int = 2, head_dim: int = 8, rotary: int = {rotary},
                                 interleaved: int = {interleaved}> (x, cos, sin) }}"""
    program = compiled(body, target)
    reference = Rope(24, 2, 8, rotary, bool(interleaved), shared=batches == "1")
    for b, s in [(1, 1), (2, 5)]:
        x = RNG.standard_normal((b, s, 24)).astype(np.float32)
        angles = RNG.uniform(0, 6, (1 if batches == "1" else b, s, half))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        (got,) = program(x, cos, sin)
        np.testing.assert_allclose(got, reference.reference(x, cos, sin)["y"], rtol=1e-5, atol=1e-6)
