"""Calibration and evaluation inputs: from .npz, .txt or .jsonl with a tokenizer, or any Python iterable."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import CalibrationError

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class InputSpec:
    """Name, dtype and shape (ints, or None/str for dynamic extents) of a model input."""

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...]


def load_feeds(
    source: Any, inputs: Sequence[InputSpec], *, tokenizer: str | os.PathLike[str] | None = None, max_tokens: int = 512
) -> list[Feed]:
    """Turn ``source`` into a list of input dictionaries for the model.

    Args:
        source: path of a ``.npz`` (one array per input; the first axis is the batch), ``.txt`` (one text per line, or
            documents separated by NUL) or ``.jsonl`` (a ``text`` field per line, or one field per input); or an
            iterable of dictionaries, arrays (models with one input) or texts.
        inputs: the model's inputs.
        tokenizer: path of ``tokenizer.json``, needed for texts.
        max_tokens: texts are cut, and documents split, at this length.

    Raises:
        CalibrationError: nothing usable is in ``source``, or it does not match the model's inputs.
    """
    if isinstance(source, (str, os.PathLike)):
        feeds = list(_from_file(Path(source), inputs, tokenizer, max_tokens))
        where = os.fspath(source)
    else:
        feeds = list(_from_iterable(source, inputs, tokenizer, max_tokens))
        where = "the calibration data"
    if not feeds:
        raise CalibrationError(f"{where} holds no samples")
    for i, feed in enumerate(feeds):
        _check(feed, inputs, f"{where}, sample {i}")
    return feeds


def _from_file(path: Path, inputs: Sequence[InputSpec], tokenizer: Any, max_tokens: int) -> Iterator[Feed]:
    if not path.is_file():
        raise CalibrationError(f"calibration file {path} does not exist")
    if path.suffix == ".npz":
        yield from _from_npz(path, inputs)
    elif path.suffix in (".txt", ".jsonl"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        if path.suffix == ".txt":
            documents = text.split("\0") if "\0" in text else text.splitlines()
            yield from _from_iterable((d.strip() for d in documents if d.strip()), inputs, tokenizer, max_tokens)
        else:
            yield from _from_iterable(_json_lines(path, text), inputs, tokenizer, max_tokens)
    else:
        raise CalibrationError(f"{path}: expected a .npz, .txt or .jsonl file")


def _from_npz(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Feed]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        reason = str(error) if zipfile.is_zipfile(path) else "it is no zip archive"
        raise CalibrationError(f"{path} is not a readable .npz file: {reason}") from None
    missing = [i.name for i in inputs if i.name not in arrays]
    if missing:
        raise CalibrationError(
            f"{path} lacks the model input(s) {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}"
        )
    if flat := [i.name for i in inputs if not arrays[i.name].ndim]:
        raise CalibrationError(f"{path}: input {flat[0]!r} is a single number; its first axis must count the samples")
    lengths = {len(arrays[i.name]) for i in inputs}
    if len(lengths) != 1:
        raise CalibrationError(f"{path}: inputs disagree on the batch size: {sorted(lengths)}")
    for row in range(lengths.pop()):
        yield {i.name: arrays[i.name][row : row + 1] for i in inputs}


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path}:{number}: not JSON: {error.msg}") from None
            yield record["text"] if isinstance(record, dict) and "text" in record else record


def _from_iterable(
    source: Iterable[Any], inputs: Sequence[InputSpec], tokenizer: Any, max_tokens: int
) -> Iterator[Feed]:
    encode = None
    try:
        items = iter(source)
    except TypeError:
        raise CalibrationError(f"calibration data must be a path or an iterable, not {type(source).__name__}") from None
    by_name = {i.name: i for i in inputs}
    for number, item in enumerate(items):
        if isinstance(item, str):
            encode = encode or text_encoder(tokenizer, inputs, max_tokens)
            yield from encode(item)
        elif isinstance(item, Mapping):
            yield {
                k: _array(v, by_name[k].dtype if k in by_name and isinstance(v, list) else None, number, k)
                for k, v in item.items()
            }
        elif _one_each(item, inputs):
            yield {i.name: _array(v, None, number, i.name) for i, v in zip(inputs, item)}
        elif len(inputs) == 1:
            yield {inputs[0].name: _array(item, None, number, inputs[0].name)}
        else:
            raise CalibrationError(
                f"a calibration sample of type {type(item).__name__} does not fit {len(inputs)} inputs; pass dictionaries"
            )


def _one_each(item: Any, inputs: Sequence[InputSpec]) -> bool:
    """Whether a sample is one value per input; of one input, ``[[1, 2]]`` is the value itself, ``[array]`` holds it."""
    if not isinstance(item, (tuple, list)) or len(item) != len(inputs):
        return False
    return len(inputs) > 1 or isinstance(item, tuple) or hasattr(item[0], "shape")


def _array(value: Any, dtype: np.dtype | None, number: int, name: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error).partition(". ")[0]
        raise CalibrationError(
            f"sample {number} of the calibration data: input {name!r} is no array: {reason}"
        ) from None


def text_encoder(tokenizer: str | os.PathLike[str] | None, inputs: Sequence[InputSpec], max_tokens: int = 512) -> Any:
    """Return a function from a text to a list of feeds with batch 1, at most ``max_tokens`` tokens each.

    Recognises token ids, masks and type ids by their dtype and the names the tokenizer itself uses.
    """
    if tokenizer is None:
        raise CalibrationError(
            "texts need the model's tokenizer.json: give `tokenizer` (`--tokenizer`), or arrays in a .npz file"
        )
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_file(os.fspath(tokenizer))
    except Exception as error:
        raise CalibrationError(f"{tokenizer} is not a tokenizer.json file: {error}") from None
    encoder.no_padding()
    encoder.no_truncation()
    known = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    empty = {i.name: _no_past(i) for i in inputs if i.name.startswith("past_key_values.")}
    strange = [i.name for i in inputs if i.name not in {*known, *empty, "position_ids"}]
    if strange:
        raise CalibrationError(f"cannot make input(s) {', '.join(strange)} from text; pass arrays in a .npz file")

    def encode(text: str) -> list[Feed]:
        whole = encoder.encode(text)
        feeds = []
        for start in range(0, len(whole.ids), max_tokens):
            stop = min(start + max_tokens, len(whole.ids))
            feed = {}
            for i in inputs:
                if i.name in empty:
                    feed[i.name] = empty[i.name]
                    continue
                if i.name == "position_ids":
                    row = list(range(stop - start))
                else:
                    row = getattr(whole, known[i.name])[start:stop]
                feed[i.name] = np.asarray([row], i.dtype)
            feeds.append(feed)
        return feeds

    return encode


def _no_past(spec: InputSpec) -> np.ndarray:
    """A cache ``(batch, heads, past, size)`` of one sequence that has read nothing yet."""
    batch, *rest = spec.shape
    return np.zeros(
        [1 if isinstance(batch, str) else batch or 1, *(d if isinstance(d, int) else 0 for d in rest)], spec.dtype
    )


def _check(feed: Feed, inputs: Sequence[InputSpec], where: str) -> None:
    for spec in inputs:
        if spec.name not in feed:
            raise CalibrationError(
                f"{where}: model input {spec.name!r} is missing; it has {', '.join(feed) or 'nothing'}"
            )
        array = feed[spec.name]
        if array.ndim != len(spec.shape):
            raise CalibrationError(
                f"{where}: input {spec.name!r} has shape {array.shape}, the model takes {_shape(spec)}"
            )
        for axis, (have, want) in enumerate(zip(array.shape, spec.shape)):
            if isinstance(want, int) and have != want:
                raise CalibrationError(
                    f"{where}: input {spec.name!r} has {have} along axis {axis}, the model takes {_shape(spec)}"
                )
        if array.dtype != spec.dtype:
            if (array.dtype.kind in "iu" and spec.dtype.kind in "iu") or (
                array.dtype.kind in "fiu" and spec.dtype.kind == "f"
            ):
                with np.errstate(over="ignore"):  # what overflows is refused below
                    array = feed[spec.name] = array.astype(spec.dtype)
            else:
                raise CalibrationError(f"{where}: input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(f"{where}: input {spec.name!r} holds NaN or Inf")


def _shape(spec: InputSpec) -> str:
    return "(" + ", ".join(str(d) if d is not None else "?" for d in spec.shape) + ")"
