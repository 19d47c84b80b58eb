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


def get_target(name: str, cores: int | None = None, variant: str | None = None) -> Target:
    """Return the target called ``name``; ``x86`` is the same as ``native`` on an x86 machine.

    Args:
        name: a name of `list_targets`, or a kind.
        cores: cores to assume; those this process may use by default.
        variant: which machine of that kind (a processor, an architecture, a device).

    Raises:
        TargetError: the name or the variant is unknown, or this machine is none of the known targets.
    """
    from dataclasses import replace

    from qcompile.targets import x86

    count = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if name in ("native", "x86") and variant is None:
        return x86.host(cores=count)
    wanted = variant if name == "x86" and variant else name
    if wanted not in x86.TARGETS or (variant and name != "x86"):
        raise TargetError(f"unknown target {wanted!r}; known: native, x86, {', '.join(x86.TARGETS)}")
    return replace(x86.TARGETS[wanted], cores=count)
