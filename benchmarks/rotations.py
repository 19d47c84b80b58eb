"""Perplexity of a decoder under transformations folded by the space analysis, measured through the rewritten graph.

    python benchmarks/rotations.py MODEL_DIRECTORY [--windows 48] [--only "W4A4"]

Weights are rounded to nearest unless a row says otherwise, activations dynamically per token, keys and values, embedding
and output head stay float. The protocol is that of ``benchmarks/perplexity.py``: windows of 512 tokens spread evenly
over the concatenated documents of ``eval.txt``, each preceded by ``<s>``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from perplexity import perplexity, windows

from qcompile import ort
from qcompile.calibration import collect, input_specs, load_feeds
from qcompile.capture import capture
from qcompile.passes.asks import Ask, Data, Rotate, RotateOnline, Smooth, apply_asks
from qcompile.passes.recognise import recognise
from qcompile.passes.sites import linear_sites
from qcompile.passes.spaces import analyse
from qcompile.quantization import quantize_model, sites_with_hessian
from qcompile.recipes import Override, Recipe
from qcompile.report import Report

METHODS: dict[str, list[Ask]] = {
    "plain": [],
    "smooth": [Smooth()],
    "hadamard": [Rotate(), RotateOnline()],
}
FORMATS = {
    "float": ("none", "none"),
    "W8A8": ("int8", "int8/token"),
    "W4g128A16": ("int4/g128/asym", "none"),
    "W3g128A16": ("int3/g128/asym", "none"),
    "W4A8": ("int4", "int8/token"),
    "W4g128A8": ("int4/g128/asym", "int8/token"),
    "W4A4": ("int4", "int4/token"),
    "W4g128A4": ("int4/g128/asym", "int4/token"),
}


def recipe(weight: str, activation: str, solver: str) -> Recipe:
    """Everything but the head."""
    return Recipe(
        "benchmark",
        weight=weight,
        activation=activation,
        solver=solver,
        embedding_bits=0,
        overrides=(Override("*lm_head*", weight="none", activation="none"),),
    )


class Study:
    """One model, its calibration samples and evaluation windows."""

    def __init__(self, directory: Path, count: int, samples: int) -> None:
        captured = capture(directory, check=False)
        self.model, _ = recognise(captured.model)
        self.ids = windows(directory, count, 512)
        feeds = load_feeds(
            directory / "calibration.txt", input_specs(self.model), tokenizer=captured.tokenizer, max_tokens=512
        )
        chosen = np.linspace(0, len(feeds) - 1, min(samples, len(feeds))).astype(int)
        self.feeds = [feeds[i] for i in chosen]
        self.data = Data(self.measure, self.feeds)
        self.head = next(iter(v.producer().inputs[1].name for v in self.model.graph.outputs if v.producer()), "")
        self._transformed: dict[str, ir.Model] = {}

    def measure(self, model: ir.Model, names: Sequence[str], moments: bool):
        """Statistics for asks."""
        return collect(model, self.feeds, list(names), hessian=list(names) if moments else [])

    def transformed(self, method: str) -> ir.Model:
        """The float model after a method's asks."""
        if method not in self._transformed:
            quantized = {s.weight.name for s in linear_sites(self.model)} - {self.head}
            asks = METHODS[method]
            if asks:
                model, report = apply_asks(self.model, analyse(self.model), asks, self.data, quantized)
                for entry in report.entries:
                    if entry.space < 0:
                        print(f"  {entry.ask}: {entry.text}", file=sys.stderr)
            else:
                model = self.model
            self._transformed[method] = model
        return self._transformed[method]

    def evaluate(self, method: str, weight: str, activation: str, solver: str) -> float:
        """Perplexity of one cell."""
        chosen = recipe(weight, activation, solver)
        model = self.transformed(method).clone()
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.LazyTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        if weight != "none":
            wanted = sorted(sites_with_hessian(model, chosen))
            names = list(dict.fromkeys(s.x.name for s in linear_sites(model)))
            statistics = collect(model, self.feeds, names, hessian=wanted) if wanted else {}
            model = quantize_model(model, chosen, statistics, Report("", "", ""))
        session = ort.session(model)
        return perplexity(lambda feed: next(iter(ort.run(session, feed).values())), self.ids)


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", "count", default=48)
@click.option("--samples", default=64, help="Calibration windows.")
@click.option("--method", "methods", multiple=True, type=click.Choice(sorted(METHODS)))
@click.option("--format", "formats", multiple=True, type=click.Choice(sorted(FORMATS)))
@click.option("--solver", default="rtn")
@click.option("--json", "as_json", is_flag=True)
def main(directory, count, samples, methods, formats, solver, as_json) -> None:
    study = Study(directory, count, samples)
    methods, formats = methods or tuple(METHODS), formats or tuple(FORMATS)
    rows: dict[str, dict[str, float]] = {}
    for name in formats:
        for method in methods:
            start = time.time()
            rows.setdefault(name, {})[method] = study.evaluate(method, *FORMATS[name], solver)
            print(
                f"{name} {method} {rows[name][method]:.4f} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True
            )
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("weights, activations", *methods, box=None)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[m]:.3f}" for m in methods))
    Console().print(table)


if __name__ == "__main__":
    main()
