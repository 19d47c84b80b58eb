"""Where the compiled program and model.onnx part at few bits: rounding flips, layer by layer.

    python benchmarks/agreement.py MODEL_DIRECTORY [--recipe quarot] [--solver rtn] [--samples 2] [--length 128]

Compiles a decoder and evaluates its quantized graph three times: by the program, by ONNX Runtime, and in float64 (the
interpreter). They compute the same integers from the same integers; their floats differ in the last bits. Printed are the
distances of the three from each other and from the float model, and, for every block between residual additions, how
many activation codes of ONNX Runtime and of float64 differ: after all blocks before it, and from identical inputs.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from perplexity import feeds, windows

import qcompile
from qcompile import ort
from qcompile.capture import capture
from qcompile.passes.blocks import borders
from qcompile.passes.execute import run
from qcompile.passes.recognise import recognise
from qcompile.recipes import get_recipe

Feed = dict[str, np.ndarray]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative error of ``a`` to ``b``, Frobenius norm."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def in_memory(model: ir.Model) -> ir.Model:
    """A loaded model that no longer needs its file of weights."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            array = np.array(value.const_value.numpy())
            value.const_value = ir.tensor(array, dtype=value.const_value.dtype, name=value.name)
    return model


def results(directory: Path, folder: Path, quantized: ir.Model, samples: list[Feed]) -> dict[str, list[np.ndarray]]:
    """Logits of the float model, of the program, of ONNX Runtime and in float64."""
    exact = ort.session(recognise(capture(directory, check=False).model)[0])
    onnx, program = ort.session(folder / "model.onnx"), qcompile.load(folder)
    found: dict[str, list[np.ndarray]] = {}
    for feed in samples:
        found.setdefault("float model", []).append(next(iter(ort.run(exact, feed).values())))
        found.setdefault("program", []).append(next(iter(program.run(feed).values())))
        found.setdefault("model.onnx", []).append(next(iter(ort.run(onnx, feed).values())))
        found.setdefault("float64", []).append(next(iter(run(quantized, feed).values())).numpy())
    return found


def flips(quantized: ir.Model, feed: Feed) -> list[dict[str, float]]:
    """Per block: share of codes that differ behind differing inputs and behind equal ones, and what that does."""
    quantizers = [n for n in quantized.graph if n.op_type == "QuantizePerToken"]
    cuts = [v.name or "" for v in borders(quantized, [n.name or "" for n in quantizers])]
    place = {v.name or "": i for i, n in enumerate(quantized.graph) for v in n.outputs}
    codes = {n.outputs[0].name or "": place[n.outputs[0].name or ""] for n in quantizers}
    session = ort.session(quantized, outputs=[*codes, *cuts])
    fetched = dict(zip([*codes, *cuts], session.run([*codes, *cuts], feed)))
    ahead = {k: v.numpy() for k, v in run(quantized, feed, [*codes, *cuts]).items()}
    rows, source = [], ""
    for target in cuts:
        inside = [c for c, at in codes.items() if at < place[target] and (not source or at > place[source])]
        if inside:
            start = {**feed, source: fetched[source]} if source else feed
            alone = {k: v.numpy() for k, v in run(quantized, start, [*inside, target]).items()}
            share = lambda got: float(np.mean([np.mean(got[c] != fetched[c]) for c in inside]))  # noqa: B023, E731
            rows.append(
                {
                    "input": distance(ahead[source], fetched[source]) if source else 0.0,
                    "flips": share(ahead),
                    "flips alone": share(alone),
                    "output": distance(ahead[target], fetched[target]),
                    "output alone": distance(alone[target], fetched[target]),
                }
            )
        source = target
    return rows


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--recipe", "name", default="quarot")
@click.option("--solver", default="rtn")
@click.option("--samples", "count", default=2)
@click.option("--length", default=128)
def main(directory: Path, name: str, solver: str, count: int, length: int) -> None:
    chosen = dataclasses.replace(get_recipe(name), solver=solver, hessian="float")
    samples = feeds(windows(directory, count, length))
    with tempfile.TemporaryDirectory() as temporary:
        folder, stages = Path(temporary) / "out", Path(temporary) / "stages"
        calibration = feeds(windows(directory, 8, 512, "calibration.txt"))
        qcompile.compile(directory, recipe=chosen, calibration=calibration, output=folder, keep_stages=stages)
        quantized = in_memory(ir.load(next(stages.glob("*quantized.onnx"))))
        found = results(directory, folder, quantized, samples)
        rows = [flips(quantized, feed) for feed in samples]
    names = list(found)
    table = Table("relative distance", *names[1:], box=None)
    for first in names:
        table.add_row(
            first, *(f"{np.mean([distance(a, b) for a, b in zip(found[c], found[first])]):.2%}" for c in names[1:])
        )
    Console().print(table)
    table = Table("block", *rows[0][0], box=None)
    for number, block in enumerate(zip(*rows)):
        table.add_row(str(number), *(f"{np.mean([row[key] for row in block]):.2e}" for key in block[0]))
    Console().print(table)


if __name__ == "__main__":
    main()
