"""Weights rounded to nearest, without and with random Hadamard rotations, at six pairs of formats.

    python benchmarks/rounding.py MODEL_DIRECTORY [--device cuda] [--output rows.json]

The simplest baselines of ``benchmarks/rotations.py``, on its protocol: no calibration, no clipping, weights symmetric,
activations dynamic per token, head and embedding float. Rotations fold into the residual stream and the heads of values;
one at run time comes before the down projections.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from rotations import Study, fill, kept, rounded

from qcompile.recipes import Step

FORMATS = {
    "W8 per channel, A8": ("int8", "int8/token"),
    "W4 g128, A16": ("int4/g128", "none"),
    "W3 g128, A16": ("int3/g128", "none"),
    "W4 per channel, A8": ("int4", "int8/token"),
    "W4 g128, A8": ("int4/g128", "int8/token"),
    "W4 per channel, A4": ("int4", "int4/token"),
}
TRANSFORMS = {"plain": (), "random Hadamard": (Step("rotate"), Step("rotate-online"))}


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", "count", default=48)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Captured and recognised ONNX file.")
@click.option("--device", default="cpu")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to keep figures in, and to take them from.")
def main(directory, count, model, device, output) -> None:
    rows = kept(output)
    study = Study(directory, model, count, 1, device)
    for name, formats in FORMATS.items():
        for kind, steps in TRANSFORMS.items():
            fill(study, rows, name, kind, rounded(name, formats, steps), output)
    table = Table("rounded to nearest", *TRANSFORMS, box=None)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[kind]:.3f}" for kind in TRANSFORMS))
    Console().print(table)


if __name__ == "__main__":
    main()
