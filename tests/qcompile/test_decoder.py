"""Decoders with a cache of keys and values, through the compiled program: prefill, then token by token."""

import numpy as np
import pytest

import qcompile
from qcompile import ort

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def feed(ids, past):
    batch, length = ids.shape
    before = past[0].shape[2]
    names = [f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    return {
        "input_ids": ids,
        "attention_mask": np.ones((batch, before + length), np.int64),
        "position_ids": np.tile(np.arange(before, before + length), (batch, 1)),
        **dict(zip(names, past)),
    }


@pytest.mark.parametrize("recipe", ["w8a8-rtn"])
def test_steps_continue_the_prefill(folder, recipe, tmp_path):
    step = qcompile.compile(
        folder, recipe=recipe, output=tmp_path / "a", capture_options={"kv_cache": True}, progress=False
    )
    assert step.report.kernels["attention"] == LAYERS, "the kernel reads the cache as it is"
    session = ort.session(step.onnx_path)
    random = np.random.default_rng(0)
    ids = random.integers(0, 96, (2, 9))
    empty = [np.zeros((2, 2, 0, 16), np.float32)] * (2 * LAYERS)
    whole = step.run(feed(ids, empty))
    np.testing.assert_allclose(
        whole["logits"], ort.run(session, feed(ids, empty))["logits"], atol=0.02 * np.abs(whole["logits"]).max()
    )
    past = empty
    for position in range(9):
        part = step.run(feed(ids[:, position : position + 1], past))
        past = [value for name, value in part.items() if name != "logits"]
        assert past[0].shape == (2, 2, position + 1, 16)
        expected = whole["logits"][:, position]
        assert np.abs(part["logits"][:, 0] - expected).max() < 0.03 * np.abs(expected).max()
