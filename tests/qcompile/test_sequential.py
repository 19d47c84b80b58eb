"""Hessians behind quantized layers: what they are, and that they help."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
import oracle

from qcompile import ort
from qcompile.calibration import collect
from qcompile.calibration.sequential import SequentialStatistics
from qcompile.errors import CalibrationError, RecipeError
from qcompile.passes.sites import linear_sites
from qcompile.quantization import quantize_model
from qcompile.recipes import Recipe
from qcompile.report import Report

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, ROWS = 16, 64


def network() -> ir.Model:
    """Three linear layers with a residual connection around the second."""
    rng = np.random.default_rng(0)
    body = "a = MatMul(x, w0) b = Tanh(a) c = MatMul(b, w1) d = Relu(c) e = Add(b, d) y = MatMul(e, w2)"
    constants = {f"w{i}": rng.standard_normal((WIDTH, WIDTH)) / 3 for i in range(3)}
    model = oracle.parse(body, {"x": (ROWS, WIDTH)}, constants, (ROWS, WIDTH))
    for i, node in enumerate(model.graph):
        node.name = f"node{i}"
    return model


def samples(count: int = 8) -> list[dict]:
    """Normal inputs with correlated channels."""
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((WIDTH, WIDTH)) / 3
    return [{"x": (rng.standard_normal((ROWS, WIDTH)) @ mixing).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_before_anything_is_quantized_the_moments_are_those_of_the_float_model(device):
    """Hessian and cross moment alike, for every activation in turn; not backwards. In ONNX Runtime and in torch."""
    model, feeds = network(), samples()
    sites = {s.node.name: s.x.name for s in linear_sites(model)}
    statistics = SequentialStatistics(model, feeds, sites, lambda name, rows: rows, device=device)
    expected = collect(model, feeds, list(sites.values()), hessian=list(sites.values()))
    for name in sites.values():
        np.testing.assert_allclose(statistics[name].hessian, expected[name].hessian, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics[name].cross, expected[name].hessian, rtol=1e-5, atol=1e-6)
    with pytest.raises(CalibrationError, match="behind it"):
        statistics["x"]


def test_moments_are_of_the_rounded_rows_of_the_quantized_model():
    """With weights of an earlier layer replaced, the next layer's inputs change, the float model's do not."""
    model, feeds = network(), samples(2)
    sites = {s.node.name: s.x.name for s in linear_sites(model)}
    statistics = SequentialStatistics(model, feeds, sites, lambda name, rows: np.round(rows * 4) / 4)
    exact = [ort.run(model, f, ["b"])["b"] for f in feeds]
    first = model.graph.initializers["w0"]
    first.const_value = ir.tensor(np.round(first.const_value.numpy() * 2) / 2, name="w0")
    live = [np.round(ort.run(model, f, ["b"])["b"] * 4) / 4 for f in feeds]
    found = statistics["b"]
    np.testing.assert_allclose(found.hessian, sum(a.T @ a for a in live) / (2 * ROWS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.cross, sum(a.T @ b for a, b in zip(live, exact)) / (2 * ROWS), rtol=1e-4, atol=1e-5
    )


def test_corrected_weights_reproduce_the_float_model_better():
    """At three bits, on the calibration samples: corrected beats once-measured Hessians."""
    feeds = samples()
    exact = [ort.run(network(), f)["y"] for f in feeds]
    errors = {}
    for hessian, device in (("float", "cpu"), ("corrected", "cpu"), ("corrected", "cpu:0")):
        recipe = Recipe("r", weight="int3", activation="int4/token", solver="gptq", hessian=hessian, embedding_bits=0)
        model = network()
        names = [s.x.name for s in linear_sites(model)]
        known = collect(model, feeds, names, hessian=names) if hessian == "float" else {}
        quantized = quantize_model(model, recipe, known, Report("", "", ""), feeds=feeds, device=device)
        errors[hessian, device] = sum(
            float(np.square(ort.run(quantized, f)["y"] - y).sum()) for f, y in zip(feeds, exact)
        )
    assert errors["corrected", "cpu"] < 0.95 * errors["float", "cpu"]
    assert errors["corrected", "cpu:0"] == pytest.approx(errors["corrected", "cpu"], rel=0.02)


def test_unknown_hessians_are_refused():
    """By the recipe, when it is made."""
    with pytest.raises(RecipeError, match="hessian"):
        Recipe("r", hessian="exact")
