"""``qcompile bench``."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("artifact")
@click.option(
    "--against", type=click.Choice(["onnxruntime"]), help="Measure ONNX Runtime on the float model beside it."
)
@click.option(
    "--model", "float_model", help="The float model for --against; by default what the artifact was compiled from."
)
@click.option(
    "--shape", "shapes", multiple=True, help="Extents such as batch=1,sequence=128; may be given several times."
)
@click.option("--threads", "threads", multiple=True, type=int, help="Number of threads; may be given several times.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Measuring time of each contender at each point.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def bench(
    artifact: str,
    against: str | None,
    float_model: str | None,
    shapes: tuple[str, ...],
    threads: tuple[int, ...],
    seconds: float,
    as_json: bool,
) -> None:
    """Measure the latency of ARTIFACT. Integer inputs are filled with 1, floats with normal noise."""
    from qcompile.bench import OrtPeers, Point, compare
    from qcompile.compiled import load

    model = load(artifact)
    dims = [d for spec in model.inputs for d in spec.shape if isinstance(d, str)]
    symbols = list(dict.fromkeys(part for d in dims for part in d.split(" + ") if not part.isdigit()))
    single = {"sequence"} if "past" in symbols else set()  # a decoder with a cache is asked for a token at a time
    default = {s: 1 if i == 0 or s in single else 128 for i, s in enumerate(symbols)}
    extents = [_extents(text) for text in shapes] or [default]
    points = [Point(tuple(e.items()), t) for e in extents for t in (threads or (1,))]
    peers = None
    if against:
        from qcompile.capture import capture
        from qcompile.passes.recognise import recognise

        source = float_model or model.manifest["source"].get("path")
        if not source:
            raise click.UsageError("the artifact does not say where its float model lies; pass --model")
        cached = "generation" in model.manifest["source"]
        peers = OrtPeers(recognise(capture(source, kv_cache=cached, check=False).model)[0])
    table = compare(model.program, peers, points, seconds=seconds)
    if as_json:
        click.echo(json.dumps(table))
        return
    print_latency(table)


def print_latency(table: dict[str, dict[str, float]], console: Any = None) -> None:
    """Milliseconds by point and contender, with the ratio to the first contender."""
    from rich.console import Console
    from rich.table import Table

    names = list(next(iter(table.values())))
    grid = Table("milliseconds", *names, box=None, pad_edge=False)
    for point, values in table.items():
        first = values[names[0]]
        cells = [f"{first:.2f}"] + [f"{values[n]:.2f} ({values[n] / first:.2f}x)" for n in names[1:]]
        grid.add_row(point, *cells)
    (console or Console()).print(grid)


def _extents(text: str) -> dict[str, int]:
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        raise click.BadParameter(f"{text!r} is not of the form batch=1,sequence=128") from None
