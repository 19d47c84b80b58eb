"""What to measure next, and what is best.

Families and configs are ranked by the cost model. The best of every family is measured first; after that the search
takes two configs that differ in one choice from the fastest so far, then the next in rank, and so on until the trials are
used up. Every measurement is kept in a journal beside the database as soon as it is made, so that a search that was
killed goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels import TYPICAL_ROWS, families
from qcompile.codegen.kernels.base import LinearKernel, LinearProblem
from qcompile.codegen.tune.database import Database, Measured
from qcompile.codegen.tune.measure import Runner
from qcompile.errors import TargetError
from qcompile.targets.databases import check_writable
from qcompile.targets.target import Target


@dataclass(frozen=True)
class Trial:
    """One measurement: seconds (or millions of instructions, see `Runner`) for each number of rows."""

    family: str
    config: dict[str, Any]
    seconds: tuple[float, ...]

    @property
    def name(self) -> str:
        """Identifies what was measured."""
        return _name(self.family, self.config)


@dataclass
class Journal:
    """Trials on disk, one JSON line each. A line cut off by a kill is ignored."""

    path: Path | None

    def read(self, problem: str) -> list[Trial]:
        """The trials of a problem."""
        if self.path is None or not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
                trial = Trial(content["family"], content["config"], tuple(content["seconds"]))
            except (ValueError, KeyError, TypeError):
                continue
            if content.get("problem") == problem:
                found.append(trial)
        return found

    def append(self, problem: str, trial: Trial) -> None:
        """Keep one more."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        line = json.dumps(
            {"problem": problem, "family": trial.family, "config": trial.config, "seconds": list(trial.seconds)}
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if whole else f"\n{line}\n")
            file.flush()
            os.fsync(file.fileno())


def tune(
    problem: LinearProblem,
    target: Target,
    runner: Runner,
    trials: int,
    journal: Path | None = None,
    progress: Callable[[Trial], None] | None = None,
    typical: Sequence[int] = (),
) -> Measured:
    """Measure up to ``trials`` configs of one problem, those in the journal among them, and return the fastest.

    Where ``problem.m`` is unknown, several numbers of rows count, each relative to the fastest measured for it: ``typical``,
    or 1, 16 and 128.

    Raises:
        TargetError: no family takes the problem.
    """
    rows = (problem.m,) if problem.m is not None else tuple(typical) or TYPICAL_ROWS
    name = describe(problem, target, rows)
    log = Journal(journal)
    done = {trial.name: trial for trial in log.read(name)}
    able = [family for family in families(target.kind) if family.supports(problem, target)]
    if not able:
        raise TargetError(f"no kernel on {target} multiplies {problem.weight} by {problem.activation}; nothing to tune")
    by_name = {family.name: family for family in able}
    for family, config in _candidates(problem, target, able, rows, done, runner.counts):
        if len(done) >= trials:
            break
        plain = replace(problem, m=None)
        trial = Trial(family.name, config, tuple(runner.time(plain, family, config, target, rows)))
        log.append(name, trial)
        done[trial.name] = trial
        if progress is not None:
            progress(trial)
    best = fastest([trial for trial in done.values() if trial.family in by_name])
    return Measured(
        problem.k,
        problem.n,
        str(problem.weight),
        str(problem.activation),
        rows,
        problem.threads,
        best.family,
        best.config,
        () if runner.counts else tuple(round(1e6 * s, 1) for s in best.seconds),
        len(done),
        runner.machine,
        tuple(round(1e6 * s) for s in best.seconds) if runner.counts else (),
    )


def fastest(trials: Sequence[Trial]) -> Trial:
    """The trial with the least sum of times, each relative to the shortest for its number of rows."""
    least = [min(times) for times in zip(*(trial.seconds for trial in trials))]
    return min(trials, key=lambda trial: sum(s / t for s, t in zip(trial.seconds, least)))


def describe(problem: LinearProblem, target: Target, rows: Sequence[int]) -> str:
    """The name of a problem in the journal."""
    size = f"{problem.k}x{problem.n}"
    return f"{target} {size} {problem.weight} {problem.activation} rows={list(rows)} threads={problem.threads}"


def _candidates(
    problem: LinearProblem,
    target: Target,
    able: list[LinearKernel],
    rows: Sequence[int],
    done: dict[str, Trial],
    counts: bool = False,
) -> Iterator[tuple[LinearKernel, dict[str, Any]]]:
    """Configs to measure, in order; looks at ``done`` as it fills.

    With ``counts``, which leave out memory, scales are stored as by default: wider ones cost fewer instructions.
    """
    everything = [(family, config) for family in able for config in family.configs(problem, target)]
    if counts:
        default = {family.name: family.configs(problem, target)[0].get("scales") for family in able}
        everything = [(f, config) for f, config in everything if config.get("scales") == default[f.name]]
    costs = [[family.cost(problem, config, target, m) for m in rows] for family, config in everything]
    least = [min(column) for column in zip(*costs)]
    rank = sorted(range(len(everything)), key=lambda i: sum(c / t for c, t in zip(costs[i], least)))
    first = [(family, family.configs(problem, target)[0]) for family in able]
    ranked = [everything[i] for i in rank]
    for choice in first:
        if _name(choice[0].name, choice[1]) not in done:
            yield choice
    turn = 0
    while True:
        left = [c for c in ranked if _name(c[0].name, c[1]) not in done]
        if not left:
            return
        best = fastest(list(done.values()))
        near = [c for c in left if c[0].name == best.family and _differences(c[1], best.config) == 1]
        turn += 1
        yield near[0] if near and turn % 3 else left[0]


def _name(family: str, config: dict[str, Any]) -> str:
    return f"{family} {json.dumps(config, sort_keys=True)}"


def _differences(a: dict[str, Any], b: dict[str, Any]) -> int:
    return sum(a.get(name) != b.get(name) for name in {*a, *b})


def tune_all(
    problems: Sequence[LinearProblem],
    target: Target,
    runner: Runner,
    trials: int,
    path: Path,
    progress: Callable[[LinearProblem, Trial], None] | None = None,
    finished: Callable[[Measured], None] | None = None,
    typical: Sequence[int] = (),
) -> Database:
    """Tune several problems into the database at ``path``, which is written after each of them; ``typical`` as in `tune`.

    Raises:
        ArtifactError: ``path`` cannot be written, or is no database.
        TargetError: it is one of another target, or no family takes a problem.
    """
    check_writable(path)
    database = Database.load(path) if path.exists() else Database(str(target))
    if database.target != str(target):
        raise TargetError(f"{path} holds measurements of {database.target}, not of {target}; name another file")
    journal = path.with_suffix(".trials.jsonl")
    for problem in problems:
        report = functools.partial(progress, problem) if progress else None
        entry = tune(problem, target, runner, trials, journal, report, typical)
        database.add(entry)
        database.save(path)
        if finished is not None:
            finished(entry)
    journal.unlink(missing_ok=True)
    return database
