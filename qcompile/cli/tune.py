"""``qcompile tune``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qcompile.codegen.kernels.base import LinearProblem
    from qcompile.codegen.tune import Measured, Trial
    from qcompile.targets.target import Target


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="ARTIFACT|KxN...")
@click.option("--target", default="native", show_default=True, help="Machine to tune for; see `qcompile targets`.")
@click.option("--cpu", "variant", help="Which machine of the target's kind, e.g. cortex-a76.")
@click.option("--trials", default=16, show_default=True, help="Configs measured for each product, at most.")
@click.option(
    "--weight", "weights", multiple=True, help="Weight format of KxN; may be given several times (int4/g128)."
)
@click.option("--activation", default="int8/token", show_default=True, help="Activation format of KxN, or none.")
@click.option("--rows", type=int, help="Tune for this number of rows alone, instead of 1, 16 and 128 together.")
@click.option("--threads", default=1, show_default=True, help="Threads to measure with.")
@click.option("--rpc", metavar="HOST:PORT", help="Measure on a board, through the TVM RPC tracker at this address.")
@click.option("--key", help="Under which the board has registered with the tracker.")
@click.option("--database", type=click.Path(), help="File to write; by default the one that ships with the package.")
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
def tune(
    what: tuple[str, ...],
    target: str,
    variant: str | None,
    trials: int,
    weights: tuple[str, ...],
    activation: str,
    rows: int | None,
    threads: int,
    rpc: str | None,
    key: str | None,
    database: str | None,
    as_json: bool,
) -> None:
    """Measure kernels for the products of an artifact, or for shapes KxN, and keep the fastest.

    A search that was stopped goes on where it was. `qcompile compile` uses what was found; a file of your own is used
    where the environment variable QCOMPILE_TUNED names it.
    """
    from qcompile.codegen.tune import tune_all
    from qcompile.codegen.tune.database import file_of
    from qcompile.compiler import resolve_target

    machine = resolve_target(target, variant) if variant else resolve_target(target)
    problems = list(_problems(what, weights or ("int4/g128",), activation, rows, threads))
    runner = _runner(machine, rpc, key)
    path = Path(database) if database else file_of(machine)

    def progress(problem: LinearProblem, trial: Trial) -> None:
        times = " ".join(f"{1e6 * s:.0f}" for s in trial.seconds)
        click.echo(f"  {problem.k}x{problem.n} {problem.weight}: {times} us  {trial.name}", err=True)

    def finished(entry: Measured) -> None:
        times = ", ".join(f"{us:.0f} us for {m} rows" for m, us in zip(entry.rows, entry.microseconds))
        click.echo(
            f"{entry.k}x{entry.n} {entry.weight}: {entry.family} {json.dumps(entry.config)}: {times}", err=as_json
        )

    found = tune_all(problems, machine, runner, trials, path, progress, finished)
    if as_json:
        click.echo(json.dumps([vars(entry) for entry in found.entries.values()]))
    else:
        click.echo(f"written to {path}")


def _problems(
    what: tuple[str, ...], weights: tuple[str, ...], activation: str, rows: int | None, threads: int
) -> Iterator[LinearProblem]:
    """The products to tune."""
    from qcompile.codegen.kernels.base import LinearProblem
    from qcompile.formats import parse_activation, parse_format

    def problem(k: int, n: int, weight: str, activation: str) -> LinearProblem:
        return LinearProblem(k, n, parse_format(weight), parse_activation(activation), m=rows, threads=threads)

    for name in what:
        if match := re.fullmatch(r"(\d+)x(\d+)", name):
            if min(k := int(match[1]), n := int(match[2])) < 1:
                raise click.BadParameter(f"{name}: K and N are positive")
            yield from (problem(k, n, weight, activation) for weight in weights)
            continue
        from qcompile.artifact import open_artifact

        content = json.loads(open_artifact(name).file("program.json").read_text(encoding="utf-8"))
        yield from (problem(p["k"], p["n"], p["weight"], p["activation"]) for p in content.get("products", []))


def _runner(machine: Target, rpc: str | None, key: str | None) -> Any:
    """This machine, or the board behind a tracker."""
    from qcompile.codegen.tune.measure import LocalRunner, RpcRunner

    if rpc is None:
        from qcompile.backends.cpu import check_machine

        check_machine({"kind": machine.kind, "cpu": machine.cpu, "features": sorted(machine.features)})
        return LocalRunner()
    host, _, port = rpc.rpartition(":")
    if not host or not port.isdigit():
        raise click.BadParameter(f"{rpc!r} is not of the form HOST:PORT", param_hint="--rpc")
    if not key:
        raise click.UsageError("--rpc needs --key, the name under which the board has registered")
    return RpcRunner(host, int(port), key, _linker(machine))


def _linker(machine: Target) -> Any:
    """What links a shared library for the board; None for machines like this one."""
    from qcompile.backends import get_backend
    from qcompile.backends.cpu import Cpu

    backend = get_backend(machine.kind)
    link = backend.linker(machine) if isinstance(backend, Cpu) else None
    return None if link is None else (lambda out, files, **_: link(out, files))
