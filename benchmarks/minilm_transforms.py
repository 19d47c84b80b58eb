"""What transforms are worth on all-MiniLM-L6-v2 at four bits: cosine of sentence embeddings to the float model.

    python benchmarks/minilm_transforms.py [--row NAME ...] [--program] [--json]

Weights ``int4/g32``, activations ``int4/token``, embedding tables int8; 80 of the held-out sentences, 96 calibration
samples, measured through the quantized graph in ONNX Runtime. ``--program`` also compiles the recipe ``w4a4`` with all 256
calibration samples and measures its program on all 200 held-out sentences.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile import ort
from qcompile.calibration import collect, input_specs, load_feeds
from qcompile.capture import capture
from qcompile.demo import bundled, cosine_to_float, embeddings, minilm_directory
from qcompile.passes.recognise import recognise
from qcompile.passes.sites import linear_sites
from qcompile.quantization import quantize_model, sites_with_hessian
from qcompile.recipes import Recipe, Step, get_recipe
from qcompile.report import Report
from qcompile.transforms import TransformContext, apply_transforms

SMOOTH, CLIP = Step("smooth", {"alpha": 0.5}), Step("clip")
BLOCKS = Step("rotate-online", {"block": 128, "everywhere": True})
ROWS = Step("rotate-online", {"everywhere": True})
SIGNED = Step("rotate-online", {"everywhere": True, "signs": True})
CASES: dict[str, tuple[str, tuple[Step, ...]]] = {
    "none": ("rtn", ()),
    "smooth, blocks of 128": ("gptq", (SMOOTH, BLOCKS)),
    "smooth, blocks of 128, clip": ("gptq", (SMOOTH, BLOCKS, CLIP)),
    "smooth, whole rows, clip": ("gptq", (SMOOTH, ROWS, CLIP)),
    "smooth, signed whole rows, clip": ("gptq", (SMOOTH, SIGNED, CLIP)),
    "w4a4": ("gptq", get_recipe("w4a4").transforms),
}


class Study:
    """The float model, its calibration samples, sentences and their exact embeddings."""

    def __init__(self, samples: int, sentences: int) -> None:
        captured = capture(minilm_directory(), check=False)
        self.tokenizer, self.graph = captured.tokenizer, recognise(captured.model)[0]
        self.specs = input_specs(self.graph)
        feeds = load_feeds(bundled("calibration_sentences.txt"), self.specs, tokenizer=self.tokenizer, max_tokens=256)
        self.feeds = [feeds[i] for i in np.linspace(0, len(feeds) - 1, min(samples, len(feeds))).astype(int)]
        self.sentences = bundled("heldout_sentences.txt").read_text(encoding="utf-8").splitlines()[:sentences]
        self.exact = self.embed(self.graph)

    def embed(self, model: ir.Model) -> np.ndarray:
        """Embeddings through ONNX Runtime."""
        session = ort.session(model)
        return embeddings(lambda feed: ort.run(session, feed), self.tokenizer, self.sentences, self.specs)

    def cosine(self, solver: str, transforms: tuple[Step, ...]) -> dict[str, float]:
        """Mean and lowest cosine of the quantized graph, and bits per weight."""
        recipe = Recipe("case", weight="int4/g32", activation="int4/token", solver=solver, transforms=transforms)
        report = Report("", "", "")
        model = apply_transforms(self.graph.clone(), TransformContext(recipe, self.feeds, report))
        names = list(dict.fromkeys(s.x.name or "" for s in linear_sites(model)))
        statistics = collect(model, self.feeds, names, hessian=sorted(sites_with_hessian(model, recipe)))
        cosine = (self.exact * self.embed(quantize_model(model, recipe, statistics, report))).sum(1)
        return {"mean": float(cosine.mean()), "lowest": float(cosine.min()), "bits": report.bits_per_weight}


def program() -> dict[str, float]:
    """The same of the compiled recipe."""
    with tempfile.TemporaryDirectory() as folder:
        model = qcompile.compile(
            minilm_directory(),
            recipe="w4a4",
            calibration=bundled("calibration_sentences.txt"),
            output=Path(folder) / "w4a4",
            progress=False,
        )
        captured = capture(minilm_directory(), check=False)
        graph = recognise(captured.model)[0]
        found = cosine_to_float(model, graph, captured.tokenizer, bundled("heldout_sentences.txt"))
        return {**found, "bits": model.report.bits_per_weight, "MB": model.size / 1e6}


@click.command()
@click.option("--row", "names", multiple=True, type=click.Choice(sorted(CASES)), default=tuple(CASES))
@click.option("--samples", default=96)
@click.option("--sentences", default=80)
@click.option("--program", "compiled", is_flag=True, help="Also the compiled recipe w4a4.")
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], samples: int, sentences: int, compiled: bool, as_json: bool) -> None:
    rows: dict[str, dict[str, float]] = {}
    study = Study(samples, sentences)
    for name in names:
        rows[name] = study.cosine(*CASES[name])
        print(f"{name}: {rows[name]['mean']:.4f}, lowest {rows[name]['lowest']:.4f}", file=sys.stderr, flush=True)
    if compiled:
        rows["program of w4a4"] = program()
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("transforms", "mean cosine", "lowest", "bits per weight", box=None)
    for name, row in rows.items():
        table.add_row(name, f"{row['mean']:.4f}", f"{row['lowest']:.4f}", f"{row['bits']:.2f}")
    Console().print(table)
    if compiled:
        print(f"{rows['program of w4a4']['sentences']:.0f} sentences, {rows['program of w4a4']['MB']:.1f} MB")


if __name__ == "__main__":
    main()
