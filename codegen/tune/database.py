"""Measured configs by target, format and shape: JSON files, one per target (`targets.databases` says where).

    {"version": 1, "target": "x86/x86-64-v3", "entries": [{"k": 4096, "n": 4096, "weight": "int2/g128",
     "activation": "int8/token", "rows": [1, 16, 128], "threads": 1, "family": "x86-lut", "config": {...},
     "microseconds": [127.0, 1690.2, 13533.1], "trials": 24, "machine": "AMD EPYC"}]}

A shape that was not measured takes the config of the nearest one that was, with the same formats, and says so. Shapes more
than a factor of 4 away in all are no neighbours; the cost model chooses then.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.errors import ArtifactError
from qcompile.targets import databases
from qcompile.targets.arm import COUNTED
from qcompile.targets.target import Target

VERSION = 1

NEAR = 2.0
"""Largest distance of a neighbour: the sum of ``|log2|`` of the ratios of K and of N."""


@dataclass(frozen=True)
class Measured:
    """The fastest kernel of one problem on one machine.

    Attributes:
        k, n, weight, activation: the problem; formats as they are spelled.
        rows: numbers of rows it was judged by.
        threads: threads it was measured with.
        family, config: what was fastest.
        microseconds: its time for each number of rows; empty where instructions were counted instead.
        instructions: what it executes for each number of rows; empty where time was measured.
        trials: how many configs were compared.
        machine: where.
    """

    k: int
    n: int
    weight: str
    activation: str
    rows: tuple[int, ...]
    threads: int
    family: str
    config: dict[str, Any]
    microseconds: tuple[float, ...] = ()
    trials: int = 0
    machine: str = ""
    instructions: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What two measurements of the same thing share."""
        return self.k, self.n, self.weight, self.activation, self.rows, self.threads

    def distance(self, problem: LinearProblem) -> float:
        """How far its shape is from that of ``problem``."""
        return abs(log2(self.k / problem.k)) + abs(log2(self.n / problem.n))


class Database:
    """Entries of one target.

    Args:
        target: name of the target, ``str(target)``.
        entries: what is known.
    """

    def __init__(self, target: str, entries: Iterable[Measured] = ()) -> None:
        self.target = target
        self.entries = {entry.key: entry for entry in entries}

    def add(self, entry: Measured) -> None:
        """Enter a result in place of an older one of the same problem."""
        self.entries[entry.key] = entry

    def lookup(self, problem: LinearProblem, target: Target) -> tuple[str, dict[str, Any], str] | None:
        """Name of the best family, its config, and where both come from; None if nothing near is known."""
        if str(target) != self.target:
            return None
        fits = [
            entry
            for entry in self.entries.values()
            if (entry.weight, entry.activation) == (str(problem.weight), str(problem.activation))
            and (problem.m is None or entry.rows == (problem.m,) or len(entry.rows) > 1)
            and entry.distance(problem) <= NEAR
        ]
        if not fits:
            return None

        def preference(entry: Measured) -> tuple[Any, ...]:
            # Of equally near ones, those of the wanted rows and threads; of those the first, as in `database_for`.
            rows = (problem.m,) if problem.m is not None else entry.rows
            return entry.distance(problem), entry.rows != rows, abs(entry.threads - problem.threads)

        best = min(fits, key=preference)
        config = _nearest_config(best, problem, target)
        if config is None:
            return None
        where = f"{best.k} x {best.n}" + (f" on {best.machine}" if best.machine else "")
        how = "fewest instructions" if best.instructions else "measured fastest"
        exact = (best.k, best.n) == (problem.k, problem.n)
        reason = f"{how} for {where}" if exact else f"{how} for {where}, the nearest shape measured"
        if exact and config != best.config:
            reason += " with a config that is no longer offered; the nearest one is taken"
        return best.family, config, reason

    # Files

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Database:
        """Read a file.

        Raises:
            ArtifactError: it is no database, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ArtifactError(f"{path}: version {content['version']} of tuned databases is not {VERSION}")
            return cls(content["target"], [_entry(fields) for fields in content["entries"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is no tuned database: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; a kill leaves the old one or the new one, whole."""
        ordered = sorted(self.entries.values(), key=lambda entry: entry.key)
        lines = ",\n".join("  " + json.dumps(_fields(entry)) for entry in ordered)
        head = f'{{"version": {VERSION}, "target": {json.dumps(self.target)}, "entries": ['
        write_atomically(Path(path), f"{head}\n{lines}\n]}}\n")


def _fields(entry: Measured) -> dict[str, Any]:
    """What is written of an entry: all but empty measurements."""
    return {name: value for name, value in asdict(entry).items() if value != ()}


def _entry(fields: dict[str, Any]) -> Measured:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Measured(**{**fields, **lists})


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one with the given text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def database_for(target: Target) -> Database | None:
    """What is known of a target: the file QCOMPILE_TUNED names, or the user's results before those that ship.

    None if there is nothing. ARM processors without results of their own use the instruction counts of one with the same
    features.

    Raises:
        ArtifactError: a file is no database.
    """
    if (path := databases.named_by_variable()) is not None:
        return _read(path, path.stat().st_mtime_ns) if path.is_file() else None
    found = _merged(databases.name_of(target), str(target))
    if found is None and target.kind == "arm" and (alike := COUNTED.get(target.features)):
        found = _merged(alike, f"{target.kind}/{alike}")
        return found and _counted(found, alike, str(target))
    return found


def _merged(name: str, target: str) -> Database | None:
    """What the user's file of a target and the one that ships hold; of several results for a problem, the user's."""
    entries: dict[tuple[Any, ...], Measured] = {}
    there = [path for path in (databases.of_user(name), databases.shipped(name)) if path.is_file()]
    for path in there:
        database = _read(path, path.stat().st_mtime_ns)
        if database.target != target:
            raise ArtifactError(f"{path} holds results for {database.target}, not for {target}; rename or remove it")
        for key, entry in database.entries.items():
            entries.setdefault(key, entry)
    return Database(target, entries.values()) if there else None


def _counted(database: Database, name: str, target: str) -> Database:
    """The instruction counts of one processor as those of another with the same features."""
    counted = [e for e in database.entries.values() if e.instructions]
    return Database(target, [replace(e, machine=f"{e.machine}, {name}") for e in counted])


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Database:
    return Database.load(path)


def _nearest_config(entry: Measured, problem: LinearProblem, target: Target) -> dict[str, Any] | None:
    """The config of ``entry`` if it is one of the problem's own, else the one that differs in the fewest choices."""
    from qcompile.codegen.kernels import families

    family = next((f for f in families(target.kind) if f.name == entry.family), None)
    if family is None or not family.supports(problem, target):
        return None
    own = family.configs(replace(problem, threads=max(problem.threads, 1)), target)
    if entry.config in own:
        return dict(entry.config)

    def differences(config: dict[str, Any]) -> int:
        return sum(config.get(name) != value for name, value in entry.config.items())

    return dict(sorted(own, key=differences)[0])
