"""Outliers planted into a decoder without changing its function, and whether transforms undo them.

    python benchmarks/planted_outliers.py MODEL_DIRECTORY [--share 0.01] [--device cuda] [--format W4A8]
        [--transforms smooth] [--output rows.json]

One percent of the channels of the residual stream, the same everywhere, are multiplied by 50 to 200 in what every norm
hands to its linear layers: the engine folds the factors into gammas and into the weights that read them. Then the model
is quantized with and without transforms, beside the model that was left alone. Weights are rounded to nearest, tables
and head stay float; the protocol is that of ``benchmarks/perplexity.py``. ``--output`` keeps what is measured after every
figure, and what it holds is not measured again.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from rotations import Study, fill, in_memory, kept, rounded

from qcompile.analysis import difference
from qcompile.passes.asks import Ask, Context, apply_asks
from qcompile.passes.spaces import Element, Space, analyse
from qcompile.passes.spaces.request import scale
from qcompile.recipes import Step

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


Rows = dict[str, dict[str, float]]
"""Perplexities by transforms, and by format and state of the model."""
STATES = ("left alone", "planted")


def show(rows: Rows) -> None:
    """The table, and by how much planted outliers remain in the perplexity."""
    columns = [f"{kind} {state}" for kind in FORMATS for state in STATES]
    table = Table("transforms", *columns, box=None)
    for name in (n for n in TRANSFORMS if n in rows):
        table.add_row(name, *(f"{rows[name][c]:.3f}" if c in rows[name] else "" for c in columns))
    Console(width=120).print(table)
    for name, row in rows.items():
        for kind in FORMATS:
            clean, planted = (row.get(f"{kind} {state}") for state in STATES)
            if clean and planted:
                print(f"{kind} {name}: planted {planted / clean - 1:+.2%}")


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--share", default=0.01, help="Of the channels.")
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), default=tuple(FORMATS))
@click.option("--transforms", "names", multiple=True, type=click.Choice(list(TRANSFORMS)), default=tuple(TRANSFORMS))
@click.option("--windows", "count", default=48)
@click.option("--samples", default=32, help="Calibration windows.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Captured and recognised ONNX file.")
@click.option("--device", default="cpu")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to keep figures in, and to take them from.")
def main(directory, share, formats, names, count, samples, model, device, output) -> None:
    rows: Rows = kept(output)
    study = Study(directory, model, count, samples, device)
    study.learning = study.feeds
    clean = study.model
    folded, report = apply_asks(clean, analyse(clean), [Plant(share)])
    planted = in_memory(folded)
    moved = difference(clean, planted, study.feeds[0])
    print(f"{len(report.applied)} norms, {report.applied[0].text}; outputs moved by {moved:.1e}", file=sys.stderr)
    for kind, name in itertools.product(formats, names):
        chosen = rounded(name, FORMATS[kind], TRANSFORMS[name])
        for state, study.model in zip(STATES, (clean, planted)):
            fill(study, rows, name, f"{kind} {state}", chosen, output)
    show(rows)


if __name__ == "__main__":
    main()
