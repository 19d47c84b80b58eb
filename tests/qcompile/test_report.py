"""The page of a compile: ranges before and after the transforms, errors, sizes, latency; nothing from outside of it."""

import io
import re
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompile
from qcompile.report.html import short, write_html
from qcompile.report.model import LayerRecord, Report
from qcompile.report.table import print_report

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[batch, 64] x, float[64] gamma, float[64] beta, float[64, 96] w1, float[96, 64] w2) => (float[batch, 64] y)
{
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    a = MatMul (n, w1)
    g = Gelu (a)
    y = MatMul (g, w2)
}
"""


def compile_it(model, output):
    random = np.random.default_rng(1)
    samples = [{"x": random.standard_normal((4, 64)).astype(np.float32)} for _ in range(4)]
    return qcompile.compile(model, recipe="w8a8", calibration=samples, output=output, progress=False)


@pytest.fixture(scope="module")
def model():
    random = np.random.default_rng(0)
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    for value in [v for v in model.graph.inputs if v.name != "x"]:
        array = random.standard_normal([int(d) for d in value.shape]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    return compile_it(model, tmp_path_factory.mktemp("r") / "a")


def test_every_site_has_its_ranges_before_and_after(compiled):
    for layer in compiled.report.layers:
        assert len(layer.before) == len(layer.after) == layer.shape[0]
        assert layer.before != layer.after, "the input is rotated"


def test_the_page_holds_all_of_it_and_loads_nothing(compiled):
    text = (compiled.path / "report.html").read_text()
    for title in ("Channel ranges", "Size by tensor", "Error of each layer", "Left undone", "Files"):
        assert title in text
    assert text.count("<svg") == 3
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text and "<script" not in text


@pytest.mark.parametrize("limit, samples", [("LARGE_MODEL", 2), ("MAX_CHECK_BYTES", 1)])
def test_large_models_are_compared_on_fewer_samples(model, compiled, tmp_path, monkeypatch, limit, samples):
    monkeypatch.setattr(f"qcompile.compiler.{limit}", 0)
    quality = compile_it(model, tmp_path / "a").report.quality
    assert quality["samples"] == samples and compiled.report.quality["samples"] == 4
    assert quality.keys() == compiled.report.quality.keys()
    assert quality["program_to_onnx_error"] < 1e-3 and quality["onnx_to_float_cosine"] > 0.999


def test_latency_and_names_that_need_escaping(tmp_path):
    report = Report("a<b>", "x86", "w8a8")
    report.layers = [
        LayerRecord("layer <1>", "linear", (4, 4), "int8", output_error=0.01, kernel="k", kernel_reason="<why>")
    ]
    write_html(tmp_path / "r.html", report, {"batch 1": {"qcompile": 1.5, "peer": 3.25}})
    text = (tmp_path / "r.html").read_text()
    assert "Output error of each layer" in text and "3.25" in text and "a&lt;b&gt;" in text
    assert "<1>" not in text and "<why>" not in text


def test_long_names_keep_both_ends():
    name = short("encoder.layer.11.attention.self.query.something.very.long.indeed.weight.codes.weight")
    assert len(name) <= 48 and name.startswith("encoder.layer.11") and name.endswith("indeed.weight")


def test_a_layer_of_zeros_is_drawn_without_a_warning(tmp_path):
    zeros = LayerRecord("dead", "linear", (4, 4), "int8", before=[0.0] * 4, after=[0.0] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_html(tmp_path / "r.html", Report("m", "t", "r", layers=[zeros]))


def test_names_with_brackets_are_printed_whole():
    from rich.console import Console

    report = Report("model[a]", "t", "r")
    report.refuse("fold", "node[b]", "shape [3, x]")
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(report, 1, console=console)
    text = console.export_text()
    assert "model[a]" in text and "node[b]: shape [3, x]" in text
