"""Everything that checks the CUDA kernels on a GPU machine, in one command.

    python tests/codegen/cuda/run.py --out docs/cuda-tests.md

generates the sources of all GPU tests (with TVM; without it they must be in QCOMPILE_CUDA_CACHE, see `prepare.py`), compiles
them, runs `pytest -m gpu`, then compute-sanitizer over one launch of every kernel, and writes what came out. Needs nvcc,
torch, pytest; pytest-xdist if it is there. The exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Check:
    """A line of the results."""

    what: str
    outcome: str
    passed: bool


def output(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and everything printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def logged(command: Sequence[str], log: Path) -> tuple[int, str]:
    """The same, in a file as it is printed: what a run that was cut off leaves."""
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    return status, log.read_text(errors="replace")


def versions() -> list[str]:
    """Of what matters."""
    import torch
    import tvm_ffi

    from qcompile.codegen.kernels.cuda import build

    tvm = "no TVM (sources prepared elsewhere)"
    if importlib.util.find_spec("tvm.backend"):
        import tvm as module

        tvm = f"TVM {module.__version__}"
    driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])[1].split("\n")[0]
    toolkit = re.search(r"release ([\d.]+)", output([build.nvcc(), "--version"])[1])
    return [
        f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {toolkit.group(1) if toolkit else '?'}",
        f"torch {torch.__version__}, tvm-ffi {tvm_ffi.__version__}, {tvm}, Python {platform.python_version()}",
    ]


def prepare(arch: str, log: Path) -> Check:
    """Sources and libraries."""
    command = [sys.executable, str(HERE / "prepare.py"), "--libraries", arch]
    status, text = logged(command, log / "prepare.log")
    return Check("sources and libraries", f"{text.count('.so')} compiled" if not status else text[-300:], not status)


def tests(log: Path, processes: int) -> list[Check]:
    """``pytest -m gpu``, by file."""
    report = log / "tests.xml"
    files = sorted(str(path) for path in HERE.glob("test_gpu*.py"))
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-v", "--durations=40", "-p", "no:cacheprovider"]
    command += [
        "-c",
        str(HERE.parents[2] / "pyproject.toml"),
        "--rootdir",
        str(HERE.parents[2]),
        f"--junitxml={report}",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    status, text = logged(command, log / "tests.log")
    if not report.exists():
        return [Check("tests", text[-300:], False)]
    found: dict[str, list[int]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        count = found.setdefault(case.get("classname", "").rsplit(".", 1)[-1], [0, 0, 0])
        failed = case.find("failure") is not None or case.find("error") is not None
        count[1 if failed else 2 if case.find("skipped") is not None else 0] += 1
    return [
        Check(f"{name}.py", f"{good} passed, {bad} failed" + f", {skipped} skipped" * bool(skipped), not bad)
        for name, (good, bad, skipped) in sorted(found.items())
    ] + ([] if status == 0 or any(v[1] for v in found.values()) else [Check("pytest", text[-300:], False)])


def sanitize(tool: str, parts: int, log: Path) -> Check:
    """A tool over all kernels, in parts side by side."""

    def one(part: int) -> tuple[int, str]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return output([*command, sys.executable, str(HERE / "sanitize.py"), f"{part}/{parts}"])

    with ThreadPoolExecutor(parts) as pool:
        results = list(pool.map(one, range(parts)))
    text = "\n".join(r[1] for r in results)
    (log / f"{tool}.log").write_text(text)
    done = [re.search(r"(\d+) of \d+ groups of kernels done", r[1]) for r in results]
    if not all(done):
        errors = [line for line in text.splitlines() if "Error" in line] or ["did not end"]
        return Check(tool, errors[-1][:200], False)
    summary = [int(n) for n in re.findall(r"SUMMARY: (\d+)", text)]
    groups = sum(int(d.group(1)) for d in done if d)
    word = "hazards displayed" if tool == "racecheck" else "errors"
    return Check(tool, f"{sum(summary)} {word} in {groups} groups of kernels", not any(r[0] for r in results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the results, Markdown")
    parser.add_argument("--log", type=Path, help="folder for the complete output")
    parser.add_argument("--processes", type=int, default=8, help="that test or sanitize at a time")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    args = parser.parse_args()
    log = args.log or Path(tempfile.mkdtemp(prefix="qcompile-gpu-"))
    log.mkdir(parents=True, exist_ok=True)
    import torch

    from qcompile.targets.cuda import for_capability

    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here")
    arch = for_capability(*torch.cuda.get_device_capability()).cpu
    start, checks = time.monotonic(), []
    lines = [f"# CUDA tests\n\n{datetime.date.today()}", *(f"* {line}" for line in versions())]

    def note(*found: Check) -> None:
        checks.extend(found)
        for c in found:
            print(
                f"[{time.monotonic() - start:4.0f} s] {'ok    ' if c.passed else 'FAILED'} {c.what}: {c.outcome}",
                flush=True,
            )
        table = [f"| {c.what} | {'' if c.passed else '**failed** '}{c.outcome} |" for c in checks]
        text = "\n".join([lines[0], "", *lines[1:], "", "| | |", "|---|---|", *table, ""])
        (log / "results.md").write_text(text)
        if args.out:
            args.out.write_text(text)

    note(prepare(arch, log))
    sanitizer = not args.no_sanitizer and shutil.which("compute-sanitizer")
    if not sanitizer and not args.no_sanitizer:
        note(Check("compute-sanitizer", "not on the PATH; --no-sanitizer leaves it out", False))
    if not args.no_tests:
        note(*tests(log, args.processes))
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            note(sanitize(tool, args.processes, log))
    print(log)
    sys.exit(not all(c.passed for c in checks))


if __name__ == "__main__":
    main()
