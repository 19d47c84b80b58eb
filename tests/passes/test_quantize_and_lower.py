"""Explicit quantization runs in ONNX Runtime and equals numpy; lowering keeps every value it does not replace."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile import ort
from qcompile.formats import parse_activation, parse_format
from qcompile.passes.lower import KERNEL_DOMAIN, lower
from qcompile.passes.quantize import Quantizer
from qcompile.passes.sites import embedding_sites, linear_sites, other_weights
from qcompile.quantization import quantize_model
from qcompile.recipes import get_recipe
from qcompile.report.model import Report

DATA = ("x", "r", "ids", "cache")
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[batch, sequence, 48] x, float[batch, sequence, 48] r, float[48] gamma, float[48] beta, float[48, 48] wq, float[48, 48] wk, float[48, 48] wv, float[48] bq, float[48, 96] w1, float[96] b1, float[96, 48] w2, float[48] b2) => (float[batch, sequence, 48] y)
{
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    q0 = MatMul (n, wq)
    q = Add (q0, bq)
    k = MatMul (n, wk)
    v = MatMul (n, wv)
    a = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)
    res = Add (a, r)
    h0 = MatMul (res, w1)
    h1 = Add (h0, b1)
    h = Gelu (h1)
    o0 = MatMul (h, w2)
    o1 = Add (b2, o0)
    y = Add (res, o1)
}
"""


def build(text=TEXT, seed=0):
    """The graph of ``text``; inputs other than the data become random weights."""
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    random = np.random.default_rng(seed)
    for value in [v for v in model.graph.inputs if v.name not in DATA]:
        shape = [int(d) for d in value.shape]
        array = random.standard_normal(shape).astype(np.float32) / (shape[0] ** 0.5 if len(shape) == 2 else 1)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def feeds(batch=2, sequence=5):
    random = np.random.default_rng(1)
    return {n: random.standard_normal((batch, sequence, 48)).astype(np.float32) for n in ("x", "r")}


def quantized(weight="int4/g16/asym", activation="int8/token", model=None):
    model = build() if model is None else model
    quantizer = Quantizer(model, {s.x.name: 0.05 for s in linear_sites(model)})
    fmt = parse_format(weight)
    for site in linear_sites(model):
        quantizer.linear(site, fmt, fmt.encode(site.matrix()), parse_activation(activation))
    return quantizer.finish()


@pytest.mark.parametrize("weight", ["int8", "int4", "int4/g16/asym", "int3/g16", "int2/g8/asym", "int4/g32"])
def test_quantized_linear_equals_numpy(weight):
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[m, 48] x, float[48, 20] w) => (float[m, 20] y) { y = MatMul (x, w) }
    """
    model = build(text)
    w = model.graph.initializers["w"].const_value.numpy().copy()
    x = feeds()["x"].reshape(-1, 48)
    x[3] = 0
    got = ort.run(quantized(weight, model=model), {"x": x})["y"]
    largest = np.abs(x).max(1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / np.float32(127)).astype(np.float32)
    fmt = parse_format(weight)
    want = (np.rint(x / scale) * scale) @ fmt.decode(fmt.encode(w))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_readers_of_one_activation_share_its_quantizer():
    model = quantized()
    assert sum(n.op_type == "QuantizePerToken" for n in model.graph) == 3
    onnx.checker.check_model(ir.serde.serialize_model(model))


@pytest.mark.parametrize("activation", ["int8/token", "int8/tensor", "none"])
def test_quantization_error_is_small_and_not_zero(activation):
    exact, got = ort.run(build(), feeds())["y"], ort.run(quantized("int8", activation), feeds())["y"]
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.03


def test_lowering_fuses_the_block():
    lowered = lower(quantized())
    kinds = [n.op_type for n in lowered.graph if n.domain == KERNEL_DOMAIN]
    assert kinds == ["Rowwise", "Linear", "Attention", "Rowwise", "Linear", "Rowwise", "Linear"] or sorted(
        kinds
    ) == sorted(["Rowwise", "Linear", "Attention", "Rowwise", "Linear", "Rowwise", "Linear"])
    linears = [n for n in lowered.graph if n.op_type == "Linear"]
    assert [n.attributes["n"].value for n in linears] == [144, 96, 48]
    assert [n.attributes["epilogue"].value for n in linears] == ["", "gelu", ""]
    assert linears[2].inputs[6] is not None, "the residual is part of the last linear"
    assert lowered.graph.outputs[0].name == "y"
    produced = {v.name for v in lowered.graph.inputs} | set(lowered.graph.initializers)
    for node in lowered.graph:
        assert all(v is None or v.name in produced for v in node.inputs), f"{node.op_type} reads a value not made yet"
        produced |= {v.name for v in node.outputs}


def test_the_quantized_model_is_not_changed_by_lowering():
    model = quantized()
    before = ort.run(model, feeds())["y"]
    lower(model)
    np.testing.assert_array_equal(ort.run(model, feeds())["y"], before)


def test_swiglu_is_merged_and_fused_with_the_quantizer():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[m, 32] x, float[32, 64] wg, float[32, 64] wu, float[64, 32] wd) => (float[m, 32] y)
    {
        g = MatMul (x, wg)
        s = Sigmoid (g)
        a = Mul (g, s)
        u = MatMul (x, wu)
        h = Mul (a, u)
        y = MatMul (h, wd)
    }
    """
    lowered = lower(quantized("int8", model=build(text)))
    nodes = [(n.op_type, n.attributes.get_string("producer", "")) for n in lowered.graph]
    assert nodes == [("Rowwise", "identity"), ("Linear", ""), ("Rowwise", "swiglu"), ("Linear", "")]


def test_a_value_read_twice_is_not_swallowed():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[m, 32] x, float[32, 32] w, float[32] b) => (float[m, 32] y, float[m, 32] z)
    {
        p = MatMul (x, w)
        z = Add (p, b)
        y = Gelu (z)
    }
    """
    lowered = lower(quantized("int8", model=build(text)))
    assert [n.op_type for n in lowered.graph] == ["Rowwise", "Linear", "Gelu"]
    assert [v.name for v in lowered.graph.outputs] == ["y", "z"]


def test_embedding_rows_are_dequantized_after_the_gather():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (int64[batch, sequence] ids, float[100, 16] table) => (float[batch, sequence, 16] y) { y = Gather (table, ids) }
    """
    model = build(text)
    table = model.graph.initializers["table"].const_value.numpy().copy()
    scale = np.abs(table).max(1, keepdims=True) / 127
    (site,) = embedding_sites(model)
    quantizer = Quantizer(model)
    quantizer.embedding(site, np.rint(table / scale).astype(np.int8), scale)
    model = quantizer.finish()
    ids = np.array([[3, 99, 0]])
    np.testing.assert_allclose(ort.run(model, {"ids": ids})["y"], table[ids], atol=np.abs(table).max() / 250)
    assert [n.op_type for n in lower(model).graph] == ["Embedding"]


def test_attention_whose_result_is_reshaped_twice():
    """As GPT-2 has it in old exports: rows are flattened for the projection and read again for their shape."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[batch, sequence, 48] x, float[48, 48] wq, float[48, 48] wk, float[48, 48] wv, float[48, 48] wo) => (float[rows, 48] y, int64[3] shape)
    {
        heads = Constant <value_ints = [0, 0, 4, 12]> ()
        rows = Constant <value_ints = [0, 0, 48]> ()
        flat = Constant <value_ints = [-1, 48]> ()
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        q4 = Reshape (q, heads)
        k4 = Reshape (k, heads)
        v4 = Reshape (v, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        kt = Transpose <perm = [0, 2, 1, 3]> (k4)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        a = Attention (qt, kt, vt)
        t = Transpose <perm = [0, 2, 1, 3]> (a)
        r = Reshape (t, rows)
        shape = Shape (r)
        f = Reshape (t, flat)
        y = MatMul (f, wo)
    }
    """
    lowered = lower(quantized("int8", model=build(text)))
    kinds = [n.op_type for n in lowered.graph]
    assert kinds.count("Attention") == 1 and "Transpose" not in kinds
    attention = next(n for n in lowered.graph if n.op_type == "Attention")
    assert attention.domain == KERNEL_DOMAIN and attention.outputs[0].shape[2] == 48


def test_attention_over_a_cache_reads_heads_as_they_lie():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[batch, sequence, 48] x, float[batch, 2, past, 12] cache, float[48, 48] wq) => (float[batch, sequence, 48] y)
    {
        heads = Constant <value_ints = [0, 0, 4, 12]> ()
        rows = Constant <value_ints = [0, 0, 48]> ()
        q = MatMul (x, wq)
        q4 = Reshape (q, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        a = Attention (qt, cache, cache)
        t = Transpose <perm = [0, 2, 1, 3]> (a)
        y = Reshape (t, rows)
    }
    """
    lowered = lower(quantized("int8", model=build(text)))
    (attention,) = [n for n in lowered.graph if n.op_type == "Attention"]
    assert attention.domain == KERNEL_DOMAIN and attention.attributes["layout"].as_string() == "heads"
    assert attention.attributes["kv_heads"].value == 2


def test_weights_that_nothing_quantizes_are_found_wherever_they_are():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 32] x, double[N, 32] w, bool c) => (float[N, 32] y, double[N, 32] z) {
        b = If (c) <
            then_branch = one () => (float[N, 32] p) { p = MatMul(x, inside) },
            else_branch = other () => (float[N, 32] q) { q = Identity(x) }
        >
        y = MatMul(b, site)
        z = MatMul(w, double)
    }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in ("inside", "site")}
    arrays["double"] = rng.standard_normal((32, 32))
    model = ir.from_onnx_text(text, initializers=[ir.tensor(a, name=n) for n, a in arrays.items()])
    assert [site.weight.name for site in linear_sites(model)] == ["site"]
    assert {weight.name for _, weight in other_weights(model)} == {"inside", "double"}
    report = Report("model", "target", "recipe")
    quantize_model(model, get_recipe("w8a8-rtn"), {}, report)
    assert report.float_weights == 2 * 32 * 32
    reasons = " ".join(refusal.reason for refusal in report.refusals)
    assert "inside of branches and loops" in reasons and "float64" in reasons
