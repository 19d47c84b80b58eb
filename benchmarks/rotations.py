"""Perplexity of a decoder under the recipes that transform it, at four-bit weights, measured through the rewritten graph.

    python benchmarks/rotations.py MODEL_DIRECTORY [--recipe spinquant] [--format W4A4] [--solver gptq]
        [--device cuda] [--beside 6] [--output table.json] [--peers PYTHON]

Weights int4 in groups of 128 with zero points, activations dynamic per token, keys and values, embedding and output head
float. The protocol is that of ``benchmarks/perplexity.py``; calibration uses 64 windows of 512 tokens, learning all of
them. ``--device cuda`` trains, calibrates and evaluates on a GPU; ``--beside`` runs so many recipes beside each other;
``--output`` keeps what is measured after every figure, and what it holds is not measured again; ``--model`` takes a
captured and recognised ONNX file of the same model instead of capturing it again. ``--peers`` names a Python that has
llm-compressor and brevitas: they quantize the same model in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
    # Rates for this model; the defaults are for larger ones.
    "spinquant": {"rotation_rate": 0.004, "batch": 8, "samples": 196},
    "ostquant": {"rotation_rate": 0.004, "rate": 0.005, "batch": 8, "samples": 196, "loss": "kl"},
    "ostquant, kl-top": {"rotation_rate": 0.004, "rate": 0.005, "batch": 8, "samples": 196, "loss": "kl-top"},
    "flatquant": {"rotation_rate": 0.015, "rate": 0.02, "batch": 8, "samples": 196, "blockwise": False},
}
PEERS = ("llm-compressor", "brevitas")
Figures = dict[str, dict[str, float]]
"""Perplexities by recipe and by format and solver."""


def recipe(name: str, activation: str, solver: str, options: dict) -> Recipe:
    """The transforms of a recipe with the benchmark's formats; everything but the head is quantized."""
    steps = () if name == "plain" else get_recipe(name.partition(",")[0]).transforms
    changed = []
    for step in steps:
        if isinstance(resolve(step), Learned):
            step = Step(step.name, {**step.options, **TRAINING.get(name, {}), **options})
        changed.append(step)
    chosen, hessian = SOLVERS[solver]
    return Recipe(
        name,
        solver=chosen,
        hessian=hessian,
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

    def quantized(self, model: ir.Model, chosen: Recipe) -> ir.Model:
        """The model with weights solved for."""
        chosen = dataclasses.replace(chosen, transforms=())
        model = model.clone()
        wanted = sorted(sites_with_hessian(model, chosen))
        statistics = collect(model, self.feeds, wanted, hessian=wanted) if wanted else {}
        return quantize_model(model, chosen, statistics, Report("", "", ""), feeds=self.feeds, device=self.device)

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


def measure(study: Study, rows: Figures, name: str, kind: str, solvers: tuple[str, ...], options: dict, keep) -> None:
    """The figures of one recipe and format that ``rows`` does not have yet."""
    changed = None
    for solver in solvers:
        if f"{kind} {solver}" in rows.get(name, {}):
            continue
        start = time.time()
        chosen = recipe(name, FORMATS[kind], solver, options)
        if changed is None or name in TRAINING:  # what is learned depends on the solver
            changed = study.transformed(chosen)
        value = study.perplexity(study.quantized(changed, chosen))
        rows.setdefault(name, {})[f"{kind} {solver}"] = value
        keep(rows)
        print(f"{name} {kind} {solver} {value:.4f} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)


def spread(
    command: list[str], jobs: list[tuple[str, str, str]], beside: int, rows: Figures, output: Path, keep
) -> None:
    """The same in processes beside each other, one for each recipe, format and solver."""

    def one(job: tuple[str, str, str]) -> None:
        name, kind, solver = job
        if f"{kind} {solver}" in rows.get(name, {}):
            return
        part = output.with_name(f"{output.stem}.{name}.{kind}.{solver}.json")
        if not part.exists():
            part.write_text(json.dumps({"float": rows["float"]}))
        chosen = [f"--recipe={name}", f"--format={kind}", f"--solver={solver}", f"--output={part}"]
        subprocess.run([*command, *chosen], check=False)
        for key, row in json.loads(part.read_text()).items():
            rows.setdefault(key, {}).update(row)
        part.unlink()
        keep(rows)

    with ThreadPoolExecutor(beside) as pool:
        list(pool.map(one, jobs))


def peers(python: str, directory: Path, study: Study, formats: tuple[str, ...], rows: Figures, keep) -> None:
    """What the peers make of the model, rotated as far as they can."""
    script = Path(__file__).parent / "peers" / "llm_rotations.py"
    with tempfile.TemporaryDirectory() as folder:
        ids = np.concatenate([f["input_ids"] for f in study.feeds])
        np.savez(Path(folder) / "ids.npz", evaluation=study.ids, calibration=ids)
        for peer in PEERS:
            for kind in formats:
                if f"{kind} rtn" in rows.get(peer, {}):
                    continue
                options = {"bits": 4 if kind == "W4A4" else 8, "rotate": True, "gptq": False}
                command = [python, str(script), peer, str(directory), f"{folder}/ids.npz", json.dumps(options)]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    print(f"{peer} {kind}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                rows.setdefault(peer, {})[f"{kind} rtn"] = json.loads(done.stdout.splitlines()[-1])["perplexity"]
                keep(rows)


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Captured and recognised ONNX file.")
@click.option("--recipe", "recipes", multiple=True, default=("plain", "smoothquant", "quarot", *TRAINING))
@click.option("--format", "formats", multiple=True, type=click.Choice(sorted(FORMATS)), default=("W4A4", "W4A8"))
@click.option("--solver", "solvers", multiple=True, type=click.Choice(sorted(SOLVERS)), default=("rtn", "gptq"))
@click.option("--windows", "count", default=48)
@click.option("--samples", default=64, help="Calibration windows of the solver.")
@click.option("--steps", default=600, help="Steps of learned recipes.")
@click.option("--seconds", type=float, help="Time budget of each training.")
@click.option("--device", default="cpu")
@click.option("--beside", default=1, help="Recipes measured beside each other.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to keep figures in, and to take them from.")
@click.option("--peers", "python", help="A Python that has llm-compressor and brevitas.")
def main(
    directory, model, recipes, formats, solvers, count, samples, steps, seconds, device, beside, output, python
) -> None:  # fmt: skip
    rows: Figures = json.loads(output.read_text()) if output is not None and output.exists() else {}

    def keep(table: Figures) -> None:
        if output is not None:
            output.write_text(json.dumps(table, indent=1))

    study = Study(directory, model, count, samples, device)
    if "float" not in rows:
        rows["float"] = {"float": study.perplexity(study.model)}
        keep(rows)
    if beside > 1:
        if output is None:
            raise click.UsageError("--beside needs --output")
        jobs = [(name, kind, solver) for name in recipes for kind in formats for solver in solvers]
        settings = {
            "--windows": count,
            "--samples": samples,
            "--steps": steps,
            "--seconds": seconds,
            "--device": device,
        }
        settings |= {"--model": model}
        command = [sys.executable, __file__, str(directory)]
        command += [f"{option}={value}" for option, value in settings.items() if value is not None]
        spread(command, jobs, beside, rows, output, keep)
    else:
        options = {"steps": steps, "seconds": seconds, "device": device}
        for name in recipes:
            for kind in formats:
                measure(study, rows, name, kind, solvers, options, keep)
    if python is not None:
        peers(python, directory, study, formats, rows, keep)
    columns = [f"{kind} {solver}" for kind in formats for solver in solvers]
    table = Table("recipe", *columns, box=None, title=f"float {rows['float']['float']:.3f}")
    exact = rows["float"]["float"]
    for name in (*recipes, *(p for p in PEERS if p in rows)):
        cells = [rows.get(name, {}).get(c) for c in columns]
        table.add_row(name, *("" if value is None else f"{value:.3f} (+{value / exact - 1:.1%})" for value in cells))
    Console().print(table)
    for peer in (p for p in PEERS if p in rows):
        for column, value in rows[peer].items():
            ours = min((rows[r][column] for r in recipes if column in rows.get(r, {})), default=None)
            if ours is not None:
                ratio = (value - exact) / (ours - exact)
                print(f"{column}: the increase of {peer} is {ratio:.2f} times that of our best")


if __name__ == "__main__":
    main()
