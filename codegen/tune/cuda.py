"""Search the configs of CUDA's linear kernels by measuring them, and keep the fastest in a table (`kernels.cuda.tuned`).

Per number of rows the candidates are the best by the cost model, one for each way to divide the work; the pipeline's depth
is varied for the first ones. Several candidates share a library, compiled in the background by one process per core while
others are measured. Every measurement goes to a journal as it is made, so that a search that was stopped goes on where it
was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda import FAMILIES, build, tuned
from qcompile.codegen.kernels.cuda.linear import activation_type
from qcompile.codegen.kernels.cuda.plan import ROWS, Entry, Plan, family, make_plan
from qcompile.codegen.tune.database import write_atomically
from qcompile.codegen.tune.search import Journal, Trial
from qcompile.errors import TargetError
from qcompile.targets.cuda import CudaTarget
from qcompile.targets.databases import check_writable

MEASURED = {rows: rows for rows in ROWS} | {512: 1024}
"""Rows the config for a bucket is measured with."""

DIVISION = ("rows", "tn", "nw", "kw", "grid", "raw", "wg", "mt", "split", "cluster", "wgmma", "share")
"""What distinguishes two ways to divide the work; the rest is the pipeline's depth."""

GOOD: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"tn": (1, 2), "nw": (1,), "kw": (8,), "split": (1,), "stages": (4, 6)},
    {"rows": (128,), "wg": (4,), "mt": (1,), "split": (1,), "stages": (3, 4)},
    {"rows": (128,), "wg": (2,), "mt": (2,), "split": (1,), "stages": (3, 4)},
)
"""Configs that were among the best of wider searches; always measured where they fit."""

PER_LIBRARY = 8


@dataclass(frozen=True)
class Batch:
    """Candidates in one library: ``plan.entries[i]`` is meant for ``buckets[i]`` rows."""

    plan: Plan
    buckets: tuple[int, ...]

    def key(self, index: int) -> str:
        """Of a candidate's problem in the table."""
        return tuned.name(self.plan.problem, self.plan.target, self.buckets[index], kind(self.plan.problem))

    def trial(self, index: int, seconds: float = 0.0) -> Trial:
        """A candidate as the journal keeps it."""
        entry = self.plan.entries[index]
        return Trial(entry.family, entry.config, (seconds,))


def kind(problem: LinearProblem) -> str:
    """Type of the activations searches are made with."""
    return activation_type(problem.activation, "float16")


def candidates(problem: LinearProblem, target: CudaTarget, rows: int, count: int) -> list[Entry]:
    """About ``count`` kernels for up to ``rows`` rows, of all families that take the problem."""
    m, dtype = MEASURED.get(rows, rows), kind(problem)
    known = replace(problem, m=m)
    ranked: list[tuple[float, str, dict[str, Any]]] = []
    able_ones = [kind for kind in (family(cls.name) for cls in FAMILIES) if kind.supports(problem, target)]
    for able in (kind for kind in able_ones if kind.packing == able_ones[0].packing):
        name = able.name
        if ("stream" in name and rows > tuned.STREAMED) or ("tiled" in name and rows < 8):
            continue
        found = [(able.cost(known, c, target, m), name, c) for c in able.configs(known, target) if c["dtype"] == dtype]
        ranked += found
        ranked += [(1.02 * cost, n, {**c, "raw": False}) for cost, n, c in found if c.get("raw")]
    ranked.sort(key=lambda entry: entry[0])
    divisions: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for _, name, config in ranked:
        divisions.setdefault((name, *(config.get(key) for key in DIVISION)), []).append((name, config))
    first = [same[0] for same in divisions.values()][: count - count // 4]
    more = [entry for same in divisions.values() for entry in same[1:2]][: count // 4]
    for _, name, config in ranked:
        good = any(all(config.get(key) in values for key, values in set_.items()) for set_ in GOOD)
        if good and (name, config) not in first + more:
            more.append((name, config))
    if target.has("pdl"):  # half of them launched both ways; `persistent` kernels always overlap, `planes` never
        both = [(n, c) for n, c in first if "persistent" not in n and "planes" not in n]
        early = [(n, {**c, "overlap": not c.get("overlap")}) for n, c in both][: -(-count // 2)]
        more += early
        # And a third where x or the next kernel comes at another time.
        third = -(-count // 3)
        more += [(n, {**c, "late": True}) for n, c in first if "shared" in n][:third]
        few = [(n, c) for n, c in first if "sliced" in n][:third]
        more += [(n, {**c, "early": 1}) for n, c in few]
        bulk = [(n, {**c, "wide": 1, "bulk": True, "early": 3}) for n, c in few]
        more += [(n, c) for n, c in bulk if family(n).fits(family(n).shape(known, c), target)]
    return [Entry(rows, name, {**config, "out": "float16"}) for name, config in first + more]


def batches(
    problem: LinearProblem,
    target: CudaTarget,
    buckets: Sequence[int] = ROWS,
    count: int = 12,
    known: Iterable[tuple[str, str]] = (),
) -> list[Batch]:
    """The candidates of a problem, those apart that are ``known``: (problem, trial) by name."""
    done = set(known)
    base = make_plan(problem, target, "float16", "float16", rows=(1,))
    found = []
    for rows in buckets:
        key = tuned.name(problem, target, rows, kind(problem))
        for entry in candidates(problem, target, rows, count):
            if (key, Trial(entry.family, entry.config, ()).name) not in done:
                found.append(entry)
    made = []
    for start in range(0, len(found), PER_LIBRARY):
        part = found[start : start + PER_LIBRARY]
        entries = tuple(Entry(start + i, e.family, e.config) for i, e in enumerate(part))
        made.append(Batch(replace(base, entries=entries), tuple(e.rows for e in part)))
    return made


class Search:
    """Measured candidates.

    Args:
        journal: file that keeps every measurement; None for none.
    """

    def __init__(self, journal: Path | None) -> None:
        self._journal = Journal(journal)
        self.trials: dict[str, dict[str, Trial]] = {}
        if journal is not None and journal.exists():
            for line in journal.read_text(encoding="utf-8").splitlines():
                try:
                    content = json.loads(line)
                    trial = Trial(content["family"], content["config"], tuple(content["seconds"]))
                    self.trials.setdefault(content["problem"], {})[trial.name] = trial
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill

    def known(self) -> set[tuple[str, str]]:
        """What has been measured: (problem, trial) by name."""
        return {(key, name) for key, trials in self.trials.items() for name in trials}

    def best(self) -> dict[str, Trial]:
        """The fastest of every problem."""
        return {key: min(trials.values(), key=lambda t: t.seconds) for key, trials in self.trials.items()}

    def run(
        self,
        work: Sequence[Batch],
        until: float = float("inf"),
        workers: int | None = None,
        progress: Callable[[str, Trial], None] | None = None,
    ) -> None:
        """Compile and measure on torch's current device.

        Args:
            work: what.
            until: stop at this `time.monotonic`.
            workers: processes that compile, by default one per core; 0 if somebody else does.
            progress: called after every measurement.
        """
        pending = list(work)
        started: dict[int, Future[Path]] = {}
        pool = None
        if workers != 0:
            pool = ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn"))
            started = {id(b): pool.submit(Plan.library, b.plan) for b in pending}
        sets: dict[LinearProblem, Any] = {}
        try:
            while pending and time.monotonic() < until:
                ready = next((b for b in pending if b.plan.library_path().exists()), None)
                if ready is None:
                    failed = next((b for b in pending if id(b) in started and started[id(b)].done()), None)
                    if failed is not None and (error := started[id(failed)].exception()):
                        pending.remove(failed)
                        raise error
                    time.sleep(0.1)
                    continue
                pending.remove(ready)
                self._measure(ready, sets, until, progress)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _measure(
        self, batch: Batch, sets: dict[LinearProblem, Any], until: float, progress: Callable[[str, Trial], None] | None
    ) -> None:
        from qcompile.codegen.kernels.cuda.measure import calls, measure, weight_sets

        problem = batch.plan.problem
        if problem not in sets:
            sets.clear()
            sets[problem], _ = weight_sets(batch.plan)
        module = build.load(batch.plan.library())
        for index, entry in enumerate(batch.plan.entries):
            if time.monotonic() > until:
                return
            rows = batch.buckets[index]
            run = calls(batch.plan, index, MEASURED.get(rows, rows), sets[problem], module[entry.symbol])
            trial = batch.trial(index, measure(run, 5))
            key = batch.key(index)
            self._journal.append(key, trial)
            self.trials.setdefault(key, {})[trial.name] = trial
            if progress is not None:
                progress(key, trial)

    def save(self, path: Path) -> None:
        """Merge the fastest configs into the table at ``path``."""
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key, trial in self.best().items():
            table[key] = {"family": trial.family, **trial.config}
        write_atomically(path, json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def tune(
    problems: Sequence[LinearProblem],
    target: CudaTarget,
    table: Path,
    rows: Sequence[int] = ROWS,
    count: int = 12,
    progress: Callable[[str, Trial], None] | None = None,
) -> Search:
    """Search kernels for all problems on torch's current device and enter the fastest in ``table``.

    Raises:
        ArtifactError: ``table`` cannot be written.
        TargetError: no family takes a problem, or torch sees no device of this architecture.
    """
    import torch

    from qcompile.targets.cuda import for_capability

    if not torch.cuda.is_available():
        raise TargetError(f"torch sees no CUDA device here; run `qcompile tune` on a machine with one of {target.cpu}")
    have = for_capability(*torch.cuda.get_device_capability()).cpu
    if have != target.cpu:
        raise TargetError(f"this device is a {have}; tune for it with --cpu {have}, or on a machine with {target.cpu}")
    check_writable(table)
    search = Search(table.with_suffix(".trials.jsonl"))
    known = search.known()
    search.run([b for p in problems for b in batches(p, target, rows, count, known)], progress=progress)
    search.save(table)
    return search
