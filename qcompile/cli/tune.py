"""``qcompile tune``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.errors import InputError

if TYPE_CHECKING:
    from qcompile.codegen.kernels.base import LinearProblem
    from qcompile.codegen.tune import Measured, Trial
    from qcompile.targets.target import Target


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="ARTIFACT|KxN...")
@click.option("--target", default="native", show_default=True, help="Machine to tune for; see `qcompile targets`.")
@click.option("--cpu", "variant", help="Which machine of the target's kind, e.g. cortex-a76.")
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Configs measured for each product, at most.",
)
@click.option(
    "--weight", "weights", multiple=True, help="Weight format of KxN; may be given several times (int4/g128)."
)
@click.option("--activation", default="int8/token", show_default=True, help="Activation format of KxN, or none.")
@click.option(
    "--rows",
    type=click.IntRange(1),
    multiple=True,
    help="Number of rows to tune for; several count alike. Default: 1, 16 and 128.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads to measure with.")
@click.option("--rpc", metavar="HOST:PORT", help="Measure on a board, through the TVM RPC tracker at this address.")
@click.option("--key", help="Under which the board has registered with the tracker.")
@click.option("--database", type=click.Path(), help="File to write instead of the one in your own folder.")
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
def tune(
    what: tuple[str, ...],
    target: str,
    variant: str | None,
    trials: int,
    weights: tuple[str, ...],
    activation: str,
    rows: tuple[int, ...],
    threads: int,
    rpc: str | None,
    key: str | None,
    database: str | None,
    as_json: bool,
) -> None:
    """Measure kernels for the products of an artifact, or for shapes KxN, and keep the fastest.

    For ARM targets that this machine is not, and without a board, the instructions of kernels are counted under qemu.
    A search that was stopped goes on where it was. Results go to a file in your own folder, which `qcompile compile`
    reads before what ships with the package; or to the one the environment variable QCOMPILE_TUNED names, which it reads
    in place of both.
    """
    from qcompile.codegen.tune import tune_all
    from qcompile.compiler import resolve_target
    from qcompile.targets import databases

    machine = resolve_target(target, variant) if variant else resolve_target(target)
    problems = list(_problems(what, weights or ("int4/g128",), activation, rows, threads))
    path = Path(database) if database else databases.to_write(machine)
    if machine.kind == "cuda":
        _tune_cuda(problems, machine, rows, trials, path, as_json)
        return
    runner = _runner(machine, rpc, key)

    def progress(problem: LinearProblem, trial: Trial) -> None:
        costs = " ".join(f"{1e6 * s:.0f}" for s in trial.seconds)
        unit = "instructions" if runner.counts else "us"
        click.echo(f"  {problem.k}x{problem.n} {problem.weight}: {costs} {unit}  {trial.name}", err=True)

    def finished(entry: Measured) -> None:
        unit = "instructions" if entry.instructions else "us"
        costs = zip(entry.rows, entry.instructions or entry.microseconds)
        text = ", ".join(f"{cost:.0f} {unit} for {m} rows" for m, cost in costs)
        click.echo(
            f"{entry.k}x{entry.n} {entry.weight}: {entry.family} {json.dumps(entry.config)}: {text}", err=as_json
        )

    found = tune_all(problems, machine, runner, trials, path, progress, finished, rows)
    if as_json:
        click.echo(json.dumps([vars(entry) for entry in found.entries.values()]))
    else:
        click.echo(f"written to {path}")


def _tune_cuda(
    problems: list[LinearProblem], machine: Any, rows: tuple[int, ...], trials: int, path: Path, as_json: bool
) -> None:
    """The same on this machine's GPU, where every number of rows has a kernel of its own."""
    from qcompile.codegen.kernels.cuda.plan import ROWS
    from qcompile.codegen.tune.cuda import tune as search

    def progress(key: str, trial: Trial) -> None:
        click.echo(f"  {key}: {1e6 * trial.seconds[0]:.2f} us  {trial.name}", err=True)

    wanted = sorted({next((r for r in ROWS if r >= m), ROWS[-1]) for m in rows}) or ROWS
    best = search([replace(p, m=None) for p in problems], machine, path, wanted, trials, progress).best()
    if as_json:
        click.echo(
            json.dumps({key: {"seconds": t.seconds[0], "family": t.family, **t.config} for key, t in best.items()})
        )
        return
    for key, trial in sorted(best.items()):
        click.echo(f"{key}: {trial.name}: {1e6 * trial.seconds[0]:.2f} us")
    click.echo(f"written to {path}")


def _problems(
    what: tuple[str, ...], weights: tuple[str, ...], activation: str, rows: tuple[int, ...], threads: int
) -> Iterator[LinearProblem]:
    """The products to tune."""
    from qcompile.codegen.kernels.base import LinearProblem
    from qcompile.formats import parse_activation, parse_format

    def problem(k: int, n: int, weight: str, activation: str) -> LinearProblem:
        m = rows[0] if len(rows) == 1 else None
        return LinearProblem(k, n, parse_format(weight), parse_activation(activation), m=m, threads=threads)

    for name in what:
        if match := re.fullmatch(r"(\d+)x(\d+)", name):
            if min(k := int(match[1]), n := int(match[2])) < 1:
                raise click.BadParameter(f"{name}: K and N are positive")
            yield from (problem(k, n, weight, activation) for weight in weights)
            continue
        from qcompile.artifact import open_artifact

        content = json.loads(open_artifact(name).file("program.json").read_text(encoding="utf-8"))
        if not (products := content.get("products")):
            raise InputError(f"{name} has no quantized products to tune")
        yield from (problem(p["k"], p["n"], p["weight"], p["activation"]) for p in products)


def _runner(machine: Target, rpc: str | None, key: str | None) -> Any:
    """This machine, the board behind a tracker, or an emulator for ARM without a board."""
    from qcompile.codegen.tune.measure import CountingRunner, LocalRunner, RpcRunner
    from qcompile.targets import arm

    if rpc is None and machine.kind == "arm" and arm.missing_features(machine.features):
        arm.emulator(arm.linux(machine))
        return CountingRunner()
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
