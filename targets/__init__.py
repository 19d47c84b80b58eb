"""What a machine can do: instruction sets, legal formats, toolchains, cost models, tuned databases."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

from qcompile.errors import TargetError
from qcompile.targets.target import Target

__all__ = ["Target", "get_target", "list_targets"]


BOARD_CORES = 4
"""Cores assumed of a machine other than this one."""


def list_targets() -> dict[str, Target]:
    """All targets by name; ``native`` is the best one this machine executes, if it is known."""
    from qcompile.targets import arm, cuda, fpga, x86

    found = {**x86.TARGETS, **arm.TARGETS, **cuda.TARGETS, **fpga.TARGETS}
    for host in (x86.host, arm.host):
        with contextlib.suppress(TargetError):
            found = {"native": host(), **found}
    return found


def get_target(name: str, cores: int | None = None, variant: str | None = None) -> Target:
    """Return the target called ``name``.

    Args:
        name: a name of `list_targets`, or a kind: ``x86`` is this machine where it is one, ``arm`` a Cortex-A76,
            ``cuda`` the first GPU here, ``fpga`` an ECP5.
        cores: cores to assume; by default those this process may use, or `BOARD_CORES` for another machine.
        variant: which machine of that kind (a processor, an architecture, a device).

    Raises:
        TargetError: the name or the variant is unknown, or this machine is none of the known targets.
    """
    from qcompile.targets import arm, cuda, fpga, x86

    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if name == "native" and variant is None:
        return (arm if arm.host_features() else x86).host(cores=cores or here)
    if name == "x86" and variant is None:
        return x86.host(cores=cores or here)
    if name == "arm":
        variant = variant or arm.DEFAULT
    if name == "cuda":
        variant = variant or cuda.host().cpu
    if name == "fpga":
        variant = variant or fpga.DEFAULT
    kinds = {"x86": x86.TARGETS, "arm": arm.TARGETS, "cuda": cuda.TARGETS, "fpga": fpga.TARGETS}
    everything = {**x86.TARGETS, **arm.TARGETS, **cuda.TARGETS, **fpga.TARGETS}
    known = kinds.get(name) if variant else everything
    wanted = variant or name
    if not known or wanted not in known:
        names = known if variant and known else {"native": None, **kinds, **everything}
        raise TargetError(f"unknown target {wanted!r}; known: {', '.join(names)}")
    default = here if known[wanted].kind == "x86" else BOARD_CORES
    return replace(known[wanted], cores=cores or default)
