"""Quantized convolutions: explicit in ONNX, lowered with channels last, and the same numbers in the compiled program."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

import qcompile
from qcompile import ort
from qcompile.formats import parse_activation, parse_format
from qcompile.passes.lower import lower
from qcompile.passes.quantize import Quantizer
from qcompile.passes.sites import conv_sites
from qcompile.quantization import quantize_model
from qcompile.recipes import Recipe
from qcompile.report import Report

RNG = np.random.default_rng(0)


def network(layers, size=(11, 13), channels=6):
    """A model from rows (operator, inputs, output, weight shape or None, attributes)."""
    nodes, weights = [], []
    for op, inputs, output, shape, attributes in layers:
        names = list(inputs)
        if shape is not None:
            fan = int(np.prod(shape[1:]))
            for name, array in (
                (f"{output}.w", RNG.standard_normal(shape) / fan**0.5),
                (f"{output}.b", RNG.standard_normal(shape[0]) / 4),
            ):
                weights.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
                names.append(name)
        nodes.append(oh.make_node(op, names, [output], **attributes))
    x = oh.make_tensor_value_info("x", 1, ["batch", channels, *size])
    y = oh.make_tensor_value_info("y", 1, None)
    for name, array in (("lo", 0.0), ("hi", 1.5)):
        weights.append(onnx.numpy_helper.from_array(np.array(array, np.float32), name))
    graph = oh.make_graph(nodes, "g", [x], [y], weights)
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


RESIDUAL = [
    ("Conv", ["x"], "a", (16, 6, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("Relu", ["a"], "ar", None, {}),
    ("Conv", ["ar"], "b", (16, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 16}),
    ("Clip", ["b", "lo", "hi"], "bc", None, {}),
    ("Conv", ["bc"], "c", (16, 16, 1, 1), {}),
    ("Add", ["c", "ar"], "d", None, {}),
    ("Relu", ["d"], "dr", None, {}),
    ("Conv", ["dr"], "e", (24, 8, 2, 3), {"group": 2, "dilations": [1, 2], "pads": [0, 2, 1, 0]}),
    ("HardSwish", ["e"], "eh", None, {}),
    ("Conv", ["eh"], "f", (10, 24, 1, 1), {"strides": [2, 1]}),
    ("GlobalAveragePool", ["f"], "y", None, {}),
]


def relative(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("weight", "activation", "bound"),
    [
        ("int8", "int8/token", 0.03),
        ("int8", "int8/tensor", 0.03),
        ("int4/g8/asym", "int8/token", 0.2),
        ("int8", "none", 0.02),
    ],
)
def test_quantized_convolutions_run_in_onnx_runtime(weight, activation, bound):
    model = network(RESIDUAL)
    x = {"x": RNG.standard_normal((3, 6, 11, 13)).astype(np.float32)}
    exact = ort.run(model, x)["y"]
    quantizer = Quantizer(model, {s.x.name: 0.03 for s in conv_sites(model)})
    fmt = parse_format(weight)
    assert len(conv_sites(model)) == 5
    for site in conv_sites(model):
        quantizer.conv(site, fmt, fmt.encode(site.matrix()), parse_activation(activation))
    got = ort.run(quantizer.finish(), x)["y"]
    assert 1e-5 < relative(got, exact) < bound


def test_codes_of_a_sample_equal_numpy():
    model = network([("Conv", ["x"], "y", (4, 6, 3, 3), {})])
    quantizer = Quantizer(model)
    (site,) = conv_sites(model)
    w = site.weight.const_value.numpy()
    fmt = parse_format("int8")
    code = fmt.encode(site.matrix())
    quantizer.conv(site, fmt, code, parse_activation("int8/token"))
    x = RNG.standard_normal((2, 6, 11, 13)).astype(np.float32)
    x[1] *= 40
    x[0, 0, 0, 0] = 0
    got = ort.run(quantizer.finish(), {"x": x})["y"]
    scale = np.abs(x).max((1, 2, 3), keepdims=True) / np.float32(127)
    decoded = np.moveaxis(fmt.decode(code).reshape(3, 3, 6, 4), (-1, -2), (0, 1))
    assert np.abs(decoded - w).max() < np.abs(w).max() / 120
    windows = np.lib.stride_tricks.sliding_window_view(np.rint(x / scale) * scale, (3, 3), (2, 3))
    want = (
        np.einsum("nchwij,ocij->nohw", windows, decoded)
        + model.graph.initializers["y.b"].const_value.numpy()[:, None, None]
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_channels_stay_last_between_kernels():
    quantized = quantize_model(network(RESIDUAL), Recipe("r"), {}, Report("m", "t", "r"))
    lowered = lower(quantized)
    kinds = [n.op_type for n in lowered.graph]
    assert kinds.count("Conv") == 5 and kinds.count("Quantize") == 5
    assert all(n.domain == "qcompile.kernel" for n in lowered.graph if n.op_type in ("Conv", "Quantize"))
    assert kinds.count("Transpose") <= 2, "one at the input, one after the average"
    assert next(n.attributes["epilogue"].as_string() for n in lowered.graph if n.op_type == "Conv") == "relu"


def test_static_quantizers_merge_with_the_convolution_before_them():
    scales = {s.x.name: 0.03 for s in conv_sites(network(RESIDUAL))}
    model = network(RESIDUAL)
    quantizer = Quantizer(model, scales)
    for site in conv_sites(model):
        fmt = parse_format("int8")
        quantizer.conv(site, fmt, fmt.encode(site.matrix()), parse_activation("int8/tensor"))
    lowered = lower(quantizer.finish(), codes=True)
    limits = [n.inputs[6].const_value.numpy() for n in lowered.graph if n.op_type == "Conv" and len(n.inputs) > 6]
    # `b` is clipped to [0, 1.5] and read by `c` alone; `a` is also read by a residual, and so are the others.
    np.testing.assert_array_equal(limits, np.array([[0.03, 0, 50]], np.float32))
    kinds = [n.op_type for n in lowered.graph]
    assert "Clip" not in kinds and kinds.count("Quantize") == 4


def test_what_stays_float_is_reported():
    model = network([("ConvTranspose", ["x"], "y", (6, 4, 3, 3), {})])
    model.graph[0].resize_inputs(2)
    report = Report("m", "t", "r")
    quantize_model(model, Recipe("r"), {}, report)
    assert any("ConvTranspose" in r.reason for r in report.refusals)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("w8a8-rtn", {}),
        ("w8a8-static", {"transforms": ()}),
        ("w4a8-rtn", {}),
        ("w8a16", {}),
        ("w8a8-rtn", {"weight": "int3/asym", "activation": "int6/token"}),
    ],
)
def test_program_agrees_with_onnx_runtime(recipe, changes, tmp_path):
    model = network(RESIDUAL)
    samples = [{"x": RNG.standard_normal((2, 6, 11, 13)).astype(np.float32)} for _ in range(4)]
    made = qcompile.compile(model, recipe=recipe, calibration=samples, output=tmp_path / "a", progress=False, **changes)
    convolutions = [layer for layer in made.report.layers if layer.kind == "convolution"]
    assert len(convolutions) == 5 and sum(bool(layer.kernel) for layer in convolutions) == 3
    session = ort.session(made.onnx_path)
    for batch in (1, 3):
        x = RNG.standard_normal((batch, 6, 11, 13)).astype(np.float32)
        got = made.run({"x": x})["y"]
        assert got.shape == (batch, 10, 1, 1)
        assert relative(got, ort.run(session, {"x": x})["y"]) < 5e-3
        assert relative(got, ort.run(model, {"x": x})["y"]) < (0.3 if "weight" in changes or "4" in recipe else 0.05)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_numbers_of_spatial_axes(rank, tmp_path):
    size = (19, 6, 7)[:rank]
    layers = [
        ("Conv", ["x"], "a", (8, 6, *[3] * rank), {"strides": [2] * rank, "auto_pad": "SAME_UPPER"}),
        ("Gelu", ["a"], "ag", None, {}),
        ("Conv", ["ag"], "y", (8, 1, *[2] * rank), {"group": 8}),
    ]
    model = network(layers, size)
    made = qcompile.compile(model, recipe="w8a8-rtn", output=tmp_path / "a", progress=False)
    x = RNG.standard_normal((2, 6, *size)).astype(np.float32)
    got = made.run({"x": x})["y"]
    assert relative(got, ort.run(ort.session(made.onnx_path), {"x": x})["y"]) < 5e-3
