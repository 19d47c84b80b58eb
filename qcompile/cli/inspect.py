"""``qcompile inspect``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def inspect(model: str, as_json: bool) -> None:
    """Show what is captured from MODEL and what is recognised in it."""
    from collections import Counter

    from qcompile.capture import capture
    from qcompile.passes.recognise import recognise
    from qcompile.passes.sites import embedding_sites, linear_sites

    captured = capture(model)
    graph, recognised = recognise(captured.model)
    operators = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.graph)
    linears, tables = linear_sites(graph), embedding_sites(graph)
    content = {
        "source": captured.source,
        "inputs": [_value(v) for v in graph.graph.inputs],
        "outputs": [_value(v) for v in graph.graph.outputs],
        "operators": dict(operators.most_common()),
        "recognised": dict(recognised.composites),
        "refused": [str(r) for r in recognised.refused],
        "linears": [{"name": s.name, "shape": list(s.shape)} for s in linears],
        "embeddings": [{"name": s.name, "shape": list(s.table.const_value.shape)} for s in tables],
    }
    if as_json:
        click.echo(json.dumps(content, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # shapes and names have brackets
    console.print(
        f"{captured.source.get('architecture') or captured.source.get('kind', 'model')}  {model}", style="bold"
    )
    for title, values in (("inputs", graph.graph.inputs), ("outputs", graph.graph.outputs)):
        console.print(f"{title}: " + "; ".join(_value(v) for v in values), highlight=False)
    table = Table("operator", "count", box=None, pad_edge=False)
    for name, count in operators.most_common():
        table.add_row(name, str(count))
    console.print(table)
    console.print(str(recognised), highlight=False)
    weights = sum(s.shape[0] * s.shape[1] for s in linears)
    console.print(f"{len(linears)} linear sites with {weights / 1e6:.2f} M weights, {len(tables)} embedding tables")


def _value(value: object) -> str:
    return f"{value.name}: {value.dtype}{value.shape}"  # type: ignore[attr-defined]
