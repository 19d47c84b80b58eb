"""Decoders with a cache of keys and values, through the compiled program: prefill, then token by token."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import ort
from qcompile.bench import make_feed, own
from qcompile.cli import cli
from qcompile.errors import InputError
from qcompile.runtime import aligned

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


@pytest.fixture(scope="module")
def step(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder") / "a"
    return qcompile.compile(folder, recipe="w8a8-rtn", output=out, capture_options={"kv_cache": True}, progress=False)


def test_steps_continue_the_prefill(step):
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


def test_a_cache_in_place_gives_the_same_bits(step):
    """What lies behind its positions is neither read nor written."""
    program = step.program
    random, batch, room, before = np.random.default_rng(1), 2, 16, 0
    past = [np.zeros((batch, 2, 0, 16), np.float32)] * (2 * LAYERS)
    cache = [aligned(np.full((batch, 2, room, 16), np.nan, np.float32)) for _ in past]
    for length in (5, 1, 1, 3, 1):
        ids = random.integers(0, 96, (batch, length))
        call = feed(ids, past)
        expected = program.run(call)
        got = program.step.run({**call, **dict(zip(list(call)[3:], cache))})
        past, before = [value for name, value in expected.items() if name != "logits"], before + length
        assert list(got) == ["logits"]
        np.testing.assert_array_equal(got["logits"], expected["logits"])
        for mine, copied in zip(cache, past):
            np.testing.assert_array_equal(mine[:, :, :before], copied)
            assert np.isnan(mine[:, :, before:]).all()


def test_no_sequences_are_no_error(step):
    call = feed(np.zeros((0, 1), np.int64), [np.zeros((0, 2, 8, 16), np.float32)] * (2 * LAYERS))
    call["attention_mask"], call["position_ids"] = np.ones((0, 1), np.int64), np.zeros((0, 1), np.int64)
    assert step.program.step.run(call)["logits"].shape == (0, 1, 96)


def test_what_is_timed_is_the_step_in_place(step):
    program = step.program
    fed = make_feed(program.inputs, {"batch": 1, "sequence": 2, "past": 7})
    run = own(program, fed)
    for _ in range(2):
        assert list(run(fed)) == ["logits"]
        np.testing.assert_array_equal(run(fed)["logits"], program.run(fed)["logits"])


def test_bench_measures_a_token_unless_told_otherwise(step):
    result = CliRunner().invoke(cli, ["bench", str(step.path), "--seconds", "0.1", "--json"])
    assert list(json.loads(result.output)) == ["batch 1, sequence 1, past 128, 1 thread"]


def test_a_cache_that_could_not_be_written_to_is_refused(step):
    program = step.program
    call = feed(np.zeros((1, 1), np.int64), [np.zeros((1, 2, 8, 16), np.float32)] * (2 * LAYERS))
    call["attention_mask"], call["position_ids"] = np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64)
    bent = {name: np.zeros((1, 16, 8, 2), np.float32).transpose(0, 3, 2, 1) for name in list(call)[3:]}
    with pytest.raises(InputError, match="written to"):
        program.step.run({**call, **bent})
    call["attention_mask"] = np.ones((1, 9), np.int64)
    with pytest.raises(InputError, match="no room"):
        program.step.run({**call, **{name: aligned(np.zeros((1, 2, 8, 16), np.float32)) for name in list(call)[3:]}})
