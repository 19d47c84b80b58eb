"""``qcompile recipes``, ``transforms``, ``formats`` and ``targets``: what there is to choose from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qcompile.formats import Format


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
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def recipes(as_json: bool) -> None:
    """List the recipes."""
    from qcompile.recipes import list_recipes

    rows = [
        (r.name, r.weight, r.activation, r.solver, ", ".join(map(str, r.transforms)) or "-", r.description)
        for r in list_recipes()
    ]
    show(("recipe", "weights", "activations", "solver", "transforms", "description"), rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
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
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def formats(as_json: bool) -> None:
    """List the number formats, and the targets with kernels for them, with activations of 8 bits or in floats.

    Where a target takes some widths only, they follow its name.
    """
    from qcompile.formats import list_formats

    rows = [
        (
            f.spelling,
            str(f.example),
            f"{f.example.bits_per_weight((4096, 4096)):.2f}",
            ", ".join(_takers(_members(f.example) if "<" in f.spelling else [f.example])) or "-",
            f.description,
        )
        for f in list_formats()
    ]
    show(("format", "example", "bits per weight", "kernels", "description"), rows, as_json)


def _takers(members: Sequence[Format]) -> list[str]:
    """Kinds of targets that multiply by the formats of a family: ``x86``, or ``x86 2-4`` if by these widths only."""
    from qcompile.codegen.kernels import select
    from qcompile.codegen.kernels.base import LinearProblem
    from qcompile.errors import TargetError
    from qcompile.formats import parse_activation
    from qcompile.targets import get_target

    found = []
    for kind, target in (("x86", "x86-64-v3"), ("arm", "cortex-a76"), ("cuda", "sm_90a")):
        widths = []
        for member in members:
            for activation in ("int8/token", "none"):
                try:
                    select(LinearProblem(1024, 1024, member, parse_activation(activation)), get_target(target))
                except TargetError:
                    continue
                widths.append(member.bits)
                break
        if len(widths) == len(members):
            found.append(kind)
        elif widths:
            span = f"{min(widths)}-{max(widths)}" if len(set(widths)) > 1 else str(widths[0])
            found.append(f"{kind} {span}")
    return found


def _members(example: Format) -> list[Format]:
    """Formats of a family: its example with every number that its spelling may have."""
    import dataclasses

    from qcompile.errors import FormatError
    from qcompile.formats import Format, parse_format

    names = ("bits", "terms", "exponent_bits", "mantissa_bits")
    numbers = [field.name for field in dataclasses.fields(example) if field.name in names]  # type: ignore[arg-type]
    found = {str(example): example}
    for values in itertools.product(range(9), repeat=len(numbers)):
        try:
            member = dataclasses.replace(example, **dict(zip(numbers, values)))  # type: ignore[type-var]
            if isinstance(member, Format) and parse_format(str(member)) == member:
                found[str(member)] = member
        except FormatError:
            continue
    return list(found.values())


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def targets(as_json: bool) -> None:
    """List the targets."""
    from qcompile.targets import list_targets

    rows = [(name, t.kind, t.cpu, ", ".join(sorted(t.features))) for name, t in list_targets().items()]
    show(("target", "kind", "cpu", "features"), rows, as_json)
