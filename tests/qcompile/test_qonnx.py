"""Models with the quantizers of QONNX and Brevitas: their own definition in numpy, and the same integers in hardware's C."""

import json
import shutil

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from qcompile import ort
from qcompile.capture import capture
from qcompile.cli import cli
from qcompile.errors import UnsupportedOperatorError

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


class Net:
    """A QONNX model under construction, and what it computes by QONNX's definition."""

    def __init__(self, domain, features):
        self.domain, self.nodes, self.initializers, self.constants = domain, [], [], {}
        self.x, self.features = "x", features
        self.steps = []

    def parameter(self, name, array):
        array = np.asarray(array, np.float32)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def quant(self, x, scale, bits, *, zero=0.0, kind="Quant", **attributes):
        out = f"q{len(self.nodes)}"
        inputs = [x, self.parameter(f"{out}.s", scale)]
        if kind == "Quant":
            inputs += [self.parameter(f"{out}.z", zero), self.parameter(f"{out}.b", bits)]
        self.nodes.append(helper.make_node(kind, inputs, [out], domain=self.domain, name=out, **attributes))
        return out

    def op(self, kind, *inputs, **attributes):
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def model(self, output, shape):
        graph = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.features])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *shape])],
            self.initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(self.domain, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def quant(x, scale, bits, signed=True, narrow=False):
    low = (-(1 << (bits - 1)) + narrow) if signed else 0
    high = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1 - narrow
    return scale * np.clip(np.rint(x / scale), low, high)


def mlp(domain, rng, bipolar=False):
    """12 - 9 - 5: a weight per channel, one per tensor, a bias on the grid of its sums; returns the model and its function."""
    net = Net(domain, (12,))
    w1, w2 = rng.normal(0, 0.5, (9, 12)).astype(np.float32), rng.normal(0, 0.5, (9, 5)).astype(np.float32)
    s1, b1 = 2.0 ** rng.integers(-4, -2, (9, 1)).astype(np.float32), rng.normal(0, 0.5, 9).astype(np.float32)
    xq = net.quant("x", 1 / 16, 8)
    wq = net.quant(net.parameter("w1", w1), s1, 4, narrow=1)
    bq = net.quant(net.parameter("b1", b1), 2.0**-7, 16)
    h = net.op("Gemm", xq, wq, bq, transB=1)
    if bipolar:
        h = net.quant(h, 0.25, None, kind="BipolarQuant")
    else:
        h = net.quant(net.op("Relu", h), 1 / 8, 4, signed=0)
    vq = net.quant(net.parameter("w2", w2), 0.5, None, kind="BipolarQuant") if bipolar else net.quant(
        net.parameter("w2b", w2), 0.125, 3)  # fmt: skip
    out = net.quant(net.op("MatMul", h, vq), 1 / 8, 8)

    def function(x):
        q = quant(x, 1 / 16, 8)
        total = q @ quant(w1, s1, 4, narrow=True).T + quant(b1, 2.0**-7, 16)
        if bipolar:
            hidden = np.where(total >= 0, 0.25, -0.25)
            return quant(hidden @ np.where(w2 >= 0, 0.5, -0.5), 1 / 8, 8)
        return quant(quant(np.maximum(total, 0), 1 / 8, 4, signed=False) @ quant(w2, 0.125, 3), 1 / 8, 8)

    return net.model(out, (5,)), function


@pytest.mark.parametrize("domain", ["qonnx.custom_op.general", "onnx.brevitas"])
@pytest.mark.parametrize("bipolar", [False, True])
def test_quantizers_become_onnx_operators_with_the_same_values(domain, bipolar):
    rng = np.random.default_rng(0)
    model, function = mlp(domain, rng, bipolar)
    captured = capture(model)
    x = rng.normal(0, 2, (64, 12)).astype(np.float32)
    (y,) = ort.run(ort.session(captured.model), {"x": x}).values()
    np.testing.assert_allclose(y, function(x), atol=1e-6)


@needs_cc
@pytest.mark.parametrize("bipolar", [False, True])
def test_hardware_computes_what_the_quantizers_say(bipolar, tmp_path):
    rng = np.random.default_rng(1)
    model, function = mlp("qonnx.custom_op.general", rng, bipolar)
    onnx.save(model, tmp_path / "net.onnx")
    x = rng.normal(0, 2, (200, 12)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    arguments = ["compile", tmp_path / "net.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--calibration",
                 tmp_path / "x.npz", "--pe-budget", 8, "-o", tmp_path / "out", "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    nodes = json.loads(done.stdout)["hardware"]["nodes"]
    assert [n["kind"] for n in nodes] == ["matvec", "matvec"]
    assert nodes[0]["type"] == ("int2" if bipolar else "uint4")
    run = CliRunner().invoke(
        cli, ["run", str(tmp_path / "out"), str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz")]
    )
    assert run.exit_code == 0, run.output
    (y,) = np.load(tmp_path / "y.npz").values()
    np.testing.assert_allclose(y, function(x), atol=1e-6)


@needs_cc
def test_convolutions_are_imported(tmp_path):
    rng = np.random.default_rng(2)
    net = Net("onnx.brevitas", (3, 6, 6))
    w = rng.normal(0, 0.4, (4, 3, 3, 3)).astype(np.float32)
    xq = net.quant("x", 1 / 16, 8)
    h = net.op("Conv", xq, net.quant(net.parameter("w", w), 0.125, 4), pads=[1, 1, 1, 1])
    out = net.quant(net.op("Relu", h), 1 / 4, 8, signed=0)
    onnx.save(net.model(out, (4, 6, 6)), tmp_path / "net.onnx")
    x = rng.normal(0, 2, (20, 3, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    arguments = ["compile", tmp_path / "net.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--calibration",
                 tmp_path / "x.npz", "-o", tmp_path / "out", "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["quality"]["onnx_to_float_error"] < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": [1.0, 2.0]}, "one scale"),
        ({"zero": 3.0}, "zero point"),
        ({"rounding_mode": "FLOOR"}, "half to even"),
        ({"rounding_mode": "ODD"}, "unknown rounding"),
        ({"bits": 2.5}, "whole number of bits"),
    ],
)
def test_quantizers_without_a_translation_are_named(changes, message):
    net = Net("qonnx.custom_op.general", (2,))
    scale, bits = changes.pop("scale", 0.5), changes.pop("bits", 4)
    q = net.quant("x", scale, bits, **changes)
    with pytest.raises(UnsupportedOperatorError, match=message):
        capture(net.model(net.op("Relu", q), (2,)))
