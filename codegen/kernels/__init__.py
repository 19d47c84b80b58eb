"""Kernel families, and the choice between them for one linear operator on one target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, Support
from qcompile.errors import TargetError
from qcompile.targets.target import Target

__all__ = ["CPUS", "Choice", "Tuned", "families", "register_kernel", "select"]

Family = TypeVar("Family", bound=type[LinearKernel])

CPUS = ("x86", "arm")
"""Kinds of targets that run the kernels in `kernels.cpu`."""

TYPICAL_ROWS = (1, 16, 128)
"""Numbers of rows a kernel is chosen for when the number is only known at run time."""


@dataclass(frozen=True)
class Choice:
    """The kernel of one operator.

    Attributes:
        family, config: what to build.
        reason: why this one.
        refused: the families that cannot take the operator, and why not.
    """

    family: LinearKernel
    config: dict[str, Any]
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


class Tuned(Protocol):
    """A database of measured configs."""

    def lookup(self, problem: LinearProblem, target: Target) -> tuple[str, dict[str, Any], str] | None:
        """Name of the best family, its config, and where both come from; None if nothing near is known."""
        ...


_REGISTERED: dict[str, list[type[LinearKernel]]] = {}


def register_kernel(kind: str) -> Callable[[Family], Family]:
    """Decorate a `LinearKernel` that is to be considered for targets of ``kind`` (``x86`` or ``arm``).

    Raises:
        TargetError: programs for such targets are not put together from these kernels, or another family has its name.
    """
    if kind not in CPUS:
        raise TargetError(f"kernels can be added for {' and '.join(CPUS)}, not for {kind}")

    def register(family: Family) -> Family:
        if any(known.name == family.name for known in families(kind)):
            raise TargetError(
                f"a kernel for {kind} is called {family.name!r} already; give {family.__name__} a name of its own"
            )
        _REGISTERED.setdefault(kind, []).append(family)
        families.cache_clear()
        return family

    return register


@functools.cache
def families(kind: str) -> tuple[LinearKernel, ...]:
    """The linear kernel families for targets of ``kind``, the one to prefer among equals first.

    Those of extensions come before those that ship.
    """
    added = tuple(family() for family in _REGISTERED.get(kind, ()))
    if kind == "x86":
        from qcompile.codegen.kernels.x86 import FAMILIES

        return added + tuple(family() for family in FAMILIES)
    if kind == "arm":
        from qcompile.codegen.kernels import arm

        return added + tuple(family() for family in arm.FAMILIES)
    if kind == "cuda":
        from qcompile.codegen.kernels import cuda

        return tuple(family() for family in cuda.FAMILIES)
    return ()


def select(
    problem: LinearProblem,
    target: Target,
    database: Tuned | None = None,
    accept: Callable[[LinearKernel], Support] = lambda family: Support(True),
) -> Choice:
    """Choose a kernel: the tuned one if the database knows one, otherwise the one the cost model expects to be fastest.

    Args:
        problem, target, database: what is wanted, where, and what has been measured.
        accept: a further condition on families.

    Raises:
        TargetError: no family takes the operator; the message gives every family's reason.
    """
    able: dict[str, LinearKernel] = {}
    refused: dict[str, str] = {}
    for family in families(target.kind):
        support = family.supports(problem, target)
        if support and problem.epilogue.codes and not family.stores_codes:
            support = Support(False, f"{family.name} stores float32 results only, no codes")
        support = support and accept(family)
        if support:
            able[family.name] = family
        else:
            refused[family.name] = support.reason
    if not able:
        reasons = "; ".join(refused.values()) or f"there are no linear kernels for {target.kind}"
        raise TargetError(
            f"no kernel on {target} multiplies {problem.weight} weights ({problem.k} x {problem.n}) by "
            f"{problem.activation} activations: {reasons}. Choose another format, or leave this operator in float."
        )
    if database is not None and (found := database.lookup(problem, target)) is not None:
        name, config, source = found
        if name in able:
            return Choice(able[name], config, source, refused)
    ranked = []
    for family in able.values():
        config = family.configs(problem, target)[0]
        rows = (problem.m,) if problem.m is not None else TYPICAL_ROWS
        ranked.append(([family.cost(problem, config, target, m) for m in rows], family, config))
    best = min(ranked, key=lambda entry: sum(cost / least for cost, least in zip(entry[0], _least(ranked))))
    expected = ", ".join(
        f"{1e6 * cost:.0f} us for {m} rows"
        for m, cost in zip((problem.m,) if problem.m is not None else TYPICAL_ROWS, best[0])
    )
    how = "the only family that takes it" if len(able) == 1 else f"expected fastest of {', '.join(able)}"
    return Choice(best[1], best[2], f"{how} ({expected})", refused)


def _least(ranked: list[tuple[list[float], LinearKernel, dict[str, Any]]]) -> list[float]:
    """The lowest cost for each number of rows."""
    return [max(min(costs), 1e-12) for costs in zip(*(costs for costs, _, _ in ranked))]
