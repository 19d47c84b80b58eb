"""Which kernel runs a problem: ask every family, take the tuned config or the cheapest, and keep the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem
from qcompile.errors import TargetError
from qcompile.targets.target import Target

TYPICAL_ROWS = (1, 16, 128)
"""Row counts a kernel is judged by when M is known at run time only; their estimated times are added relative to the best."""


@dataclass(frozen=True)
class Choice:
    """The kernel for a problem.

    Attributes:
        family, config: what to build.
        reason: why it was taken.
        refused: families that do not run the problem, with their reasons.
    """

    family: LinearKernel
    config: dict[str, Any]
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


def families(target: Target) -> list[LinearKernel]:
    """All families that generate code for the kind of ``target``."""
    if target.kind == "x86":
        from qcompile.codegen.kernels.x86 import FAMILIES

        return [family() for family in FAMILIES]
    return []


def select(problem: LinearProblem, target: Target, database: Mapping[str, Any] | None = None) -> Choice:
    """Return the kernel that should run ``problem``.

    Args:
        problem: what is to be computed.
        target: where.
        database: tuned configs by `problem_key`; each ``{"family": ..., "config": ...}``.

    Raises:
        TargetError: no family runs it, with every family's reason.
    """
    refused: dict[str, str] = {}
    able: list[LinearKernel] = []
    for family in families(target):
        support = family.supports(problem, target)
        if support:
            able.append(family)
        else:
            refused[family.name] = support.reason
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "there are none"
        raise TargetError(f"no kernel for {target} multiplies {problem.activation} by {problem.weight}: {reasons}")
    tuned = (database or {}).get(problem_key(problem))
    if tuned is not None:
        for family in able:
            if family.name == tuned["family"]:
                return Choice(family, tuned["config"], "tuned", refused)
    rows = (problem.m,) if problem.m else TYPICAL_ROWS
    candidates = [(family, config) for family in able for config in family.configs(problem, target)]
    times = [[family.cost(problem, config, target, m) for m in rows] for family, config in candidates]
    best = [min(column) for column in zip(*times)]
    scores = [sum(t / b for t, b in zip(row, best)) for row in times]
    index = min(range(len(scores)), key=scores.__getitem__)
    family, config = candidates[index]
    others = ", ".join(f.name for f in able if f is not family)
    return Choice(family, config, f"lowest estimated time{f' (also able: {others})' if others else ''}", refused)


def problem_key(problem: LinearProblem) -> str:
    """The key of a problem in a tuned database."""
    e = problem.epilogue
    tail = "+".join(filter(None, ("bias" if e.bias else "", e.activation, "residual" if e.residual else "")))
    return f"{problem.n}x{problem.k} {problem.weight} {problem.activation} {tail or '-'} {problem.threads}t"
