"""Outliers planted into a decoder without changing its function, and whether transforms undo them.

    python benchmarks/planted_outliers.py MODEL_DIRECTORY [--share 0.01] [--device cuda] [--json]

One percent of the channels of the residual stream, the same everywhere, are multiplied by 50 to 200 in what every norm
hands to its linear layers: the engine folds the factors into gammas and into the weights that read them. Then the model
is quantized with and without transforms, beside the model that was left alone. Weights are rounded to nearest, tables
and head stay float; the protocol is that of ``benchmarks/perplexity.py``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from rotations import HEAD, Study, in_memory

from qcompile.analysis import difference
from qcompile.passes.asks import Ask, Context, apply_asks
from qcompile.passes.spaces import Element, Space, analyse
from qcompile.passes.spaces.request import scale
from qcompile.recipes import Recipe, Step

FORMATS = {"W8A8": ("int8", "int8/token"), "W4A8": ("int4/g128/asym", "int8/token")}
TRANSFORMS = {
    "none": (),
    "smooth": (Step("smooth"),),
    "rotate": (Step("rotate"), Step("rotate-online")),
    "smooth, rotate": (Step("smooth"), Step("rotate"), Step("rotate-online")),
}


@dataclass(frozen=True)
class Plant(Ask):
    """Multiplies some channels behind every norm of the widest stream by large factors."""

    share: float = 0.01
    lowest: float = 50.0
    highest: float = 200.0
    seed: int = 0

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Scale the spaces that follow the stream, all in the same channels."""
        if space.leader is None or not space.scalable:
            return None
        rng = np.random.default_rng(self.seed)
        chosen = rng.choice(space.size, max(1, round(self.share * space.size)), replace=False)
        factor = np.ones(space.size)
        factor[chosen] = np.exp(rng.uniform(np.log(self.lowest), np.log(self.highest), len(chosen)))
        scale(context.spaces, element, space, factor)
        return f"{len(chosen)} outliers of up to {factor.max():.0f}"


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--share", default=0.01, help="Of the channels.")
@click.option("--windows", "count", default=48)
@click.option("--samples", default=32, help="Calibration windows.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Captured and recognised ONNX file.")
@click.option("--device", default="cpu")
@click.option("--json", "as_json", is_flag=True)
def main(
    directory: Path, share: float, count: int, samples: int, model: Path | None, device: str, as_json: bool
) -> None:
    study = Study(directory, model, count, samples, device)
    study.learning = study.feeds
    clean = study.model
    folded, report = apply_asks(clean, analyse(clean), [Plant(share)])
    planted = in_memory(folded)
    moved = difference(clean, planted, study.feeds[0])
    print(f"{len(report.applied)} norms, {report.applied[0].text}; outputs moved by {moved:.1e}", file=sys.stderr)
    rows: dict[str, dict[str, float]] = {}
    for kind, (weight, activation) in FORMATS.items():
        for name, steps in TRANSFORMS.items():
            chosen = Recipe(
                name, weight=weight, activation=activation, embedding_bits=0, transforms=steps, overrides=HEAD
            )
            for state, study.model in (("left alone", clean), ("planted", planted)):
                value = study.perplexity(study.quantized(study.transformed(chosen), chosen))
                rows.setdefault(name, {})[f"{kind} {state}"] = value
                print(f"{kind} {name}, {state}: {value:.4f}", file=sys.stderr, flush=True)
    if as_json:
        click.echo(json.dumps(rows))
        return
    columns = [f"{kind} {state}" for kind in FORMATS for state in ("left alone", "planted")]
    table = Table("transforms", *columns, box=None)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.3f}" for c in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
