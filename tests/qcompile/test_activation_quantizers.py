"""Activation quantizers in compiled programs: static scales, clipped tokens, codes that others read too."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm
from tvm import relax

import qcompile
from qcompile import ort
from qcompile.codegen.program import build_program
from qcompile.formats import parse_activation, parse_format
from qcompile.passes.lower import lower
from qcompile.passes.quantize import CLIP, Quantizer
from qcompile.passes.sites import linear_sites
from qcompile.targets.x86 import AVX2

RNG = np.random.default_rng(0)
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[batch, sequence, 40] x, float[40] gamma, float[40] beta, float[40, 56] w1, float[40, 24] w2, float[56, 24] w3) => (float[batch, sequence, 24] y)
{
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    a = MatMul (n, w1)
    g = Gelu (a)
    b = MatMul (g, w3)
    c = MatMul (n, w2)
    y = Add (b, c)
}
"""


def network():
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    for value in [v for v in model.graph.inputs if v.name != "x"]:
        shape = [int(d) for d in value.shape]
        array = RNG.standard_normal(shape).astype(np.float32) / (shape[0] ** 0.5 if len(shape) == 2 else 1)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def x(batch=2, sequence=5):
    return {"x": RNG.standard_normal((batch, sequence, 40)).astype(np.float32)}


def relative(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


def test_static_scales(tmp_path):
    model = network()
    made = qcompile.compile(
        model,
        recipe="w8a8-static",
        transforms=(),
        calibration=[x() for _ in range(8)],
        output=tmp_path / "a",
        progress=False,
    )
    session = ort.session(made.onnx_path)
    for batch, sequence in ((1, 1), (3, 7)):
        feed = x(batch, sequence)
        got = made.run(feed)["y"]
        assert relative(got, ort.run(session, feed)["y"]) < 2e-3
        assert 1e-4 < relative(got, ort.run(model, feed)["y"]) < 0.05


def run_both(model, feed):
    """Outputs of ONNX Runtime and of the compiled program."""
    program = build_program(lower(model), AVX2)
    machine = relax.VirtualMachine(program.executable, tvm.cpu())
    arrays = [feed[s.name] for s in program.inputs] + list(program.params.values())
    result = machine["main"](*(tvm.runtime.tensor(a) for a in arrays))
    results = [result] if len(program.outputs) == 1 else list(result)
    return ort.run(model, feed), {s.name: r.numpy() for s, r in zip(program.outputs, results)}


@pytest.mark.parametrize("activation", ["int8/token", "int8/tensor"])
def test_codes_that_something_else_reads(activation):
    model = network()
    quantizer = Quantizer(model, {s.x.name: 0.03 for s in linear_sites(model)})
    fmt = parse_format("int8")
    for site in linear_sites(model):
        quantizer.linear(site, fmt, fmt.encode(site.matrix()), parse_activation(activation))
    model = quantizer.finish()
    rounded = next(v for n in model.graph for v in n.outputs if v.name == "n.dequantized")
    model.graph.outputs.append(rounded)
    want, got = run_both(model, x())
    assert relative(got["y"], want["y"]) < 2e-3
    np.testing.assert_allclose(got["n.dequantized"], want["n.dequantized"], atol=0.04)


def test_clipped_tokens():
    model = network()
    for site in linear_sites(model):
        site.x.metadata_props[CLIP] = "0.8"
    quantizer = Quantizer(model)
    fmt = parse_format("int8")
    for site in linear_sites(model):
        quantizer.linear(site, fmt, fmt.encode(site.matrix()), parse_activation("int4/token"))
    model = quantizer.finish()
    clipped = [n.attributes["clip"].value for n in lower(model).graph if n.op_type == "Rowwise"]
    np.testing.assert_allclose(clipped, 0.8, rtol=1e-6)
    want, got = run_both(model, x())
    assert relative(got["y"], want["y"]) < 5e-3
