"""Rotary embedding: both pairings, partial rotation, merged rows, tables, in place."""

import numpy as np
import pytest

from qcompile.codegen.kernels.cpu.rope import Rope
from qcompile.codegen.kernels.x86.harness import TARGETS, compiled, run
from qcompile.errors import TargetError
from qcompile.targets.target import Target

KERNELS = [
    Rope(3 * 64, 2, 64),
    Rope(64, 1, 64, interleaved=True),
    Rope(100, 3, 20, rotary=12, shared=False),
    Rope(100, 3, 20, rotary=12, interleaved=True),
    Rope(34, 1, 34, positions=True),
    Rope(40, 2, 20, rotary=10, positions=True, shared=False),
    Rope(2, 1, 2, interleaved=True),
]


def arguments(kernel: Rope, b: int, s: int) -> list[np.ndarray]:
    rng = np.random.default_rng(s)
    extents = {"B": b, "S": s, "P": 90}
    made = []
    for param in kernel.params:
        shape = tuple(extents.get(e, e) if isinstance(e, str) else e for e in param.shape)
        if param.dtype == "int64":
            made.append(rng.integers(0, 90, shape))
        elif not param.output:
            made.append(rng.standard_normal(shape).astype(np.float32))
    return made


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_rotates(kernel: Rope, target: Target) -> None:
    for b, s in ((1, 1), (3, 17)):
        args = arguments(kernel, b, s)
        got = run(kernel, target, {"B": b, "S": s}, *args)["y"]
        np.testing.assert_allclose(got, kernel.reference(*args)["y"], atol=2e-6)


def test_in_place() -> None:
    kernel = Rope(3 * 32, 2, 32, rotary=16, in_place=True)
    for target in (*TARGETS, Target("x86", TARGETS[0].cpu, TARGETS[0].features, cores=4)):
        x, cos, sin = arguments(kernel, 2, 300)
        want = kernel.reference(x, cos, sin)["y"]
        compiled(kernel, target)(x, cos, sin)
        np.testing.assert_allclose(x, want, atol=2e-6)


def test_agrees_with_the_onnx_operator() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    for interleaved in (0, 1):
        kernel = Rope(4 * 16, 4, 16, rotary=8, interleaved=bool(interleaved), shared=False)
        x, cos, sin = arguments(kernel, 2, 5)
        node = onnx.helper.make_node(
            "RotaryEmbedding", ["x", "c", "s"], ["y"], num_heads=4, rotary_embedding_dim=8, interleaved=interleaved
        )
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph([node], "g", [info(n, 1, None) for n in "xcs"], [info("y", 1, None)])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
        (want,) = ReferenceEvaluator(model).run(None, {"x": x, "c": cos, "s": sin})
        np.testing.assert_allclose(run(kernel, TARGETS[0], {"B": 2, "S": 5}, x, cos, sin)["y"], want, atol=2e-6)


@pytest.mark.parametrize("wrong", [-1, 90])
def test_positions_outside_of_the_table_raise(wrong: int) -> None:
    kernel = Rope(34, 1, 34, positions=True)
    x, cos, sin, positions = arguments(kernel, 2, 7)
    positions[0, 3] = wrong
    with pytest.raises(IndexError, match="outside of the table"):
        run(kernel, TARGETS[0], {"B": 2, "S": 7}, x, cos, sin, positions)


@pytest.mark.parametrize("options", [(10, 2, 8, 0), (32, 2, 8, 3), (32, 2, 8, 10), (32, 0, 8, 0), (15, 1, 15, 0)])
def test_refuses_what_it_cannot_compute(options: tuple) -> None:
    with pytest.raises(TargetError):
        Rope(*options)
