"""The analysis of channel spaces over many models: proof, coverage, time.

    python benchmarks/spaces.py [MODEL ...] [--no-miniatures] [--decoder] [--json]

The miniatures are those of the tests, small models with random weights of 22 architectures, as exported and with their
composites recognised; MODEL is whatever ``qcompile spaces`` takes. Of every model: how many spaces are free, a random
element of all their groups and random translations folded at once in float64, the relative error of the outputs, and
how many of the inputs and outputs of its linear operators and convolutions lie in a free space (what reads the model's own
inputs and what writes its outputs cannot). ``--decoder`` analyses a decoder of the shape of Llama 7B, in a process of its
own, without reading a weight.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from qcompile.capture import capture
from qcompile.passes.recognise import recognise
from qcompile.passes.spaces import Spaces, analyse, prove

TESTS = Path(__file__).parents[1] / "tests" / "passes"


def coverage(spaces: Spaces) -> dict[str, list[int]]:
    """Outputs and inputs of linear operators with constant weights: how many lie in a free space, and how many there are."""
    found = {"sources": [0, 0], "sinks": [0, 0]}
    for node in spaces.model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            continue
        for weight in node.inputs[:2]:
            if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) < 2:
                continue
            for side, role in (("sources", "writer"), ("sinks", "reader")):
                mine = [s for s in spaces if any((m.name, m.role) == (weight.name, role) for m in s.members)]
                found[side][0] += any(not s.pinned for s in mine)
                found[side][1] += 1
    return found


def row(model: ir.Model, seed: int) -> dict:
    """Everything about one model."""
    start = time.process_time()
    spaces = analyse(model)
    seconds = time.process_time() - start
    proof = prove(spaces, seed)
    return {
        "spaces": proof.spaces,
        "translations": proof.translations,
        "error": proof.error,
        "seconds": seconds,
        **coverage(spaces),
    }


def decoder() -> dict:
    """Time and memory of a decoder of 32 layers whose weights do not exist."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(TESTS)!r}); import llama_graph\n"
        "from qcompile.passes.spaces import analyse\n"
        "reads = llama_graph.Reads()\n"
        "model = llama_graph.llama_graph(32, 4096, 11008, 32, 32, 32000, reads)\n"
        "start = time.process_time(); spaces = analyse(model); seconds = time.process_time() - start\n"
        "print(open('/proc/self/status').read()); print(seconds, len(spaces), len(reads.names))"
    )
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, spaces, reads = text.splitlines()[-1].split()
    peak = int(re.search(r"VmHWM:\s+(\d+)", text)[1])  # type: ignore[index]
    return {"seconds": float(seconds), "GB": peak / 1e6, "spaces": int(spaces), "weights read": int(reads)}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--miniatures/--no-miniatures", default=True)
@click.option("--decoder", "large", is_flag=True, help="Also a decoder of the shape of Llama 7B.")
@click.option("--json", "as_json", is_flag=True)
def main(models: tuple[str, ...], miniatures: bool, large: bool, as_json: bool) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows: dict[str, dict] = {}

    def measure(name: str, exported: ir.Model, recognised: ir.Model) -> None:
        rows[name] = {"exported": row(exported, 0), "recognised": row(recognised, 1)}
        print(f"{name} {max(r['error'] for r in rows[name].values()):.1e}", file=sys.stderr, flush=True)

    if miniatures:
        sys.path.insert(0, str(TESTS))
        import miniatures as small

        for name in sorted(small.BUILDERS):
            measure(name, small.model(name), recognise(small.model(name))[0])
    for name in models:
        graph = capture(name, check=False).model
        measure(name, graph.clone(), recognise(graph)[0])
    large_row = decoder() if large else {}
    if as_json:
        click.echo(json.dumps({"models": rows, "decoder": large_row}))
        return
    table = Table("model", "free spaces", "translations", "sources", "sinks", "error", "recognised", box=None)
    for name, kinds in rows.items():
        first, second = kinds["exported"], kinds["recognised"]
        sides = ("/".join(map(str, second[side])) for side in ("sources", "sinks"))
        table.add_row(
            Path(name).name,
            str(second["spaces"]),
            str(second["translations"]),
            *sides,
            f"{first['error']:.1e}",
            f"{second['error']:.1e}",
        )
    Console(width=120).print(table)
    if rows:
        print(f"largest error {max(r['error'] for kinds in rows.values() for r in kinds.values()):.1e}")
    if large:
        print("decoder of 32 layers: " + ", ".join(f"{key} {value:.3g}" for key, value in large_row.items()))


if __name__ == "__main__":
    main()
