"""Measured configs by problem, and the rule where nothing was measured.

``tuned.json`` beside this module, the user's file before it, or the one QCOMPILE_TUNED names instead of both
(`targets.databases`) map ``"sm_90a int4/g128 float16 N K rows"`` to a family and a config; `codegen.tune.cuda` writes them. A shape that was not measured takes the config of the nearest measured one of the same
kind that fits it, and otherwise the one the cost models rank first.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda.linear import CudaLinear
from qcompile.errors import ArtifactError, TargetError
from qcompile.targets import databases
from qcompile.targets.cuda import CudaTarget

FILE = Path(__file__).with_name("tuned.json")

STREAMED, TILED = 64, 16
"""Up to so many rows the streaming kernels are considered, from so many on the tiled ones."""


def table() -> dict[str, dict[str, Any]]:
    """The measured configs, the user's before those that ship; empty if there is no file.

    Raises:
        ArtifactError: a file is no such table.
    """
    if (named := databases.named_by_variable()) is not None:
        return _read(named)
    return {**_read(FILE), **_read(databases.of_user("cuda"))}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return _parsed(path, path.stat().st_mtime_ns) if path.exists() else {}


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, changed: int) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is no table of tuned CUDA kernels: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(e, dict) and "family" in e for e in content.values()):
        raise ArtifactError(f"{path} is no table of tuned CUDA kernels; write one with qcompile tune --target cuda")
    return content


def name(problem: LinearProblem, target: CudaTarget, rows: int, dtype: str) -> str:
    """Key of a measured config."""
    return f"{target.cpu} {problem.weight} {dtype} {problem.n} {problem.k} {rows}"


def choose(
    families: Sequence[CudaLinear], problem: LinearProblem, target: CudaTarget, rows: int, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Name of the family and the config for up to ``rows`` rows."""
    by_name = {family.name: family for family in families}
    wanted = name(problem, target, rows, dtype)
    if (found := table().get(wanted)) and found["family"] in by_name:
        return _split(found)
    head = wanted.split()[:3]
    near = []
    for key, entry in table().items():
        parts = key.split()
        if parts[:3] != head or int(parts[5]) != rows or entry["family"] not in by_name:
            continue
        distance = abs(log2(int(parts[3]) / problem.n)) + abs(log2(int(parts[4]) / problem.k))
        family, config = _split(entry)
        if distance < 1 and by_name[family].fits(by_name[family].shape(problem, config), target):
            near.append((distance, key, family, config))
    if near:
        return min(near)[2:]
    return expected(families, problem, target, rows, dtype)


def expected(
    families: Sequence[CudaLinear], problem: LinearProblem, target: CudaTarget, rows: int, dtype: str
) -> tuple[str, dict[str, Any]]:
    """What the cost models rank first.

    Raises:
        TargetError: no config fits.
    """
    known = replace(problem, m=rows)
    ranked = []
    for family in families:
        fitting = [c for c in family.configs(known, target) if c["dtype"] == dtype]
        if fitting:
            ranked.append((family.cost(known, fitting[0], target, rows), family.name, fitting[0]))
    if not ranked:
        names = ", ".join(family.name for family in families)
        raise TargetError(f"{names} has no config for {rows} rows of {problem.k} x {problem.n} that fits {target.cpu}")
    few = [entry for entry in ranked if "stream" in entry[1]]
    many = [entry for entry in ranked if "tiled" in entry[1]]
    return min((few if rows < TILED else many if rows > STREAMED else ranked) or ranked, key=lambda entry: entry[0])[1:]


def _split(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return entry["family"], {key: value for key, value in entry.items() if key != "family"}
