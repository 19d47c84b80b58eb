"""Measured configs by problem, and the rule where nothing was measured.

``tuned.json`` beside this module maps ``"sm_90a cuda-stream int4/g128 float16 N K rows"`` to a config; it is written by
``benchmarks/cuda_gemm.py --tune``. A shape that was not measured takes the config of the nearest measured one of the
same kind that fits it, and otherwise the one the cost model ranks first.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda.stream import StreamLinear
from qcompile.targets.cuda import CudaTarget

FILE = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The measured configs; empty if there is no file."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def name(family: StreamLinear, problem: LinearProblem, target: CudaTarget, rows: int, dtype: str) -> str:
    """Key of a measured config."""
    return f"{target.cpu} {family.name} {problem.weight} {dtype} {problem.n} {problem.k} {rows}"


def lookup(family: StreamLinear, problem: LinearProblem, target: CudaTarget, rows: int, dtype: str) -> dict[str, Any]:
    """The config for up to ``rows`` rows."""
    wanted = name(family, problem, target, rows, dtype)
    if wanted in table():
        return dict(table()[wanted])
    head = wanted.split()[:4]
    near = []
    for key, config in table().items():
        parts = key.split()
        if parts[:4] != head or int(parts[6]) != rows:
            continue
        n, k = int(parts[4]), int(parts[5])
        distance = abs(log2(n / problem.n)) + abs(log2(k / problem.k))
        if distance < 2 and family._fits(family.shape(problem, config), target):
            near.append((distance, key, config))
    if near:
        return dict(min(near)[2])
    known = replace(problem, m=rows)
    return next(c for c in family.configs(known, target) if c["dtype"] == dtype)
