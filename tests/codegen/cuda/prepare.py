"""``python tests/codegen/cuda/prepare.py [ARCH]``: write the sources of all GPU tests into QCOMPILE_CUDA_CACHE.

``--libraries`` compiles them as well, one process per core; sources that are there already need no TVM.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.cuda import attention, build, rowwise
from qcompile.targets.cuda import TARGETS


def load_cases() -> Any:
    """The module with the cases beside this file."""
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    cases = importlib.util.module_from_spec(spec)
    sys.modules["cases"] = cases
    spec.loader.exec_module(cases)
    return cases


def prepare(index: int, arch: str, libraries: bool) -> str:
    """One case; the last two are the row kernels and attention."""
    cases, target = load_cases(), TARGETS[arch]
    rest = [lambda: rowwise.source(cases.ROWWISE, target), lambda: attention.source(cases.ATTENTION, target)]
    path = [*(lambda c=c: c.plan(arch).source() for c in cases.CASES), *rest][index]()
    return str(build.compile_library(path, target) if libraries else path)


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("-")]
    arch, libraries = args[0] if args else "sm_90a", "--libraries" in sys.argv
    count = len(load_cases().CASES) + 2
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in pool.map(prepare, range(count), [arch] * count, [libraries] * count):
            print(name, flush=True)


if __name__ == "__main__":
    main()
