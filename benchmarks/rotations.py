"""Perplexity of a decoder under the recipes that transform it, at four-bit weights, measured through the rewritten graph.

    python benchmarks/rotations.py MODEL_DIRECTORY [--recipe spinquant] [--format W4A4] [--solver gptq] [--device cuda]

Weights int4 in groups of 128 with zero points, activations dynamic per token, keys and values, embedding and output head
float. The protocol is that of ``benchmarks/perplexity.py``; calibration uses 64 windows of 512 tokens, learning all of
them. ``--device cuda`` trains and evaluates on a GPU; ``--model`` takes a captured and recognised ONNX file of the same
model instead of capturing it again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from perplexity import feeds, perplexity, windows

from qcompile import ort
from qcompile.calibration import collect
from qcompile.capture import capture
from qcompile.passes.learn import Learned
from qcompile.passes.recognise import recognise
from qcompile.progress import Progress
from qcompile.quantization import quantize_model, sites_with_hessian
from qcompile.recipes import Override, Recipe, Step, get_recipe
from qcompile.report import Report
from qcompile.transforms import TransformContext, apply_transforms, resolve

HEAD = (Override("*lm_head*", weight="none", activation="none"),)
FORMATS = {"W4A4": "int4/token", "W4A8": "int8/token", "W4A16": "none"}
SOLVERS = {"rtn": ("rtn", "float"), "gptq": ("gptq", "corrected")}
TRAINING = {
    # Rates and lengths for this model; the defaults are for larger ones.
    "spinquant": {"rotation_rate": 0.004, "batch": 8, "samples": 196},
    "ostquant": {"rotation_rate": 0.004, "rate": 0.02, "batch": 8, "samples": 196},
    "flatquant": {"rotation_rate": 0.015, "rate": 0.02, "batch": 8, "samples": 196, "blockwise": False},
}


def recipe(name: str, activation: str, options: dict) -> Recipe:
    """The transforms of a recipe with the benchmark's formats; everything but the head is quantized."""
    steps = () if name == "plain" else get_recipe(name).transforms
    changed = []
    for step in steps:
        if isinstance(resolve(step), Learned):
            step = Step(step.name, {**step.options, **TRAINING.get(step.name, {}), **options})
        changed.append(step)
    return Recipe(
        name,
        weight="int4/g128/asym",
        activation=activation,
        embedding_bits=0,
        transforms=tuple(changed),
        overrides=HEAD,
    )


class Study:
    """One model, its calibration samples and evaluation windows."""

    def __init__(self, directory: Path, model: Path | None, count: int, samples: int, device: str) -> None:
        captured = ir.load(model) if model is not None else recognise(capture(directory, check=False).model)[0]
        self.model = in_memory(captured)
        self.ids = windows(directory, count, 512)
        self.learning = feeds(windows(directory, 10**6, 512, "calibration.txt"))
        self.feeds = feeds(windows(directory, samples, 512, "calibration.txt"))
        self.device = device

    def transformed(self, chosen: Recipe) -> ir.Model:
        """The float model after the recipe's transforms."""
        report = Report("", "", chosen.name)
        with Progress() as bars:
            context = TransformContext(chosen, self.learning, report, stage=bars.stage)
            model = apply_transforms(self.model, context)
        for line in report.transforms:
            print(f"  {line}", file=sys.stderr)
        return in_memory(model)

    def quantized(self, model: ir.Model, chosen: Recipe, solver: str) -> ir.Model:
        """The model with weights solved for."""
        name, hessian = SOLVERS[solver]
        chosen = dataclasses.replace(chosen, solver=name, hessian=hessian, transforms=())
        model = model.clone()
        wanted = sorted(sites_with_hessian(model, chosen))
        statistics = collect(model, self.feeds, wanted, hessian=wanted) if wanted else {}
        return quantize_model(model, chosen, statistics, Report("", "", ""), feeds=self.feeds)

    def perplexity(self, model: ir.Model) -> float:
        """Of the evaluation windows, in ONNX Runtime, or in the interpreter on a GPU."""
        if self.device == "cpu":
            session = ort.session(model)
            return perplexity(lambda feed: next(iter(ort.run(session, feed).values())), self.ids)
        import torch

        from qcompile.passes.execute import run

        known = {
            name: torch.as_tensor(value.const_value.numpy().astype(np.float32), device=self.device)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point()
        }

        def evaluate(feed: dict) -> np.ndarray:
            with torch.no_grad():
                found = run(model, feed, dtype="float32", constants=known, device=self.device)
            return next(iter(found.values())).cpu().numpy()

        return perplexity(evaluate, self.ids)


def in_memory(model: ir.Model) -> ir.Model:
    """Every constant computed and loaded once."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return model


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Captured and recognised ONNX file.")
@click.option("--recipe", "recipes", multiple=True, default=("plain", "smoothquant", "quarot", *TRAINING))
@click.option("--format", "formats", multiple=True, type=click.Choice(sorted(FORMATS)), default=("W4A4", "W4A8"))
@click.option("--solver", "solvers", multiple=True, type=click.Choice(sorted(SOLVERS)), default=("rtn", "gptq"))
@click.option("--windows", "count", default=48)
@click.option("--samples", default=64, help="Calibration windows of the solver.")
@click.option("--steps", default=100, help="Steps of learned recipes.")
@click.option("--seconds", type=float, help="Time budget of each training.")
@click.option("--device", default="cpu")
@click.option("--json", "as_json", is_flag=True)
def main(
    directory, model, recipes, formats, solvers, count, samples, steps, seconds, device, as_json
) -> None:  # fmt: skip
    study = Study(directory, model, count, samples, device)
    options = {"steps": steps, "seconds": seconds, "device": device}
    rows: dict[str, dict[str, float]] = {"float": {"float": study.perplexity(study.model)}}
    for name in recipes:
        for kind in formats:
            chosen = recipe(name, FORMATS[kind], options)
            changed = study.transformed(chosen)
            for solver in solvers:
                start = time.time()
                value = study.perplexity(study.quantized(changed, chosen, solver))
                rows.setdefault(name, {})[f"{kind} {solver}"] = value
                print(f"{name} {kind} {solver} {value:.4f} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)
    if as_json:
        click.echo(json.dumps(rows))
        return
    columns = [f"{kind} {solver}" for kind in formats for solver in solvers]
    table = Table("recipe", *columns, box=None, title=f"float {rows['float']['float']:.3f}")
    for name, row in rows.items():
        if name != "float":
            table.add_row(name, *(f"{row[c]:.3f}" for c in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
