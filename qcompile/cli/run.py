"""``qcompile run``."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("artifact")
@click.argument("inputs")
@click.option("-o", "--output", type=click.Path(), help="Write the outputs to this .npz file.")
@click.option("--threads", type=int, help="Threads to use; all cores by default.")
@click.option("--emulate", is_flag=True, help="Run a program for ARM under qemu.")
@click.option("--json", "as_json", is_flag=True, help="Print shapes and statistics as JSON.")
def run(artifact: str, inputs: str, output: str | None, threads: int | None, emulate: bool, as_json: bool) -> None:
    """Run ARTIFACT on INPUTS, a .npz file with one array per model input."""
    import numpy as np

    from qcompile.compiled import load
    from qcompile.errors import InputError, QcompileError
    from qcompile.runtime import set_threads

    model = load(artifact)
    try:
        with np.load(inputs, allow_pickle=False) as archive:
            feeds = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise InputError(f"{inputs} is not a readable .npz file: {error}") from None
    if threads is not None:
        set_threads(threads)
    if emulate:
        from qcompile.backends.emulate import EmulatedProgram

        results = EmulatedProgram(model.path).run(feeds)
    else:
        results = model.run(feeds)
    if output is not None:
        try:
            np.savez(output, allow_pickle=False, **results)
        except OSError as error:
            raise QcompileError(f"cannot write {output}: {error.strerror}") from None
    summary: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "mean": float(array.mean()) if array.size else 0.0,
            "std": float(array.std()) if array.size else 0.0,
        }
        for name, array in results.items()
    }
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for name, facts in summary.items():
            click.echo(
                f"{name}: {facts['dtype']}{tuple(facts['shape'])}, mean {facts['mean']:.6g}, std {facts['std']:.6g}"
            )
