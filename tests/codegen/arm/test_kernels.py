"""Row, attention, embedding and rotary kernels on ARM: the code all CPUs share, equal to x86 with AVX2 bit for bit."""

import numpy as np
import pytest

from qcompile.codegen.kernels.cpu.attention import Attention
from qcompile.codegen.kernels.cpu.embedding import Embedding, Table
from qcompile.codegen.kernels.cpu.rope import Rope
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.kernels.x86.harness import AVX2, run
from qcompile.targets import get_target, x86

pytestmark = pytest.mark.skipif(not x86.host_features() >= x86.AVX2.features, reason="needs AVX2 to compare with")

KERNELS = [
    (Rowwise(37, residual=True, norm="layer", f32_output=True), {"M": 5}),
    (Rowwise(401, norm="rms", beta=False, activation="silu", bits=4), {"M": 3}),
    (Rowwise(96, gated=True, activation="gelu", hadamard=48), {"M": 2}),
    (Rowwise(1500, quantize="tensor", zero_point=-3), {"M": 2}),
    (Embedding(70, tables=(Table(11), Table(5, quantized=False)), norm="layer"), {"M": 6}),
    (Attention(4, 20, 2, mask="float"), {"B": 2, "S": 19}),
    (Attention(3, 16, 3, layout="rows", mask="keys", causal="lower_right"), {"B": 2, "S": 1, "T": 33}),
    (Attention(2, 8, 2, causal="upper_left"), {"B": 1, "S": 70}),
    (Rope(48, 3, 12, rotary=8), {"B": 2, "S": 5}),
    (Rope(48, 3, 16, interleaved=True), {"B": 2, "S": 5}),
]


def argument(rng, param, extents):
    shape = tuple(extents.get(e, 1) if isinstance(e, str) else e for e in param.shape)
    if param.dtype == "float32":
        return np.abs(rng.normal(size=shape)).astype(np.float32) * rng.choice([-1, 1], shape).astype(np.float32)
    if param.dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    low, high = (-5, 5) if param.name.startswith("ids") else (0, 2)
    return rng.integers(low, high, shape).astype(param.dtype)


def test_results_are_those_of_x86_bit_for_bit(emulation):
    from qcompile.codegen.kernels.arm.harness import Executable

    rng = np.random.default_rng(0)
    target = get_target("cortex-a53", cores=1)
    functions, calls, checks = {}, [], []
    for i, (kernel, extents) in enumerate(KERNELS):
        given = [argument(rng, p, extents) for p in kernel.params if not p.output]
        expected = run(kernel, AVX2, extents, *given)
        functions[f"k{i}"] = kernel.build(target, f"k{i}")
        got = {name: np.full_like(array, 77) for name, array in expected.items()}
        calls.append((f"k{i}", [*given, *got.values()]))
        checks.append((kernel, got, expected))
    Executable(functions, target).calls(calls, offset=4)
    for kernel, got, expected in checks:
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=f"{kernel} {name}")


def test_an_id_outside_of_its_table_is_refused(emulation):
    from qcompile.codegen.kernels.arm.harness import Executable

    target = get_target("cortex-a53", cores=1)
    kernel = Embedding(8, tables=(Table(3, quantized=False),))
    program = Executable({"lookup": kernel.build(target, "lookup")}, target)
    table, out = np.arange(24, dtype=np.float32).reshape(3, 8), np.zeros((2, 8), np.float32)
    program.call("lookup", table, np.array([2, -1], np.int64), out)
    np.testing.assert_array_equal(out, table[[2, 2]])
    with pytest.raises(IndexError, match="outside of the table"):
        program.call("lookup", table, np.array([0, 3], np.int64), out)
