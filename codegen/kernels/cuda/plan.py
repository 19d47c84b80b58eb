"""Which kernels a linear operator gets: one per bucket of rows, in one library, over one packed copy of the weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda import FAMILIES, build, tuned
from qcompile.codegen.kernels.cuda.layout import FragmentLayout
from qcompile.codegen.kernels.cuda.linear import CudaLinear, LinearShape, activation_type
from qcompile.errors import TargetError
from qcompile.formats import Quantized
from qcompile.targets.cuda import CudaTarget

ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
"""Buckets: rows the kernels are written for; the last one takes any number."""

OPTIONAL = ("overlap", "cluster", "ring", "resident", "early", "late", "bulk")
"""Keys of configs that may be left out."""


@dataclass(frozen=True)
class Entry:
    """One kernel: the rows it is meant for, and what to build."""

    rows: int
    family: str
    config: dict[str, Any]

    @property
    def symbol(self) -> str:
        """Its function in the library."""
        return f"rows{self.rows}"


@dataclass(frozen=True)
class Plan:
    """The kernels of a linear operator."""

    problem: LinearProblem
    entries: tuple[Entry, ...]
    target: CudaTarget

    def describe(self) -> dict[str, Any]:
        """Everything the generated code depends on, JSON-serialisable."""
        p = self.problem
        order = {"order": "pairs"} if any(plane.pairs for plane in self._layouts()) else {}
        return order | {
            "target": self.target.cpu,
            "k": p.k,
            "n": p.n,
            "weight": str(p.weight),
            "activation": str(p.activation),
            "epilogue": asdict(p.epilogue),
            "entries": [asdict(entry) for entry in self.entries],
        }

    def _layouts(self) -> list[FragmentLayout]:
        shape = self.shape()
        return [shape.layout] if isinstance(shape, LinearShape) else []

    @property
    def name(self) -> str:
        """A symbol that no other plan has."""
        return f"linear_{self.problem.n}x{self.problem.k}_{build.key(self.describe(), self.target)[:8]}"

    def functions(self, prefix: str = "") -> dict[str, Any]:
        """The PrimFuncs by name."""
        names = {prefix + e.symbol: e for e in self.entries}
        return {n: family(e.family).build(self.problem, e.config, self.target, n) for n, e in names.items()}

    def clusters(self, prefix: str = "") -> dict[str, tuple[int, int]]:
        """Blocks along x and y of the clusters of those that are launched in clusters, by name."""
        found = {prefix + e.symbol: self.shape(i) for i, e in enumerate(self.entries) if e.config.get("cluster")}
        return {name: shape.blocks_of_cluster for name, shape in found.items() if shape.cluster}

    def resident(self, prefix: str = "") -> dict[str, int]:
        """Blocks that are to fit a multiprocessor, of those whose config says so, by name."""
        return {prefix + e.symbol: e.config["resident"] for e in self.entries if e.config.get("resident")}

    def source(self) -> Path:
        """The CUDA source; generated with TVM unless it is in the cache."""
        return build.source(
            self.describe(), self.functions, self.target, resident=self.resident(), clusters=self.clusters()
        )

    def library_path(self) -> Path:
        """Where `library` puts its result."""
        return build.place(self.describe(), self.target).with_suffix(f".{self.target.cpu}.so")

    def library(self) -> Path:
        """The compiled library; see `build.compile_library` for errors."""
        return build.compile_library(self.source(), self.target)

    def pack(self, weight: Quantized) -> dict[str, np.ndarray]:
        """The arrays all kernels read."""
        first = self.entries[0]
        return family(first.family).pack(self.problem, first.config, weight)

    def shape(self, index: int = 0) -> Any:
        """The `LinearShape` of a kernel."""
        entry = self.entries[index]
        return family(entry.family).shape(self.problem, entry.config)

    def scratch(self) -> tuple[int, int]:
        """Elements of ``partial`` and ``arrived`` that are enough for every bucket but the last, which takes any rows."""
        sizes = [family(e.family).scratch(self.problem, e.config, e.rows) for e in self.entries]
        return max(s[0] for s in sizes), max(s[1] for s in sizes)


@functools.cache
def family(name: str) -> CudaLinear:
    """The kernel family called ``name``."""
    return next(cls() for cls in FAMILIES if cls.name == name)


def make_plan(
    problem: LinearProblem,
    target: CudaTarget,
    dtype: str,
    out: str,
    rows: Sequence[int] = ROWS,
    configs: Mapping[int, Mapping[str, Any]] | None = None,
) -> Plan:
    """Choose kernels; needs neither GPU nor TVM.

    Args:
        dtype: of float activations, ``float16`` or ``bfloat16``.
        out: type of the result: that, or ``float32``.
        rows: numbers of rows to have a kernel for; more rows than the largest are several blocks.
        configs: by rows, ``family`` and config entries to use instead of the tuned or expected best ones. Families of the
            packing of the first one named are considered.

    Raises:
        TargetError: no family takes the formats on this target, or the one that was named does not, or its kernel cannot have such a config.
    """
    able, reasons = [], []
    for candidate in (family(cls.name) for cls in FAMILIES):
        support = candidate.supports(problem, target)
        able += [candidate] if support else []
        reasons += [] if support else [support.reason]
    if not able:
        raise TargetError(
            f"no CUDA kernel multiplies {problem.weight} weights ({problem.k} x {problem.n}) by {problem.activation} "
            f"activations: {'; '.join(reasons)}"
        )
    asked = {str(given["family"]) for given in (configs or {}).values() if "family" in given}
    packing = next((c.packing for c in able if c.name in asked), able[0].packing)
    able = [c for c in able if c.packing == packing]
    kind = activation_type(problem.activation, dtype)
    entries = []
    for count in rows:
        given = dict((configs or {}).get(count, {}))
        only = given.pop("family", None)
        wanted = [c for c in able if only in (None, c.name)]
        if not wanted:
            names = ", ".join(c.name for c in able)
            raise TargetError(
                f"no family {only!r} of {target.cpu} takes {problem.weight} for {count} rows; there are: {names}"
            )
        name, config = tuned.choose(wanted, problem, target, count, kind)
        if (configs or {}).get(count, {}).get("family"):  # what it leaves out is off
            config = {key: value for key, value in config.items() if key not in OPTIONAL}
        entry = Entry(count, name, {**config, **given, "out": out})
        if reason := family(name).unsound(family(name).shape(problem, entry.config)):
            raise TargetError(f"{name} for {count} rows of {problem.k} x {problem.n} cannot have {reason}")
        entries.append(entry)
    return Plan(problem, tuple(entries), target)
