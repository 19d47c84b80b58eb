"""Texts of a compiled decoder: equal to reading everything again, sampled as asked, ended where the model says."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile import generation, ort
from qcompile.capture import huggingface
from qcompile.cli import cli
from qcompile.errors import InputError
from qcompile.generation import Decoder, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "pack", "my",
         "box", "with", "five", "dozen", "jugs"]  # fmt: skip
END, POSITIONS = 1, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("llama")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=POSITIONS, eos_token_id=END, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encoder.add_special_tokens(["</s>"])
    encoder.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """Calibrated with texts, although its cache is an input."""
    out = tmp_path_factory.mktemp("decoder") / "out"
    texts = [" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(8)]
    return qcompile.compile(
        folder, recipe="w8a8", solver="gptq", calibration=texts, capture_options={"kv_cache": True}, output=out,
        progress=False,
    )  # fmt: skip


def test_the_tokenizer_that_is_named_is_the_artifacts(folder, tmp_path):
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"]["hello"] = other["model"]["vocab"].pop("jugs")
    (tmp_path / "other.json").write_text(json.dumps(other))
    named = qcompile.compile(
        folder, recipe="w8a8-rtn", tokenizer=tmp_path / "other.json", capture_options={"kv_cache": True}, progress=False,
        output=tmp_path / "out",
    )  # fmt: skip
    assert generation.tokenizer(named).token_to_id("hello") == WORDS.index("jugs") + 2


def test_texts_calibrate_a_decoder_with_a_cache(model):
    assert model.report.quality["samples"] > 0
    assert all(layer.output_error is not None for layer in model.report.layers if layer.kind == "linear")


def test_tokens_are_those_of_reading_everything_again(model, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 3)  # the prompt is longer
    monkeypatch.setattr(generation, "ROOM", 4)  # so that the cache grows
    prompt = [2, 3, 4, 5, 6, 7, 8, 9]
    writing = model.generate(prompt, max_new_tokens=12)
    written = list(writing.ids())
    assert written == writing.tokens and len(written) == writing.pace.written > 1
    whole = Decoder(model)
    session = ort.session(model.onnx_path)
    tokens = np.array([prompt + written], np.int64)
    close = 0
    for at, token in enumerate(written, len(prompt)):
        whole.reset()
        logits = whole.read(tokens[:, :at])[0]
        # Rows of other shapes may be added up in another order; a tie may then fall otherwise.
        assert logits.max() - logits[token] <= 1e-4 * np.abs(logits).max()
        feed = {"input_ids": tokens[:, :at], "attention_mask": np.ones((1, at), np.int64),
                "position_ids": np.arange(at)[None],
                **{s.name: np.zeros((1, 1, 0, 16), np.float32) for s in model.inputs if s.name.startswith("past")}}  # fmt: skip
        close += int(np.argmax(ort.run(session, feed)["logits"][0, -1])) == token
    assert close >= 0.8 * len(written)


def test_it_is_the_text_of_the_float_model(model, folder):
    """Greedy, where the float model is sure of itself."""
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    writing = model.generate("the quick brown fox", max_new_tokens=20)
    writing.ends = frozenset()
    text, prompt = "".join(writing), generation.tokenizer(model).encode("the quick brown fox").ids
    assert text.strip() == generation.tokenizer(model).decode(writing.tokens).strip() and len(writing.tokens) > 5
    ids = [*prompt, *writing.tokens]
    with torch.no_grad():
        logits = exact(torch.tensor([ids])).logits[0].numpy()
    for at in range(len(prompt), len(ids)):
        best = np.sort(logits[at - 1])
        assert ids[at] == logits[at - 1].argmax() or best[-1] - best[-2] < 0.1 * np.abs(best).max()


@pytest.mark.parametrize("ends", [END, [END, 5]])
def test_what_ends_a_text_is_read_whatever_the_model_calls_it(ends, tmp_path):
    """GPT-2 says ``n_positions``; a generation_config.json has the last word on the tokens."""
    config = transformers.GPT2Config(vocab_size=8, n_positions=17, n_embd=8, n_layer=1, n_head=1, eos_token_id=3)
    small = transformers.GPT2LMHeadModel(config)
    small.generation_config.eos_token_id = ends
    small.save_pretrained(tmp_path)
    prepared = huggingface.load(tmp_path, task=None, kv_cache=True, token_types=None)
    assert prepared.generation == {"ends": ends if isinstance(ends, list) else [ends], "positions": 17}


def test_a_text_ends_where_the_model_ends_it(model):
    facts = model.manifest["source"]["generation"]
    assert facts == {"ends": [END], "positions": POSITIONS}
    always = model.generate([2, 3], max_new_tokens=9)
    first = next(always.ids())
    writing = model.generate([2, 3], max_new_tokens=9)
    writing.ends = frozenset([first])
    assert list(writing.ids()) == [] and writing.pace.end == "end of text"
    writing = model.generate([2] * (POSITIONS - 3), max_new_tokens=99)
    writing.ends = frozenset()
    assert len(list(writing.ids())) == 4 and writing.pace.end == "longest text of the model"
    writing = model.generate([2, 3], max_new_tokens=2)
    writing.ends = frozenset()
    assert len(list(writing.ids())) == 2 and writing.pace.end == "as many tokens as asked for"


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 12),
    st.floats(0.01, 1),
)
def test_probabilities(logits, temperature, top_k, top_p):
    chances = Sampling(temperature, top_k, top_p).probabilities(np.array(logits, np.float32))
    logits = np.array(logits)
    softmax = np.exp((logits - logits.max()) / temperature)
    softmax /= softmax.sum()
    kept = np.flatnonzero(chances)
    assert np.isclose(chances.sum(), 1) and 1 <= len(kept) <= (top_k or len(logits))
    left = np.setdiff1d(np.arange(len(logits)), kept)
    assert not len(left) or logits[left].max() <= logits[kept].min(), "the likeliest are kept"
    np.testing.assert_allclose(chances[kept], softmax[kept] / softmax[kept].sum(), rtol=1e-9)
    if not top_k:
        assert softmax[kept].sum() >= top_p * (1 - 1e-9) or len(kept) == np.count_nonzero(softmax)
        assert softmax[kept].sum() - softmax[kept].min() < top_p * (1 + 1e-9), "and no more of them than needed"


def test_draws_follow_the_probabilities_and_the_seed(model):
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    random = np.random.default_rng(0)
    drawn = np.bincount([Sampling(1.0, top_k=3).choose(logits, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)
    texts = [
        "".join(model.generate("the lazy dog", temperature=2.0, seed=seed, max_new_tokens=8)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    again = model.generate("the lazy dog", temperature=2.0, seed=1, max_new_tokens=8)
    assert "".join(again) == "".join(again) == texts[0] and len(again.tokens) == again.pace.written
    assert "".join(model.generate("the lazy dog", temperature=2.0, top_k=1, max_new_tokens=8)) == "".join(
        model.generate("the lazy dog", max_new_tokens=8)
    )


def call(*args, **options):
    return CliRunner().invoke(cli, [str(a) for a in args], **options)


def test_command(model, tmp_path):
    want = "".join(model.generate("the quick", max_new_tokens=5))
    shown = call("generate", model.path, "the quick", "-n", 5)
    assert shown.exit_code == 0 and shown.stdout == want + "\n"
    assert "2 tokens read at" in shown.stderr and "written at" in shown.stderr
    (tmp_path / "prompt.txt").write_text("the quick", encoding="utf-8")
    found = json.loads(call("generate", model.path, "--file", tmp_path / "prompt.txt", "-n", 5, "--json").stdout)
    assert found["text"] == want and found["read"] == 2 and len(found["tokens"]) == found["written"]
    piped = call("generate", model.path, "--file", "-", "-n", 5, input="the quick")
    assert piped.stdout == want + "\n"


def test_a_step_is_measured_beside_onnx_runtime_on_the_float_step(model):
    shape = ("--shape", "batch=1,sequence=1,past=9", "--seconds", "0.05", "--json")
    (times,) = json.loads(call("bench", model.path, "--against", "onnxruntime", *shape).stdout).values()
    assert {"qcompile", "ORT float", "ORT int8"} <= times.keys() and min(times.values()) > 0
    assert "give the extent of 'past'" in call("bench", model.path, "--shape", "batch=1,sequence=1").stderr


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([2] * (POSITIONS + 1), {}, "reads at most 40"),
        ([2, 99], {}, "outside of 0..20"),
        ([2, -1], {}, "outside of 0..20"),
        ("the", {"temperature": -1.0}, "temperature"),
        ("the", {"temperature": float("nan")}, "temperature"),
        ("the", {"seed": -1}, "seed"),
        ("the", {"top_p": 0.0}, "top_p"),
        ("the", {"top_k": -1}, "top_k"),
        ("the", {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_continued_is_said(model, prompt, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **options)


def test_a_model_without_a_cache_says_how_to_get_one(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (int64[batch, n] input_ids) => (int64[batch, n] y) { y = Identity (input_ids) }'
    plain = qcompile.compile(onnx.parser.parse_model(text), recipe="w8a8-rtn", output=tmp_path / "out", progress=False)
    shown = call("generate", plain.path, "the quick")
    assert shown.exit_code != 0 and "--kv-cache" in shown.stderr and "Traceback" not in shown.stderr
    assert call("generate", plain.path).exit_code != 0
    assert "cannot read" in call("generate", plain.path, "--file", tmp_path / "none.txt").stderr
