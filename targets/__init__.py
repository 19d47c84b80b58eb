"""What a machine can do: instruction sets, legal formats, toolchains, cost models, tuned databases."""

from __future__ import annotations

import contextlib
import os

from qcompile.errors import TargetError
from qcompile.targets.target import Target

__all__ = ["Target", "get_target", "list_targets"]


def list_targets() -> dict[str, Target]:
    """All targets by name; ``native`` is the best one this machine executes, if it is known."""
    from qcompile.targets import x86

    found = dict(x86.TARGETS)
    with contextlib.suppress(TargetError):
        found = {"native": x86.host(), **found}
    return found


def get_target(name: str, cores: int | None = None) -> Target:
    """Return the target called ``name``; ``x86`` is the same as ``native`` on an x86 machine.

    Raises:
        TargetError: the name is unknown, or this machine is none of the known targets.
    """
    from dataclasses import replace

    from qcompile.targets import x86

    count = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if name in ("native", "x86"):
        return x86.host(cores=count)
    if name not in x86.TARGETS:
        raise TargetError(f"unknown target {name!r}; known: native, x86, {', '.join(x86.TARGETS)}")
    return replace(x86.TARGETS[name], cores=count)
