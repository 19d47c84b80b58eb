"""Hugging Face directories: what is exported, under which names, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcompile import ort
from qcompile.capture import capture
from qcompile.capture.huggingface import load, model_directory, weight_files
from qcompile.errors import ModelError
from qcompile.passes.recognise import recognise

Tiny = Callable[[str], Path]


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model's directory, to damage."""
    return lambda name: Path(shutil.copytree(tiny(name), tmp_path / "copy"))


def shapes(values) -> dict[str, list[str]]:
    return {value.name: [str(d) for d in value.shape] for value in values}


def test_decoder(tiny: Tiny, feeds) -> None:
    folder = tiny("llama-tied")
    captured = capture(folder)
    assert shapes(captured.model.graph.inputs) == {
        key: ["batch", "sequence"] for key in ("input_ids", "attention_mask")
    }
    assert shapes(captured.model.graph.outputs) == {"logits": ["batch", "sequence", "96"]}
    assert captured.task == "text-generation" and captured.source["parity"]["max_rel_error"] < 1e-5
    assert set(captured.source["files"]) == {"config.json", "model.safetensors"}
    weights = captured.model.graph.initializers
    assert weights["model.layers.1.mlp.down_proj.weight"].const_value.shape == (48, 32)
    assert "model.embed_tokens.weight" in weights
    for node in captured.model.graph:
        assert not any(os.sep + "transformers" in text for text in node.metadata_props.values())
    assert set(captured.example_inputs) == {"input_ids", "attention_mask"}

    result, report = recognise(captured.model)
    head = result.graph.initializers["lm_head.weight"]
    assert head.metadata_props["qcompile.transpose_of"] == "model.embed_tokens.weight" and not report.refused
    for batch in (1, 2, 5):  # rotary tables follow the batch
        inputs = feeds(captured.model, batch, 6)
        before, after = (list(ort.run(m, inputs).values()) for m in (captured.model, result))
        np.testing.assert_allclose(after[0], before[0], atol=2e-5)


def test_decoding_step_continues_the_prefill(tiny: Tiny) -> None:
    folder = tiny("llama-tied")
    step = capture(folder, kv_cache=True).model
    names = [value.name for value in step.graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and names[-1] == "past_key_values.1.value"
    assert [value.name for value in step.graph.outputs][:2] == ["logits", "present.0.key"]
    step, report = recognise(step)
    assert report.composites["Attention"] == 2
    ids = np.random.default_rng(0).integers(0, 96, (2, 9))

    def run(tokens: np.ndarray, past: list[np.ndarray]) -> list[np.ndarray]:
        length = past[0].shape[2]
        total = length + tokens.shape[1]
        feed = {
            "input_ids": tokens,
            "attention_mask": np.ones((2, total), np.int64),
            "position_ids": np.tile(np.arange(length, total), (2, 1)),
            **dict(zip(names[3:], past)),
        }
        return list(ort.run(step, feed).values())

    empty = [np.zeros((2, 2, 0, 8), np.float32)] * 4
    whole, *_ = run(ids, empty)
    first, *past = run(ids[:, :5], empty)
    second, *past = run(ids[:, 5:8], past)
    third, *_ = run(ids[:, 8:], past)
    np.testing.assert_allclose(np.concatenate([first, second, third], 1), whole, atol=1e-5)


def inputs_of(folder: Path, **options) -> list[str]:
    return load(folder, **{"task": None, "kv_cache": False, "token_types": None, **options}).input_names


def test_encoder_takes_token_types_where_it_knows_several(tiny: Tiny, copy: Callable[[str], Path]) -> None:
    assert inputs_of(tiny("bert")) == ["input_ids", "attention_mask", "token_type_ids"]
    assert inputs_of(tiny("bert"), token_types=False) == ["input_ids", "attention_mask"]


def test_sentence_transformer_directory(tiny: Tiny, tmp_path: Path) -> None:
    inner = tmp_path / "0_Transformer"
    shutil.copytree(tiny("bert"), inner)
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert model_directory(tmp_path) == (inner.resolve(), True)
    assert model_directory(inner) == (inner, False)
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="leaves the directory"):
        model_directory(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules[1:]))
    with pytest.raises(ModelError, match="no module of type Transformer"):
        model_directory(tmp_path)


def test_image_models(tiny: Tiny) -> None:
    vit = load(tiny("vit"), task=None, kv_cache=False, token_types=None)
    assert (vit.input_names, vit.output_names, vit.task) == (["pixel_values"], ["last_hidden_state"], "image-features")
    assert vit.examples[0][0].shape == (2, 3, 16, 16)
    resnet = load(tiny("resnet"), task=None, kv_cache=False, token_types=None)
    assert (resnet.output_names, resnet.task) == (["logits"], "image-classification")


def test_pickled_weights_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model\.bin\)"):
        capture(folder)


def test_no_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        capture(folder)


def test_truncated_weights(copy: Callable[[str], Path]) -> None:
    file = copy("bert") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: corrupt or truncated"):
        capture(file.parent)


def test_weights_behind_a_link_outside(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    os.symlink(tmp_path / "elsewhere.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match="outside the model directory"):
        capture(folder)


def test_links_of_the_download_cache_are_fine(tiny: Tiny, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(tiny("bert").iterdir())):
        shutil.copy(file, blobs / str(index))
        os.symlink(blobs / str(index), snapshot / file.name)
    assert [file.name for file in weight_files(snapshot)] == ["model.safetensors"]


def test_missing_weight(copy: Callable[[str], Path]) -> None:
    from safetensors.numpy import load_file, save_file

    file = copy("bert") / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, first 'encoder\.layer\.1\.output\.dense\.weight'"):
        capture(file.parent)


def test_weight_of_the_wrong_shape(copy: Callable[[str], Path], edit_config) -> None:
    folder = copy("bert")
    edit_config(folder, intermediate_size=40)
    with pytest.raises(ModelError, match="intermediate"):
        capture(folder)


def test_nan_weight(copy: Callable[[str], Path]) -> None:
    from safetensors.numpy import load_file, save_file

    file = copy("vit") / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("layernorm.weight"))
    weights[name][3] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"weight '{name}': 1 value is not finite, the first at \[3\]"):
        capture(file.parent)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "unheard-of"}'])
def test_bad_config(copy: Callable[[str], Path], content: str) -> None:
    folder = copy("bert")
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        capture(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_encoder_decoder_is_refused(copy: Callable[[str], Path], edit_config) -> None:
    folder = copy("bert")
    edit_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    with pytest.raises(ModelError, match="encoder-decoder"):
        capture(folder)


def test_wrong_task(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="task 'poetry'"):
        capture(tiny("bert"), task="poetry")
    with pytest.raises(ModelError, match="key-value cache"):
        capture(tiny("bert"), kv_cache=True)


def test_a_model_without_attention_has_no_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'mamba' has no attention"):
        capture(tmp_path, kv_cache=True)
