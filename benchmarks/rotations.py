"""Perplexity of a decoder under the recipes that transform it, at four-bit weights, measured through the rewritten graph.

    python benchmarks/rotations.py MODEL_DIRECTORY [--recipe spinquant] [--format W4A4] [--solver gptq] [--seeds 3]
        [--device cuda] [--beside 6] [--output table.json] [--peers PYTHON]

Weights int4 in groups of 128 with zero points, activations dynamic per token, keys and values, embedding and output head
float. The protocol is that of ``benchmarks/perplexity.py``. The windows of the calibration text are divided: 32, evenly
spread, are held out; learning takes all others and the solver 64 of them. Where a recipe has several settings, those whose
mean perplexity on the held-out windows is lowest are marked in the table; the evaluation text has no part in the choice.

``--seeds`` repeats what depends on a seed (signs, starts, order of samples). ``--device cuda`` trains, calibrates and
evaluates on a GPU; ``--beside`` runs so many recipes beside each other; ``--output`` keeps what is measured after every
figure, and what it holds is not measured again; ``--model`` takes a captured and recognised ONNX file of the same model
instead of capturing it again. ``--peers`` names a Python that has llm-compressor and brevitas: they quantize the same
model in the same run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
LEARNED: dict[str, Any] = {"batch": 8, "samples": 196}
TRAINING: dict[str, dict[str, Any]] = {
    # Settings by recipe. Rates are for this model; the defaults are for larger ones.
    "spinquant": {"rotation_rate": 0.004},
    "ostquant, kl": {"rotation_rate": 0.004, "rate": 0.005, "loss": "kl"},
    "ostquant, kl-top": {"rotation_rate": 0.004, "rate": 0.005, "loss": "kl-top"},
    "flatquant, fast": {"rotation_rate": 0.015, "rate": 0.02, "blockwise": False},
    "flatquant, slow": {"rotation_rate": 0.006, "rate": 0.01, "blockwise": False},
}
NO_SEED = ("plain", "smoothquant")
HELD, BATCH = 32, 16
"""Windows of the calibration text that are held out; windows that the solver's moments are taken from at once."""
PEERS = ("llm-compressor", "brevitas")
PEER_BITS = {"W4A4": 4, "W4A8": 8}
Cell = dict[str, list[float]]
"""Perplexities by seed: of the evaluation windows and of those held out (peers: the former alone)."""
Figures = dict[str, dict[str, Cell]]
"""Cells by recipe and by format and solver."""


def recipe(name: str, activation: str, solver: str, options: dict, seed: int = 0) -> Recipe:
    """The transforms of a recipe with the benchmark's formats; everything but the head is quantized."""
    steps = () if name == "plain" else get_recipe(name.partition(",")[0]).transforms
    changed = []
    for step in steps:
        ask = resolve(step)
        more = {"seed": seed} if hasattr(ask, "seed") else {}
        if isinstance(ask, Learned):
            more |= LEARNED | TRAINING.get(name, {}) | options
        changed.append(Step(step.name, {**step.options, **more}))
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


def rounded(name: str, formats: tuple[str, str], steps: tuple[Step, ...]) -> Recipe:
    """A recipe that rounds to nearest; ``formats`` of weights and activations, head and embedding stay float."""
    weight, activation = formats
    return Recipe(name, weight=weight, activation=activation, embedding_bits=0, transforms=steps, overrides=HEAD)


class Study:
    """One model, its calibration samples and evaluation windows."""

    def __init__(self, directory: Path, model: Path | None, count: int, samples: int, device: str) -> None:
        captured = ir.load(model) if model is not None else recognise(capture(directory, check=False).model)[0]
        self.model = in_memory(captured)
        self.ids = windows(directory, count, 512)
        texts = windows(directory, 10**6, 512, "calibration.txt")
        held = np.isin(np.arange(len(texts)), np.linspace(0, len(texts) - 1, HELD + 2).astype(int)[1:-1])
        self.held, self.learning = texts[held], feeds(texts[~held])
        chosen = np.linspace(0, len(self.learning) - 1, min(samples, len(self.learning))).astype(int)
        self.feeds = [self.learning[i] for i in chosen]
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
        joined = [
            {name: np.concatenate([f[name] for f in self.feeds[i : i + BATCH]]) for name in self.feeds[i]}
            for i in range(0, len(self.feeds), BATCH)
        ]
        known = collect(model, joined, wanted, hessian=wanted) if wanted else {}
        return quantize_model(model, chosen, known, Report("", "", ""), feeds=joined, device=self.device)

    def perplexity(self, model: ir.Model, ids: np.ndarray | None = None) -> float:
        """Of the evaluation windows or of others, in ONNX Runtime, or in the interpreter on a GPU."""
        rows = self.ids if ids is None else ids
        if self.device == "cpu":
            session = ort.session(model)
            return perplexity(lambda feed: next(iter(ort.run(session, feed).values())), rows)
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

        return perplexity(evaluate, rows)

    def both(self, model: ir.Model) -> list[float]:
        """Perplexity of the evaluation windows and of those held out."""
        return [self.perplexity(model), self.perplexity(model, self.held)]


def in_memory(model: ir.Model) -> ir.Model:
    """Every constant computed and loaded once."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return model


@dataclasses.dataclass(frozen=True)
class Job:
    """Figures measured by one process: those of one recipe, format and seed, for solvers that share its transforms."""

    name: str
    kind: str
    solvers: tuple[str, ...]
    seed: int

    def missing(self, rows: Figures) -> list[str]:
        """Solvers whose figure ``rows`` does not have yet."""
        known = rows.get(self.name, {})
        return [s for s in self.solvers if str(self.seed) not in known.get(f"{self.kind} {s}", {})]


def jobs(names: tuple[str, ...], kinds: tuple[str, ...], solvers: tuple[str, ...], seeds: int) -> list[Job]:
    """All there is to do, seed by seed, trainings first."""
    found = []
    for seed in range(seeds):
        for name in sorted(names, key=lambda n: n not in TRAINING):
            if seed and name in NO_SEED:
                continue
            for kind in kinds:
                # At four-bit activations what is learned depends on whether the solver compensates errors of weights.
                apart = name in TRAINING and kind == "W4A4"
                parts = [(solver,) for solver in solvers] if apart else [solvers]
                found += [Job(name, kind, part, seed) for part in parts]
    return found


def kept(output: Path | None) -> dict[str, Any]:
    """The figures an earlier run left in ``output``."""
    return json.loads(output.read_text()) if output is not None and output.exists() else {}


def keep(output: Path | None, rows: dict[str, Any]) -> None:
    """Leave figures in ``output``; a kill leaves those of before, whole."""
    if output is not None:
        new = output.with_name(f"{output.name}.new")
        new.write_text(json.dumps(rows, indent=1))
        new.replace(output)


def fill(
    study: Study, rows: dict[str, dict[str, float]], row: str, column: str, chosen: Recipe, output: Path | None
) -> None:
    """The perplexity after ``chosen``, printed and kept, unless ``rows`` has it already."""
    if column not in rows.setdefault(row, {}):
        rows[row][column] = study.perplexity(study.quantized(study.transformed(chosen), chosen))
        print(f"{row}, {column}: {rows[row][column]:.4f}", file=sys.stderr, flush=True)
        keep(output, rows)


def measure(study: Study, rows: Figures, job: Job, options: dict, output: Path | None) -> None:
    """The figures of one job that ``rows`` does not have yet."""
    changed = None
    for solver in job.missing(rows):
        start = time.time()
        chosen = recipe(job.name, FORMATS[job.kind], solver, options, job.seed)
        if changed is None:
            changed = study.transformed(chosen)
        found = study.both(study.quantized(changed, chosen))
        rows.setdefault(job.name, {}).setdefault(f"{job.kind} {solver}", {})[str(job.seed)] = found
        keep(output, rows)
        text = f"{job.name} {job.kind} {solver} seed {job.seed}: {found[0]:.4f}, held out {found[1]:.4f}"
        print(f"{text} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)


def spread(command: list[str], todo: list[Job], beside: int, rows: Figures, output: Path) -> None:
    """The same in processes beside each other, one for each job."""

    def one(number: int) -> None:
        job = todo[number]
        if not (missing := job.missing(rows)):
            return
        part = output.with_name(f"{output.stem}.{number}.json")
        part.write_text(json.dumps({"float": rows["float"]}))
        chosen = [f"--recipe={job.name}", f"--format={job.kind}", f"--only-seed={job.seed}", f"--output={part}"]
        subprocess.run([*command, *chosen, *(f"--solver={s}" for s in missing)], check=False)
        for key, row in json.loads(part.read_text()).items():
            for column, cell in row.items():
                rows.setdefault(key, {}).setdefault(column, {}).update(cell)
        part.unlink()
        keep(output, rows)

    with ThreadPoolExecutor(beside) as pool:
        list(pool.map(one, range(len(todo))))


def peers(python: str, directory: Path, study: Study, columns: list[str], rows: Figures, output: Path | None) -> None:
    """What the peers make of the model, rotated as far as they can."""
    script = Path(__file__).parent / "peers" / "llm_rotations.py"
    with tempfile.TemporaryDirectory() as folder:
        ids = np.concatenate([f["input_ids"] for f in study.feeds])
        np.savez(Path(folder) / "ids.npz", evaluation=study.ids, calibration=ids)
        for peer, column in itertools.product(PEERS, columns):
            if column in rows.get(peer, {}):
                continue
            kind, solver = column.split()
            if kind not in PEER_BITS:
                continue
            options = {"bits": PEER_BITS[kind], "rotate": True, "gptq": solver == "gptq"}
            command = [python, str(script), peer, str(directory), f"{folder}/ids.npz", json.dumps(options)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"{peer} {column}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            value = json.loads(done.stdout.splitlines()[-1])["perplexity"]
            print(f"{peer} {column} {value:.4f}", file=sys.stderr, flush=True)
            rows.setdefault(peer, {})[column] = {"0": [value]}
            keep(output, rows)


def show(rows: Figures, names: list[str], columns: list[str]) -> None:
    """The table of means over seeds, and what the peers lose beside the best chosen settings."""
    exact = rows["float"]["float"]["0"][0]

    def mean(name: str, column: str, which: int = 0) -> float:
        return statistics.fmean(v[which] for v in rows[name][column].values())

    table = Table("recipe", *columns, box=None, title=f"float {exact:.3f}")
    best: dict[str, float] = {}
    for name in names:
        cells = []
        for column in columns:
            cell = [v[0] for v in rows.get(name, {}).get(column, {}).values()]
            if not cell:
                cells.append("")
                continue
            ours = [n for n in names if n not in PEERS and rows.get(n, {}).get(column)]
            family = [n for n in ours if n.partition(",")[0] == name.partition(",")[0]]
            mark = ""
            if len(family) > 1 and name == min(family, key=lambda n: mean(n, column, 1)):
                mark = " *"
            if ours:
                best[column] = mean(min(ours, key=lambda n: mean(n, column, 1)), column)
            around = f" ({min(cell):.3f}..{max(cell):.3f})" if len(cell) > 1 else ""
            cells.append(f"{statistics.fmean(cell):.3f}{around}{mark}")
        table.add_row(name, *cells)
    Console(width=200).print(table)
    print("Mean (smallest..largest of the seeds); * best on the held-out windows, of several settings.")
    for peer, column in itertools.product(PEERS, columns):
        if column in best and column in rows.get(peer, {}):
            ratio = (mean(peer, column) - exact) / (best[column] - exact)
            print(f"{column}: the increase of {peer} is {ratio:.2f} times that of ours best on the held-out windows")


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
@click.option("--seeds", default=1, help="How many seeds to measure with.")
@click.option("--only-seed", type=int, help="Measure with this one alone.")
@click.option("--device", default="cpu")
@click.option("--beside", default=1, help="Recipes measured beside each other.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to keep figures in, and to take them from.")
@click.option("--peers", "python", help="A Python that has llm-compressor and brevitas.")
def main(
    directory, model, recipes, formats, solvers, count, samples, steps, seconds, seeds, only_seed, device, beside,
    output, python,
) -> None:  # fmt: skip
    rows: Figures = kept(output)
    study = Study(directory, model, count, samples, device)
    if "float" not in rows:
        rows["float"] = {"float": {"0": study.both(study.model)}}
        keep(output, rows)
    todo = jobs(recipes, formats, solvers, seeds if only_seed is None else only_seed + 1)
    todo = [job for job in todo if only_seed in (None, job.seed)]
    if beside > 1:
        if output is None:
            raise click.UsageError("--beside needs --output")
        settings = {
            "--windows": count,
            "--samples": samples,
            "--steps": steps,
            "--seconds": seconds,
            "--device": device,
            "--model": model,
        }
        command = [sys.executable, __file__, str(directory)]
        command += [f"{option}={value}" for option, value in settings.items() if value is not None]
        spread(command, todo, beside, rows, output)
    else:
        for job in todo:
            measure(study, rows, job, {"steps": steps, "seconds": seconds, "device": device}, output)
    columns = [f"{kind} {solver}" for kind in formats for solver in solvers]
    if python is not None:
        peers(python, directory, study, columns, rows, output)
    show(rows, [*recipes, *(p for p in PEERS if p in rows)], columns)


if __name__ == "__main__":
    main()
