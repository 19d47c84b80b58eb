"""From PrimFuncs to callables: CUDA C++ source, nvcc, a library that tvm_ffi loads. Both steps are cached on disk.

Device code and its host wrapper are one translation unit that needs nothing of TVM at run time but tvm_ffi; it launches
on the stream tvm_ffi takes from torch. Sources are cached apart from libraries: a source generated on one machine is
compiled on another that has nvcc but no TVM.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.errors import TargetError
from qcompile.targets.cuda import CudaTarget

VERSION = 2
"""Counted up whenever generated code changes for the same problem and config."""


def cache_directory() -> Path:
    """Where sources and libraries are kept: ``QCOMPILE_CUDA_CACHE``, or a folder in the user's cache."""
    if path := os.environ.get("QCOMPILE_CUDA_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qcompile" / "cuda"


def key(description: dict[str, Any], target: CudaTarget) -> str:
    """Name of a kernel library, from everything its code depends on."""
    text = json.dumps([VERSION, target.cpu, description], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def generate(functions: dict[str, Any], target: CudaTarget) -> str:
    """CUDA C++ of PrimFuncs by name, with checked host wrappers of the same names."""
    import tvm
    from tvm.backend.cuda import export_cuda_host

    spec = target.tvm()
    with spec, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(tvm.IRModule(functions), target=spec, tir_pipeline="tirx")
    return export_cuda_host(executable.mod)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def source(description: dict[str, Any], make: Callable[[], dict[str, Any]], target: CudaTarget) -> Path:
    """The cached source for ``description``; ``make()`` returns the PrimFuncs by name if it must be generated."""
    path = cache_directory() / f"{key(description, target)}.cu"
    if not path.exists():
        _write(path, generate(make(), target))
    return path


def nvcc() -> str:
    """Path of the CUDA compiler.

    Raises:
        TargetError: there is none.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise TargetError(
            "nvcc is not on the PATH and not under CUDA_HOME; install the CUDA toolkit (13.0 is tested), or compile on a "
            "machine that has it and copy the folder named by QCOMPILE_CUDA_CACHE"
        )
    return found


def compile_library(path: Path, target: CudaTarget) -> Path:
    """Compile a source next to itself, unless that was done before. Returns the shared library.

    Raises:
        TargetError: nvcc is missing or refuses the source.
    """
    import tvm_ffi

    library = path.with_suffix(f".{target.cpu}.so")
    if library.exists():
        return library
    root = Path(tvm_ffi.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder) / "k.so"
        command = [
            nvcc(), "-shared", "-O3", "-std=c++17", "-w", "-Xcompiler", "-fPIC", "-gencode", target.gencode,
            "-Xptxas", "-v", "-I", str(root / "include"), "-I", str(root / "3rdparty/dlpack/include"),
            "-L", str(root / "lib"), "-ltvm_ffi", "-o", str(out), str(path),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"nvcc failed on {path} for {target.cpu}:\n{(done.stderr or done.stdout)[-2000:]}")
        _write(path.with_suffix(f".{target.cpu}.log"), done.stdout + done.stderr)
        os.replace(out, library)
    return library


@functools.cache
def load(library: Path) -> Any:
    """The loaded module; its functions take torch or DLPack tensors."""
    import tvm_ffi

    return tvm_ffi.load_module(str(library))
