"""Perplexity of compiled programs on a decoder, windows of 512 tokens spread evenly over the evaluation text.

    python benchmarks/perplexity.py MODEL_DIRECTORY --recipe w8a8 --recipe w4a8-g128

MODEL_DIRECTORY is a Hugging Face directory with ``calibration.txt`` and ``eval.txt`` (documents separated by NUL). The
documents, stripped, each behind ``<s>``, make one stream of tokens, which is cut into windows; 48 of them, evenly spread,
are evaluated, every token but the first of its window. Calibration uses windows of ``calibration.txt`` made the same way.
What runs is the artifact itself, not a simulation; the float figure comes from the captured graph in ONNX Runtime.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import qcompile
from qcompile import ort
from qcompile.capture import capture
from qcompile.passes.recognise import recognise


def windows(directory: Path, count: int, length: int, text: str = "eval.txt") -> np.ndarray:
    """``(count, length)`` token ids: windows of the concatenated documents, spread evenly."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    start = tokenizer.token_to_id("<s>")
    assert start is not None, "the tokenizer has no <s>"
    stream: list[int] = []
    for document in (directory / text).read_text(encoding="utf-8").split("\0"):
        if document.strip():
            stream += [start, *tokenizer.encode(document.strip(), add_special_tokens=False).ids]
    whole = len(stream) // length
    rows = np.asarray(stream[: whole * length], np.int64).reshape(whole, length)
    return rows[np.linspace(0, whole - 1, min(count, whole)).astype(int)]


def feeds(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """One sample per window."""
    return [{"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64)} for row in rows]


def perplexity(run, ids: np.ndarray) -> float:
    """``exp`` of the mean negative log likelihood of every token but the first of each window."""
    total = 0.0
    for row, feed in zip(ids, feeds(ids)):
        logits = run(feed)[0, :-1].astype(np.float64)
        top = logits.max(1, keepdims=True)
        norm = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        total += float((norm - logits[np.arange(len(row) - 1), row[1:]]).sum())
    return float(np.exp(total / (ids.shape[0] * (ids.shape[1] - 1))))


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--recipe", "recipes", multiple=True, default=("w8a8", "w4a8-g128"))
@click.option("--windows", "count", default=48)
@click.option("--length", default=512)
@click.option("--samples", default=64, help="Calibration windows.")
@click.option("--json", "as_json", is_flag=True)
def main(directory: Path, recipes: tuple[str, ...], count: int, length: int, samples: int, as_json: bool) -> None:
    ids = windows(directory, count, length)
    graph, _ = recognise(capture(directory, check=False).model)
    session = ort.session(graph)
    exact = perplexity(lambda feed: next(iter(ort.run(session, feed).values())), ids)
    rows = {"float": {"perplexity": exact, "increase": 0.0, "bits per weight": 32.0, "MB": 0.0}}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            model = qcompile.compile(
                directory,
                recipe=recipe,
                calibration=feeds(windows(directory, samples, length, "calibration.txt")),
                output=Path(folder) / recipe,
            )
            value = perplexity(lambda feed, run=model.run: next(iter(run(feed).values())), ids)
            rows[recipe] = {
                "perplexity": value,
                "increase": value / exact - 1,
                "bits per weight": model.report.bits_per_weight,
                "MB": model.size / 1e6,
            }
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("recipe", "perplexity", "increase", "bits per weight", "MB", box=None)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['perplexity']:.4f}",
            f"{100 * row['increase']:.2f} %",
            f"{row['bits per weight']:.2f}",
            f"{row['MB']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
