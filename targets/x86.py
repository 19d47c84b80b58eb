"""x86 targets: instruction sets by name, what this machine offers, and whether it can run code compiled for another.

Feature names are those kernels ask for with `Target.has`:

    avx2      AVX2                        fma       FMA3               f16c     half precision conversions
    avxvnni   VNNI on 256-bit registers without AVX-512
    avx512    AVX-512 F, BW, CD, DQ, VL   vnni      AVX-512 VNNI
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qcompile.errors import TargetError
from qcompile.targets.target import Target

CPUINFO = {
    "avx2": {"avx2"},
    "fma": {"fma"},
    "f16c": {"f16c"},
    "avxvnni": {"avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "vnni": {"avx512_vnni"},
}
"""The flags of ``/proc/cpuinfo`` that make up each feature."""

_V3 = frozenset({"avx2", "fma", "f16c"})
_V4 = _V3 | {"avx512"}

AVX2 = Target("x86", "x86-64-v3", _V3)
AVXVNNI = Target("x86", "x86-64-v3", _V3 | {"avxvnni"}, attributes=("+avxvnni",))
AVX512 = Target("x86", "x86-64-v4", _V4)
VNNI = Target("x86", "x86-64-v4", _V4 | {"vnni"}, attributes=("+avx512vnni",))

TARGETS: dict[str, Target] = {
    "x86-64-v3": AVX2,
    "x86-64-v3+avxvnni": AVXVNNI,
    "x86-64-v4": AVX512,
    "x86-64-v4+vnni": VNNI,
    "znver4": Target("x86", "znver4", _V4 | {"vnni"}),
    "icelake-server": Target("x86", "icelake-server", _V4 | {"vnni"}),
}
"""Targets by the name a user gives; ``native`` is `host`."""


def cpu_flags(path: str | Path = "/proc/cpuinfo") -> frozenset[str]:
    """The feature flags the operating system reports for the first processor; empty where it reports none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split(":", 1)[1].split()) for line in text.splitlines() if line[:5] == "flags"), frozenset()
    )


def host_features(flags: frozenset[str] | None = None) -> frozenset[str]:
    """The features this machine offers, by the names kernels use."""
    flags = cpu_flags() if flags is None else flags
    return frozenset(name for name, needed in CPUINFO.items() if needed <= flags)


def host(flags: frozenset[str] | None = None, cores: int | None = None) -> Target:
    """The best target of `TARGETS` that this machine executes.

    Args:
        flags: flags as in ``/proc/cpuinfo``; read from there by default.
        cores: number of cores to assume; those this process may use by default.

    Raises:
        TargetError: the machine is not x86 or has no AVX2.
    """
    offered = host_features(flags)
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for target in (VNNI, AVX512, AVXVNNI, AVX2):
        if target.features <= offered:
            return replace(target, cores=cores)
    raise TargetError(
        f"this machine cannot run x86 kernels: it lacks {', '.join(sorted(AVX2.features - offered))}. "
        "Name another target, or compile on a machine with AVX2."
    )


def named(name: str, cores: int = 1) -> Target:
    """The target called ``name`` (one of `TARGETS`, or ``native``).

    Raises:
        TargetError: no such target.
    """
    if name == "native":
        return host()
    if name not in TARGETS:
        raise TargetError(f"unknown x86 target {name!r}; known: native, {', '.join(TARGETS)}")
    return replace(TARGETS[name], cores=cores)


def missing_features(target: Target, flags: frozenset[str] | None = None) -> set[str]:
    """The features code for ``target`` needs and this machine lacks; empty if it can run."""
    return set(target.features - host_features(flags))


def check(target: Target, flags: frozenset[str] | None = None) -> None:
    """Raise unless this machine executes code compiled for ``target``.

    Raises:
        TargetError: names the missing features.
    """
    if missing := missing_features(target, flags):
        raise TargetError(
            f"the program was compiled for {target} and needs {', '.join(sorted(missing))}, which this processor "
            f"lacks; compile it for one of: {', '.join(n for n, t in TARGETS.items() if not missing_features(t, flags))}"
        )
