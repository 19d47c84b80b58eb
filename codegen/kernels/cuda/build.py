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
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import TargetError
from qcompile.targets import folders
from qcompile.targets.cuda import CudaTarget

VERSION = 12
"""Counted up whenever generated code changes for the same problem and config."""


def cache_directory() -> Path:
    """Where sources and libraries are kept: ``QCOMPILE_CUDA_CACHE``, or a folder in the user's cache."""
    if path := os.environ.get("QCOMPILE_CUDA_CACHE"):
        return Path(path)
    return folders.cache() / "cuda"


def key(description: dict[str, Any], target: CudaTarget) -> str:
    """Name of a kernel library, from everything its code depends on."""
    text = json.dumps([VERSION, target.cpu, description], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


WAIT = "griddepcontrol.wait"
"""What a kernel executes that is launched before the ones before it in the stream have ended (programmatic dependent launch,
CUDA C++ Programming Guide)."""

STREAM = "  cuda_config.stream = cuda_stream;\n"

ATTRIBUTE = """  cudaLaunchAttribute cuda_overlap = {};
  cuda_overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  cuda_overlap.val.programmaticStreamSerializationAllowed = 1;
  cuda_config.attrs = &cuda_overlap;
  cuda_config.numAttrs = 1;
"""


def _overlap(text: str) -> str:
    """Launch the kernels that wait for those before them without waiting."""
    if WAIT not in text:
        return text
    helper = re.search(rf"(\w+)\(\) \{{[^}}]*{WAIT}", text)
    assert helper is not None
    parts = re.split(r"(?=tvm_cuda_host_launch\(::)", text)
    for i, part in enumerate(parts[1:]):
        name = re.match(r"tvm_cuda_host_launch\(::(\w+)", part)
        assert name is not None
        start = text.index("{", text.index(f" {name[1]}(", text.index(f" {name[1]}(") + 1))
        end = text.find('extern "C" __global__', start)
        if f"{helper[1]}()" in text[start:end]:
            before, after = parts[i].rsplit(STREAM, 1)
            parts[i] = before + STREAM + ATTRIBUTE + after
    return "".join(parts)


TENSOR_MAPS = """
// The driver is asked for when a kernel that needs it is called: libraries load without one.
template <typename... Args>
static CUresult encode_tensor_map(Args... args) {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function ? function(args...) : CUDA_ERROR_NOT_SUPPORTED;
}
static void describe_error(CUresult, const char**) {}
#define cuTensorMapEncodeTiled encode_tensor_map
#define cuGetErrorString describe_error
"""

HOST = "#include <cuda_runtime.h>\n"


def _tensor_maps(text: str) -> str:
    """Look the driver's function up instead of linking to it."""
    if "cuTensorMapEncodeTiled" not in text:
        return text
    assert HOST in text
    return text.replace(HOST, HOST + TENSOR_MAPS, 1)


def generate(functions: dict[str, Any], target: CudaTarget) -> str:
    """CUDA C++ of PrimFuncs by name, with checked host wrappers of the same names."""
    import tvm
    from tvm.backend.cuda import export_cuda_host

    spec = target.tvm()
    with spec, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(tvm.IRModule(functions), target=spec, tir_pipeline="tirx")
    return export_cuda_host(executable.mod)


def generate_scheduled(functions: dict[str, Any], target: CudaTarget) -> str:
    """Like `generate`, for PrimFuncs scheduled with loops bound to threads."""
    import tvm
    from tvm.backend.cuda import export_cuda_host

    spec = target.tvm()
    with spec, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(tvm.IRModule(functions), target=spec)
    return export_cuda_host(executable.mod)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def place(description: dict[str, Any], target: CudaTarget) -> Path:
    """Where the source for ``description`` is cached."""
    return cache_directory() / f"{key(description, target)}.cu"


def source(
    description: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    target: CudaTarget,
    tail: str = "",
    resident: Mapping[str, int] | None = None,
    clusters: Mapping[str, int | tuple[int, int]] | None = None,
) -> Path:
    """The cached source for ``description``; ``make()`` returns the PrimFuncs by name if it must be generated.

    Args:
        tail: C++ that follows, and follows from the description.
        resident: blocks of a kernel that are to fit a multiprocessor, by name: nvcc then bounds registers.
        clusters: blocks along x and y that are a cluster, or along y, by name of the kernel.
    """
    path = place(description, target)
    if not path.exists():
        from qcompile.codegen.kernels.cuda import emit

        with emit.overlapping(target.has("pdl")):
            functions = make()
        text = _tensor_maps(_overlap(generate(functions, target)))
        for name, blocks in (resident or {}).items():
            bounds = rf"__launch_bounds__\((\d+)\)( {name}_kernel\()"
            text = re.sub(bounds, rf"__launch_bounds__(\1, {blocks})\2", text)
        for name, size in (clusters or {}).items():
            x, y = size if isinstance(size, tuple) else (1, size)
            text, places = re.subn(
                rf"(?=__launch_bounds__\([^)]*\) {name}_kernel\()", f"__cluster_dims__({x}, {y}, 1) ", text
            )
            assert places, f"{name} adds up across a cluster it is not launched in"
        _write(path, text + tail)
    return path


def dispatch(name: str, choices: Sequence[tuple[int, str]]) -> str:
    """C++ of a function ``name`` that calls the first function of ``(most rows, function)`` that takes the rows of its first
    argument; the last one takes any number, and no rows need no call."""
    tests = "".join(
        f"  if (rows <= {rows}) return __tvm_ffi_{f}(self, args, count, result);\n" for rows, f in choices[:-1]
    )
    return f"""
extern "C" TVM_DLL int32_t __tvm_ffi_{name}(void* self, void* args, int32_t count, void* result) {{
  const TVMFFIAny* given = static_cast<const TVMFFIAny*>(args);
  const char* place = static_cast<const char*>(given[0].v_ptr);
  const DLTensor* x = reinterpret_cast<const DLTensor*>(
      given[0].type_index == kTVMFFITensor ? place + sizeof(TVMFFIObject) : place);
  const int64_t rows = x->shape[0];
  if (rows == 0) return 0;
{tests}  return __tvm_ffi_{choices[-1][1]}(self, args, count, result);
}}
"""


def text_source(text: str, target: CudaTarget) -> Path:
    """A source under a name made from its contents."""
    path = cache_directory() / f"{key({'text': text}, target)}.cu"
    if not path.exists():
        _write(path, text)
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


def compile_object(path: Path, target: CudaTarget) -> Path:
    """Compile a source next to itself, unless that was done before. Returns the object file.

    Raises:
        TargetError: nvcc is missing or refuses the source.
    """
    import tvm_ffi

    result = path.with_suffix(f".{target.cpu}.o")
    if result.exists():
        return result
    root = Path(tvm_ffi.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder) / "k.o"
        log = _run(
            [
                nvcc(), "-c", "-O3", "-std=c++17", "-w", "-Xcompiler", "-fPIC", "-gencode", target.gencode,
                "-Xptxas", "-v", "-I", str(root / "include"), "-I", str(root / "3rdparty/dlpack/include"),
                "-o", str(out), str(path),
            ]
        )  # fmt: skip
        _write(path.with_suffix(f".{target.cpu}.log"), log)
        os.replace(out, result)
    return result


def link(objects: Sequence[Path], out: Path) -> None:
    """Link objects into a shared library that needs tvm_ffi and the driver.

    Raises:
        TargetError: nvcc is missing or fails.
    """
    import tvm_ffi

    library = Path(tvm_ffi.__file__).parent / "lib"
    # Every source brings the same helper functions.
    options = ["-Xlinker", "-s", "-Xlinker", "--allow-multiple-definition"]
    _run([nvcc(), "-shared", *options, "-o", str(out), *map(str, objects), "-L", str(library), "-ltvm_ffi"])


def compile_library(path: Path, target: CudaTarget) -> Path:
    """Compile a source to a shared library next to it, unless that was done before.

    Raises:
        TargetError: nvcc is missing or refuses the source.
    """
    library = path.with_suffix(f".{target.cpu}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            out = Path(folder) / "k.so"
            link([compile_object(path, target)], out)
            os.replace(out, library)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"nvcc failed on {command[-1]}:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout + done.stderr


@functools.cache
def load(library: Path) -> Any:
    """The loaded module; its functions take torch or DLPack tensors."""
    import tvm_ffi

    return tvm_ffi.load_module(str(library))
