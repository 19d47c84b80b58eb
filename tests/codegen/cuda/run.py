"""Everything that checks the CUDA kernels on a GPU machine, in one command.

    python tests/codegen/cuda/run.py --out docs/cuda-tests.md

generates the sources of all GPU tests (with TVM; without it they must be in QCOMPILE_CUDA_CACHE, see `prepare.py`), compiles
them, runs `pytest -m gpu`, then compute-sanitizer over one launch of every kernel, and writes what came out. Needs nvcc,
torch, pytest; pytest-xdist if it is there. The exit status is 0 if nothing failed.

racecheck does not follow copies announced by `cp.async.mbarrier.arrive` (`announce.cu` shows it), so the kernels that use
it are checked in a copy of the sources where every thread waits for its copies before it arrives: PTX ISA defines the
instruction as doing that in the background.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
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
ANNOUNCED = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
WAITED = "cp.async.wait_all; mbarrier.arrive.shared::cta.b64 _, [%0];"
MODES = ("groups", "stores", "waited", "spoken", "announced", "unwaited")


@dataclass(frozen=True)
class Check:
    """A line of the results."""

    what: str
    outcome: str
    passed: bool


def output(command: Sequence[str], **options: object) -> tuple[int, str]:
    """Exit status and everything printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    return done.returncode, done.stdout


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
    status, text = output(command)
    (log / "prepare.log").write_text(text)
    return Check("sources and libraries", f"{text.count('.so')} compiled" if not status else text[-300:], not status)


def tests(log: Path, processes: int) -> list[Check]:
    """``pytest -m gpu``, by file."""
    report = log / "tests.xml"
    command = [sys.executable, "-m", "pytest", str(HERE), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += [
        "-c",
        str(HERE.parents[2] / "pyproject.toml"),
        "--rootdir",
        str(HERE.parents[2]),
        f"--junitxml={report}",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    status, text = output(command)
    (log / "tests.log").write_text(text)
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


def sanitize(tool: str, kind: str, parts: int, log: Path, cache: Path | None = None) -> Check:
    """A tool over a kind of kernels, in parts side by side."""

    def one(part: int) -> tuple[int, str]:
        where = os.environ | ({"QCOMPILE_CUDA_CACHE": str(cache)} if cache else {})
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return output(
            [*command, sys.executable, str(HERE / "sanitize.py"), f"{part}/{parts}", *kind.split()], env=where
        )

    with ThreadPoolExecutor(parts) as pool:
        results = list(pool.map(one, range(parts)))
    text = "\n".join(r[1] for r in results)
    (log / f"{tool}-{kind or 'all'}{'-waited' if cache else ''}.log").write_text(text)
    done = [re.search(r"(\d+) of \d+ groups of kernels done", r[1]) for r in results]
    what = f"{tool}, {({'barriers': 'kernels with mbarriers', 'rest': 'the other kernels'}).get(kind, 'all kernels')}"
    what += ", copies waited for" if cache else ""
    if not all(done):
        errors = [line for line in text.splitlines() if "Error" in line] or ["did not end"]
        return Check(what, errors[-1][:200], False)
    summary = [int(n) for n in re.findall(r"SUMMARY: (\d+)", text)]
    groups = sum(int(d.group(1)) for d in done if d)
    word = "hazards displayed" if tool == "racecheck" else "errors"
    return Check(what, f"{sum(summary)} {word} in {groups} groups of kernels", not any(r[0] for r in results))


def announcements(log: Path, options: Sequence[str] = ()) -> list[Check]:
    """What racecheck says of the modes of ``announce.cu``; that it reports the race, and that it does not follow announcements."""
    from qcompile.codegen.kernels.cuda import build

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "announce"
        arch = ["-gencode", "arch=compute_90a,code=sm_90a"]
        status, text = output([build.nvcc(), "-std=c++17", *arch, "-o", str(program), str(HERE / "announce.cu")])
        if status:
            return [Check("announce.cu", text[-300:], False)]
        said = []
        for mode in MODES:
            _, text = output(["compute-sanitizer", "--tool", "racecheck", *options, str(program), mode])
            with (log / "announce.log").open("a") as file:
                file.write(f"== {mode} {' '.join(options)}\n{text}\n")
            found = re.search(r"SUMMARY: (\d+) hazard", text)
            right = re.search(r": 0 of \d+ sums wrong", text)
            hazards = f"{found.group(1)} hazards" if found else text[-200:]
            said.append(f"{mode}: {hazards}{'' if right else ', wrong sums'}")
    return [Check("racecheck on announce.cu" + f" {' '.join(options)}" * bool(options), "; ".join(said), True)]


def waited_sources(arch: str) -> Path:
    """A copy of the cached sources whose threads wait for their copies before they announce them, compiled."""
    from qcompile.codegen.kernels.cuda import build
    from qcompile.targets.cuda import TARGETS

    folder = build.cache_directory().with_name(build.cache_directory().name + "-waited")
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for path in build.cache_directory().glob("*.cu"):
        text = path.read_text()
        (folder / path.name).write_text(text.replace(ANNOUNCED, WAITED))
        if ANNOUNCED in text:
            changed.append(folder / path.name)
        else:
            for library in path.parent.glob(f"{path.stem}.*.so"):
                shutil.copy(library, folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda p: build.compile_library(p, TARGETS[arch]), changed))
    return folder


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
    if not args.no_tests:
        note(*tests(log, args.processes))
    if not args.no_sanitizer and shutil.which("compute-sanitizer"):
        note(sanitize("memcheck", "", args.processes, log))
        note(sanitize("racecheck", "rest", args.processes, log))
        if arch == "sm_90a":
            note(*announcements(log))
            note(sanitize("racecheck", "barriers", args.processes, log, waited_sources(arch)))
    print(log)
    sys.exit(not all(c.passed for c in checks))


if __name__ == "__main__":
    main()
