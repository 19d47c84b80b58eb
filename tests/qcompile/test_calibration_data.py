"""Calibration data: every accepted source gives the same feeds; everything else gets one clear error."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompile.calibration import ChannelStatistics, InputSpec, load_feeds
from qcompile.errors import CalibrationError

IDS = InputSpec("input_ids", np.dtype(np.int64), ("batch", "sequence"))
MASK = InputSpec("attention_mask", np.dtype(np.int64), ("batch", "sequence"))
IMAGE = InputSpec("x", np.dtype(np.float32), ("batch", 3, 4))


@pytest.fixture
def tokenizer(tmp_path):
    words = {w: i for i, w in enumerate(["[UNK]", "a", "small", "house", "on", "hill"])}
    built = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    return path


def test_texts_lines_and_json_lines_agree(tmp_path, tokenizer):
    texts = ["a small house", "a house on a hill"]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    for source in (texts, tmp_path / "t.txt", str(tmp_path / "t.jsonl")):
        feeds = load_feeds(source, [IDS, MASK], tokenizer=tokenizer)
        assert [f["input_ids"].tolist() for f in feeds] == [[[1, 2, 3]], [[1, 3, 4, 1, 5]]]
        assert all((f["attention_mask"] == 1).all() and f["attention_mask"].dtype == np.int64 for f in feeds)


def test_documents_are_split_at_the_token_limit(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("a small house\non a hill\0hill")
    feeds = load_feeds(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, max_tokens=4)
    assert [f["input_ids"].tolist()[0] for f in feeds] == [[1, 2, 3, 4], [1, 5], [5]]


def test_npz_rows_become_samples(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    feeds = load_feeds(tmp_path / "x.npz", [IMAGE])
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), x)


def test_arrays_dictionaries_and_tuples(tokenizer):
    x = np.zeros((1, 3, 4))
    assert load_feeds([x], [IMAGE])[0]["x"].dtype == np.float32
    ids = np.array([[1, 2]], np.int32)
    assert load_feeds([(ids, ids)], [IDS, MASK])[0]["attention_mask"].dtype == np.int64
    assert load_feeds([{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}], [IDS, MASK])[0]["input_ids"].shape == (
        1,
        2,
    )


def test_a_tuple_of_one_array_is_what_a_data_loader_gives():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    for item in (x, (x,), [x], x.tolist()):
        (feed,) = load_feeds([item], [IMAGE])
        np.testing.assert_allclose(feed["x"], x, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b"\n \n", "no samples"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops', r"bad\.jsonl:2"),
        ("bad.npz", b"not a zip", r"\.npz"),
        ("x.csv", b"1,2", "expected a .npz"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_feeds(tmp_path / name, [IDS], tokenizer=tokenizer)


def test_missing_inputs_wrong_shapes_and_nan_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", y=np.zeros((2, 3, 4), np.float32))
    with pytest.raises(CalibrationError, match=r"lacks the model input.*x"):
        load_feeds(tmp_path / "x.npz", [IMAGE])
    with pytest.raises(CalibrationError, match="5 along axis 1"):
        load_feeds([np.zeros((1, 5, 4))], [IMAGE])
    with pytest.raises(CalibrationError, match="shape"):
        load_feeds([np.zeros((3, 4))], [IMAGE])
    with pytest.raises(CalibrationError, match="NaN"):
        load_feeds([np.full((1, 3, 4), np.nan, np.float32)], [IMAGE])
    with pytest.raises(CalibrationError, match="float64"):
        load_feeds([np.zeros((1, 2))], [IDS])
    with pytest.raises(CalibrationError, match="iterable"):
        load_feeds(7, [IDS])


def test_ragged_lists_single_numbers_and_overflow_are_named(tmp_path):
    (tmp_path / "ragged.jsonl").write_text('{"x": [[1, 2], [3]]}')
    with pytest.raises(CalibrationError, match=r"sample 0 .* input 'x' is no array"):
        load_feeds(tmp_path / "ragged.jsonl", [IMAGE])
    np.savez(tmp_path / "one.npz", x=np.float32(3))
    with pytest.raises(CalibrationError, match="'x' is a single number"):
        load_feeds(tmp_path / "one.npz", [IMAGE])
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        load_feeds([np.full((1, 3, 4), 1e300)], [IMAGE])


def test_a_pickle_in_an_npz_is_not_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationError):
        load_feeds(tmp_path / "x.npz", [IMAGE])


def test_texts_without_a_tokenizer_or_for_images_are_refused(tokenizer):
    with pytest.raises(CalibrationError, match="tokenizer"):
        load_feeds(["a house"], [IDS])
    with pytest.raises(CalibrationError, match="cannot make input"):
        load_feeds(["a house"], [IMAGE], tokenizer=tokenizer)


def test_statistics_equal_those_of_all_rows_at_once():
    random = np.random.default_rng(0)
    batches = [random.standard_normal((2, n, 6)).astype(np.float32) * np.arange(1, 7) for n in (1, 5, 9)]
    statistics = ChannelStatistics(6, with_hessian=True)
    for batch in batches:
        statistics.update(batch)
    statistics.flush()
    rows = np.concatenate([b.reshape(-1, 6) for b in batches]).astype(np.float64)
    assert statistics.tokens == len(rows)
    np.testing.assert_allclose(statistics.absmax, np.abs(rows).max(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    exact = np.percentile(np.abs(rows), 90)
    assert exact * 0.9 < statistics.percentile(90) < exact * 1.1
    assert statistics.percentile(100) == pytest.approx(np.abs(rows).max())
