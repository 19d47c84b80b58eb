"""64-bit ARM targets: processors with the features kernels ask for, how to link for them, and how to run them elsewhere.

Feature names:

    neon      128-bit vectors; every 64-bit ARM processor has them
    dotprod   SDOT and UDOT: 16 products of bytes into four int32 lanes
    i8mm      SMMLA, UMMLA, USMMLA: a 2x8 by 8x2 product of bytes into a 2x2 block of int32
    fp16      arithmetic on half precision vectors

SVE is not used: its vectors are 128 bits long on most of the processors that have it.

Sources: Arm Architecture Reference Manual for A-profile, "ID_AA64ISAR0_EL1" (DP) and "ID_AA64ISAR1_EL1" (I8MM); Linux,
Documentation/arch/arm64/elf_hwcaps.rst for the names in /proc/cpuinfo.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.errors import TargetError
from qcompile.targets.target import Target

LINUX, MACOS = "aarch64-linux-gnu", "arm64-apple-macosx12.0"
SYSROOT = Path("/usr/aarch64-linux-gnu")
"""Where Debian's and Ubuntu's cross compilers keep the C library; qemu needs it for programs that are not static."""

DEFAULT = "cortex-a76"

HWCAPS = {"dotprod": "asimddp", "i8mm": "i8mm", "fp16": "asimdhp"}
"""The flag of ``/proc/cpuinfo`` for each feature."""

_V8 = frozenset({"neon"})
_V82 = _V8 | {"dotprod", "fp16"}
_V86 = _V82 | {"i8mm"}


def _cpu(name: str, features: frozenset[str], triple: str = LINUX) -> Target:
    return Target("arm", name, features, triple=triple)


TARGETS: dict[str, Target] = {
    "cortex-a53": _cpu("cortex-a53", _V8),
    "cortex-a57": _cpu("cortex-a57", _V8),
    "cortex-a72": _cpu("cortex-a72", _V8),
    "cortex-a73": _cpu("cortex-a73", _V8),
    "cortex-a55": _cpu("cortex-a55", _V82),
    "cortex-a76": _cpu("cortex-a76", _V82),
    "cortex-a77": _cpu("cortex-a77", _V82),
    "cortex-a78": _cpu("cortex-a78", _V82),
    "cortex-x1": _cpu("cortex-x1", _V82),
    "neoverse-n1": _cpu("neoverse-n1", _V82),
    "neoverse-v1": _cpu("neoverse-v1", _V86),
    "neoverse-n2": _cpu("neoverse-n2", _V86),
    "neoverse-v2": _cpu("neoverse-v2", _V86),
    "cortex-a510": _cpu("cortex-a510", _V86),
    "cortex-a710": _cpu("cortex-a710", _V86),
    "cortex-a720": _cpu("cortex-a720", _V86),
    "ampere1": _cpu("ampere1", _V86),
    "oryon-1": _cpu("oryon-1", _V86),
    "apple-m1": _cpu("apple-m1", _V82, MACOS),
    "apple-m2": _cpu("apple-m2", _V86, MACOS),
    "apple-m3": _cpu("apple-m3", _V86, MACOS),
    "apple-m4": _cpu("apple-m4", _V86, MACOS),
}
"""Targets by the LLVM name of the processor. Raspberry Pi 3: cortex-a53; 4: cortex-a72; 5: cortex-a76. Graviton 2:
neoverse-n1; 3: neoverse-v1; 4: neoverse-v2. Jetson Orin: cortex-a78. Snapdragon X: oryon-1. Ampere Altra: neoverse-n1;
AmpereOne: ampere1."""

COUNTED = {_V8: "cortex-a72", _V82: "cortex-a76", _V86: "neoverse-v1"}
"""Processors whose kernels were tuned by counting instructions. The count depends on what instructions there are, not on how
fast they are, so that it serves all processors with the same features."""

_QEMU = ("cortex-a53", "cortex-a57", "cortex-a72", "cortex-a76", "neoverse-n1")
"""Processors that qemu models by name."""


def host_features(path: str | Path = "/proc/cpuinfo") -> frozenset[str]:
    """The features of this machine; empty if it is no 64-bit ARM machine."""
    if platform.machine() not in ("aarch64", "arm64"):
        return frozenset()
    if sys.platform == "darwin":
        return _V86 if _sysctl("hw.optional.arm.FEAT_I8MM") else _V82
    try:
        text = Path(path).read_text()
    except OSError:
        return _V8
    flags = {
        flag for line in text.splitlines() if line.startswith("Features") for flag in line.split(":", 1)[1].split()
    }
    return _V8 | {name for name, flag in HWCAPS.items() if flag in flags}


def _sysctl(name: str) -> bool:
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "1"


def host(cores: int | None = None) -> Target:
    """The best target of `TARGETS` that this machine executes.

    Raises:
        TargetError: this is no 64-bit ARM machine.
    """
    offered = host_features()
    if not offered:
        raise TargetError(f"this machine ({platform.machine()}) cannot run ARM kernels; name another target")
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    order = ("apple-m2", "apple-m1") if sys.platform == "darwin" else ("neoverse-n2", "cortex-a76", "cortex-a72")
    return replace(next(TARGETS[name] for name in order if TARGETS[name].features <= offered), cores=cores)


@dataclass(frozen=True)
class Compiler:
    """A C compiler for a target.

    Attributes:
        command: how it is called; arguments follow.
        static: arguments that make an executable which needs no libraries.
        name: what to call it in messages.
    """

    command: tuple[str, ...]
    static: tuple[str, ...]
    name: str

    def run(self, *arguments: str | os.PathLike[str]) -> None:
        """Compile or link.

        Raises:
            TargetError: the compiler failed; the message ends with what it printed.
        """
        done = subprocess.run(
            [*self.command, *(os.fspath(a) for a in arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise TargetError(f"{self.name} failed:\n{(done.stderr or done.stdout)[-2000:]}")

    def shared(self, output: str | os.PathLike[str], objects: Sequence[str | os.PathLike[str]], apple: bool) -> None:
        """Link a shared library whose undefined symbols are resolved when it is loaded.

        Raises:
            TargetError: linking failed.
        """
        flags = ["-Wl,-undefined,dynamic_lookup"] if apple else ["-Wl,--build-id=none"]
        self.run("-shared", "-fPIC", "-s", *flags, "-o", output, *objects)


def compiler(target: Target) -> Compiler:
    """The C compiler to use for ``target``: the machine's own on ARM, else ziglang, else a GNU cross compiler.

    Raises:
        TargetError: there is none.
    """
    apple = "apple" in target.triple
    native = platform.machine() in ("aarch64", "arm64") and apple == (sys.platform == "darwin")
    if native and (cc := shutil.which("cc")):
        return Compiler((cc,), () if apple else ("-static",), "cc")
    gnu = shutil.which("aarch64-linux-gnu-gcc")
    if gnu and not apple:
        return Compiler((gnu,), ("-static",), "aarch64-linux-gnu-gcc")
    if importlib.util.find_spec("ziglang") is not None:
        return _zig("aarch64-macos" if apple else "aarch64-linux-gnu.2.28")
    other = "" if apple else ", or a cross compiler (`apt install gcc-aarch64-linux-gnu`)"
    raise TargetError(f"linking for {target} needs a compiler: `pip install ziglang`{other}")


def static_compiler(target: Target) -> Compiler:
    """A compiler that makes static executables for Linux.

    Raises:
        TargetError: there is none.
    """
    found = compiler(target)
    # zig refuses to link glibc statically; its musl can be.
    return _zig("aarch64-linux-musl") if found.name == "ziglang" else found


def _zig(triple: str) -> Compiler:
    return Compiler((sys.executable, "-m", "ziglang", "cc", "-target", triple), ("-static",), "ziglang")


def emulator(target: Target) -> tuple[str, ...]:
    """Command that runs a Linux executable for ``target`` on this machine; empty on an ARM machine.

    Raises:
        TargetError: qemu is missing, or the program is not for Linux.
    """
    if "linux" not in target.triple:
        raise TargetError(f"programs for {target} run on macOS only")
    if platform.machine() == "aarch64":
        return ()
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise TargetError("running ARM programs here needs qemu-aarch64 (`apt install qemu-user`)")
    root = ("-L", str(SYSROOT)) if SYSROOT.is_dir() else ()
    # "max" has every extension; a named model shows that a program keeps to what its target has.
    alike = {_V8: "cortex-a72", _V82: "cortex-a76"}.get(target.features, "max")
    return (qemu, *root, "-cpu", target.cpu if target.cpu in _QEMU else alike)


def linux(target: Target) -> Target:
    """The same processor under Linux, whose programs can be emulated."""
    return replace(target, triple=LINUX)


def missing_features(features: frozenset[str] | set[str]) -> set[str]:
    """The features this machine lacks; all of them if it is no ARM machine."""
    return set(features) - host_features()
