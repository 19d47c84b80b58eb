"""``python tests/codegen/cuda/prepare.py [ARCH]``: write the sources of all GPU tests into QCOMPILE_CUDA_CACHE.

``python tests/codegen/cuda/prepare.py --compile [ARCH]``: compile every source there, one nvcc per core.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcompile.codegen.kernels.cuda import build
from qcompile.targets.cuda import TARGETS


def main() -> None:
    args = [a for a in sys.argv[1:] if a != "--compile"]
    arch = args[0] if args else "sm_90a"
    if "--compile" in sys.argv:
        files = sorted(build.cache_directory().glob("*.cu"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: build.compile_library(file, TARGETS[arch]), files))
        print(len(files), "libraries")
        return
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    cases = importlib.util.module_from_spec(spec)
    sys.modules["cases"] = cases
    spec.loader.exec_module(cases)
    for case in cases.CASES:
        print(case, case.plan(arch).source(), flush=True)


if __name__ == "__main__":
    main()
