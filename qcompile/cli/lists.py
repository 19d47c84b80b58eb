"""``qcompile recipes``, ``transforms``, ``formats`` and ``targets``: what there is to choose from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]], as_json: bool) -> None:
    """Print a table, or the same as JSON."""
    if as_json:
        click.echo(json.dumps([dict(zip(columns, row)) for row in rows]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console().print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True)
def recipes(as_json: bool) -> None:
    """List the recipes."""
    from qcompile.recipes import list_recipes

    rows = [
        (r.name, r.weight, r.activation, r.solver, ", ".join(map(str, r.transforms)) or "-", r.description)
        for r in list_recipes()
    ]
    show(("recipe", "weights", "activations", "solver", "transforms", "description"), rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True)
def transforms(as_json: bool) -> None:
    """List the transforms that a recipe may name, with their options and defaults."""
    import dataclasses

    import qcompile.transforms  # noqa: F401 (registers all)
    from qcompile.passes.asks import registered_asks

    rows = []
    for name, cls in registered_asks().items():
        options = [f"{f.name}={f.default}" for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        rows.append((name, ", ".join(options) or "-", (cls.__doc__ or "").strip().splitlines()[0]))
    show(("transform", "options", "description"), rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True)
def formats(as_json: bool) -> None:
    """List the number formats."""
    from qcompile.formats import list_formats

    rows = [
        (f.spelling, str(f.example), f"{f.example.bits_per_weight((4096, 4096)):.2f}", f.description)
        for f in list_formats()
    ]
    show(("format", "example", "bits per weight", "description"), rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True)
def targets(as_json: bool) -> None:
    """List the targets."""
    from qcompile.targets import list_targets

    rows = [(name, t.kind, t.cpu, ", ".join(sorted(t.features))) for name, t in list_targets().items()]
    show(("target", "kind", "cpu", "features"), rows, as_json)
