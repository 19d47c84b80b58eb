"""``qcompile run``."""

from __future__ import annotations

import json
import math
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
    import zipfile

    import numpy as np

    from qcompile.compiled import load
    from qcompile.errors import InputError, QcompileError
    from qcompile.runtime import set_threads

    model = load(artifact)
    try:
        with np.load(inputs, allow_pickle=False) as archive:
            feeds = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"cannot read {inputs}: {error.strerror or error}") from None
    except Exception as error:
        reason = str(error) if zipfile.is_zipfile(inputs) else "it is no zip archive"
        raise InputError(f"{inputs} is not a readable .npz file: {reason}") from None
    if threads is not None:
        set_threads(threads)
    if emulate:
        from qcompile.backends.emulate import EmulatedProgram

        results = EmulatedProgram(model.path).run(feeds)
    else:
        results = model.run(feeds)
    if output is not None:
        try:
            with open(output, "wb") as file:  # a name would get the suffix .npz, whatever it ends with
                np.savez(file, allow_pickle=False, **results)
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
        for facts in summary.values():  # JSON has no NaN and no infinity
            facts |= {key: facts[key] if math.isfinite(facts[key]) else None for key in ("mean", "std")}
        click.echo(json.dumps(summary, allow_nan=False))
    else:
        for name, facts in summary.items():
            click.echo(
                f"{name}: {facts['dtype']}{tuple(facts['shape'])}, mean {facts['mean']:.6g}, std {facts['std']:.6g}"
            )
