"""Row kernels against numpy: codes bit for bit, floats to rounding, any width, any alignment, both vector lengths."""

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.kernels.x86.harness import TARGETS, run, unaligned
from qcompile.errors import TargetError
from qcompile.targets.target import Target

WIDTHS = [1, 3, 8, 15, 37, 64, 96, 384, 401]


def check(kernel: Rowwise, target: Target, *inputs: np.ndarray, tol: float = 3e-6) -> dict[str, np.ndarray]:
    got = run(kernel, target, {"M": len(inputs[0])}, *inputs)
    want = kernel.reference(*inputs)
    for name in {"sum", "y"} & set(got):
        scale = np.abs(want[name]).max(initial=1e-3)
        np.testing.assert_allclose(got[name], want[name], atol=tol * scale, rtol=10 * tol, err_msg=name)
    if kernel.quantize:
        # The quantizer sees the kernel's own y, whose last bit may differ from numpy's.
        y = got["y"] if "y" in got else want["y"]
        codes, scales = kernel.quantized(y, inputs[-1] if kernel.quantize == "tensor" else None)
        if "y" in got or kernel == Rowwise(kernel.width, quantize=kernel.quantize, bits=kernel.bits):
            np.testing.assert_array_equal(got["codes"], codes)
            np.testing.assert_array_equal(got["scale"], scales)
        else:
            np.testing.assert_allclose(got["scale"], scales, rtol=1e-5)
            assert np.abs(got["codes"].astype(int) - codes).max(initial=0) <= 1
    return got


def rows(m: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((m, d)) * np.exp(rng.uniform(-3, 3, (m, 1)))).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_token_quantizer_is_bit_exact(width: int, target: Target) -> None:
    x = rows(50, width)
    x[3] = 0
    x[4] = np.round(x[4])
    x[5] = np.arange(width) - width / 2  # many exact ties
    x[6] = np.float32(1e-42) * np.arange(1, width + 1)  # subnormal scale
    x[7] = np.float32(1e-45)
    x[8, 0] = 3e38
    check(Rowwise(width), target, x)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width(bits: int) -> None:
    x = rows(40, 65, bits)
    target = TARGETS[bits % len(TARGETS)]
    check(Rowwise(65, bits=bits), target, x)
    static = Rowwise(65, bits=bits, quantize="tensor", zero_point=(0, 1, -2)[bits % 3], f32_output=True)
    check(static, target, x, np.float32([0.37]))


def test_ties_take_the_exact_path() -> None:
    """Rows built so that many quotients fall on or next to a half-integer."""
    rng = np.random.default_rng(1)
    scale = np.exp(rng.uniform(-5, 5, (200, 1))).astype(np.float32)
    x = (rng.integers(-253, 254, (200, 96)) / 2 * scale).astype(np.float32)
    x[:, 0] = (127 * scale)[:, 0]
    near = np.nextafter(x, np.float32(0))
    for target in TARGETS:
        check(Rowwise(96), target, np.concatenate([x, near, -near]))


@pytest.mark.parametrize("clip", [1.0, 0.85])
def test_quantizer_equals_the_operator_in_onnx_runtime(clip: float) -> None:
    from qcompile.passes.domain import QUANTIZE_PER_TOKEN

    call = oh.make_node("QuantizePerToken", ["x"], ["codes", "scale"], domain="qcompile", bits=8, clip=clip)
    info = oh.make_tensor_value_info
    graph = oh.make_graph(
        [call],
        "g",
        [info("x", 1, ["m", 96])],
        [info("codes", 3, ["m", 96]), info("scale", 1, ["m", 1])],
    )
    body = onnx.parser.parse_function(QUANTIZE_PER_TOKEN)
    model = oh.make_model(
        graph, functions=[body], opset_imports=[oh.make_opsetid("", 23), oh.make_opsetid("qcompile", 1)], ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rows(300, 96, 7)
    codes, scale = session.run(None, {"x": x})
    got = run(Rowwise(96, clip=clip), TARGETS[0], {"M": 300}, x)
    np.testing.assert_array_equal(got["codes"], (codes.astype(int) + 128).astype(np.uint8))
    np.testing.assert_array_equal(got["scale"], scale[:, 0])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 37, 384])
def test_norms(width: int, norm: str, target: Target) -> None:
    rng = np.random.default_rng(2)
    x, res = rows(9, width), rows(9, width, 1)
    gamma, beta = rng.standard_normal((2, width)).astype(np.float32)
    check(
        Rowwise(width, norm=norm, beta=norm == "layer", f32_output=True),
        target,
        x,
        gamma,
        *([beta] * (norm == "layer")),
    )
    bare = Rowwise(width, residual=True, norm=norm, gamma=False, beta=False, f32_output=True, quantize="")
    check(bare, target, x, res)
    both = Rowwise(width, residual=True, norm=norm, beta=False, sum_output=True)
    got = check(both, target, x, res, gamma)
    np.testing.assert_array_equal(got["sum"], x + res)


def test_layer_norm_of_rows_far_from_zero() -> None:
    x = (np.random.default_rng(3).standard_normal((5, 384)) + 300).astype(np.float32)
    check(Rowwise(384, norm="layer", gamma=False, beta=False, f32_output=True), TARGETS[0], x, tol=3e-5)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, target: Target) -> None:
    x = rows(20, 77)
    x[0] = np.linspace(-100, 100, 77)
    check(Rowwise(77, activation=activation, f32_output=True), target, x)
    check(Rowwise(38, activation=activation, gated=True, f32_output=True), target, np.ascontiguousarray(x[:, :76]))
    check(Rowwise(77, activation=activation), target, x)


def test_residual_without_norm_and_static_quantizer() -> None:
    x, res = rows(6, 33), rows(6, 33, 1)
    check(Rowwise(33, residual=True, f32_output=True, quantize="tensor", bits=8), TARGETS[0], x, res, np.float32([0.1]))
    check(Rowwise(33, residual=True), TARGETS[0], x, res)


@settings(max_examples=10, deadline=None)
@given(m=st.integers(0, 300), d=st.integers(1, 200), offset=st.integers(0, 15), seed=st.integers(0, 99))
def test_any_shape_and_alignment(m: int, d: int, offset: int, seed: int) -> None:
    x = unaligned(rows(m, d, seed), offset)
    res = unaligned(rows(m, d, seed + 1), offset + 3)
    check(Rowwise(d, residual=True, f32_output=True), TARGETS[seed % len(TARGETS)], x, res)


def test_parallel_rows_equal_serial_rows() -> None:
    x = rows(700, 200)
    threaded = Target("x86", "x86-64-v3", frozenset({"avx2"}), cores=4)
    for name, a in run(Rowwise(200), threaded, {"M": 700}, x).items():
        np.testing.assert_array_equal(a, run(Rowwise(200), TARGETS[0], {"M": 700}, x)[name])


def test_nan_stays_visible() -> None:
    x = rows(3, 40)
    x[1, 5] = np.nan
    scale = run(Rowwise(40), TARGETS[0], {"M": 3}, x)["scale"]
    assert np.isnan(scale[1]) and np.isfinite(scale[[0, 2]]).all()


def test_no_calls_and_no_scalar_math_in_the_generated_code() -> None:
    func = Rowwise(384, activation="gelu").build(TARGETS[0], "k")
    asm = tvm.compile(tvm.IRModule({"k": func}), target=TARGETS[0].tvm()).mod.inspect_source("asm")
    assert "erff" not in asm and "expf" not in asm and "nearbyintf" not in asm


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"width": 4, "norm": "batch"},
        {"width": 4, "activation": "mish"},
        {"width": 4, "bits": 9},
        {"width": 4, "quantize": ""},
        {"width": 4, "gated": True, "residual": True},
        {"width": 4, "sum_output": True, "residual": True},
    ],
)
def test_refuses_what_it_cannot_compute(options: dict) -> None:
    with pytest.raises(TargetError):
        Rowwise(**options)
