"""``python tests/codegen/cuda/prepare.py [ARCH]``: write the sources of all GPU tests into QCOMPILE_CUDA_CACHE.

``--libraries`` compiles them as well, one process per core; sources that are there already need no TVM. ``--programs``
compiles the programs of the tests.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.cuda import attention, build, cache, quantized_attention, rowwise
from qcompile.kernels import quantizer_source
from qcompile.targets.cuda import TARGETS


def load(name: str) -> Any:
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def prepare(index: int, arch: str, libraries: bool) -> str:
    """One case; the last ones are the row kernels, attention, attention over caches or
    with quantized scores, and the quantizers of the cases."""
    cases, target = load("cases"), TARGETS[arch]
    rest = [
        lambda: rowwise.source(cases.rowwise(target), target),
        lambda: attention.source(cases.ATTENTION, target),
        lambda: cache.source(cases.CACHES, target),
        lambda: quantized_attention.source(cases.QUANTIZED_ATTENTION, target),
        *(lambda k=k: quantized_attention.source({"attention": k}, target) for k in cases.attention_calls()),
        *(lambda q=q: quantizer_source(q, target) for q in cases.quantizers(arch)),
    ]
    linears = [*cases.CASES, *cases.tuned_cases(arch)]
    path = [*(lambda c=c: c.plan(arch).source() for c in linears), *rest][index]()
    return str(build.compile_library(path, target) if libraries else path)


def prepare_programs(arch: str) -> None:
    """Compile the programs of the tests."""
    models = load("models")
    with tempfile.TemporaryDirectory() as folder:
        for name in models.RECIPES:
            out = build.cache_directory() / "programs" / name
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            models.compile_program(name, Path(folder), variant=arch, output=out)
            print(out, flush=True)


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("-")]
    arch, libraries = args[0] if args else "sm_90a", "--libraries" in sys.argv
    cases = load("cases")
    count = (
        len(cases.CASES) + len(cases.tuned_cases(arch)) + len(cases.quantizers(arch)) + 4 + len(cases.attention_calls())
    )
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in pool.map(prepare, range(count), [arch] * count, [libraries] * count):
            print(name, flush=True)
    if "--programs" in sys.argv:
        prepare_programs(arch)


if __name__ == "__main__":
    main()
