"""Run a compiled program: a Relax VM library and its weights, with the small TVM runtime alone.

The compiler library (about 250 MB) is never loaded here: `tvm_ffi` loads the shared object, and
``libtvm_runtime.so`` brings the virtual machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import ArtifactError, InputError, QcompileError

ALIGNMENT = 64
_loaded = False


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an input or output; a string extent is symbolic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}({', '.join(map(str, self.shape))})"


def load_runtime() -> None:
    """Load ``libtvm_runtime.so`` once. Threads default to all cores, and are not pinned to them."""
    global _loaded
    if _loaded:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TVM_NUM_THREADS", str(cores))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    _import_tvm_ffi()
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise QcompileError("the TVM runtime is not installed; run `pip install apache-tvm==0.27.0.post1`")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = Path(next(iter(spec.submodule_search_locations))) / "lib" / f"libtvm_runtime.{suffix}"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _loaded = True


def _import_tvm_ffi() -> None:
    """Import `tvm_ffi`, which would import torch (seconds) wherever it is installed, without it."""
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        import tvm_ffi

        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        import tvm_ffi  # noqa: F401
    finally:
        del sys.modules["torch"]


def set_threads(count: int) -> None:
    """Use ``count`` threads from now on (at most TVM_NUM_THREADS, which is fixed when the runtime loads)."""
    if count < 1:
        raise InputError(f"the number of threads must be positive, not {count}")
    load_runtime()
    import tvm_ffi

    tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)


def aligned(array: np.ndarray) -> np.ndarray:
    """``array`` itself if contiguous and aligned to 64 bytes, else such a copy."""
    if array.size == 0:
        # numpy gives an array without elements other strides than a compact one has, and programs check them.
        strides = [array.itemsize * math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        return np.lib.stride_tricks.as_strided(np.empty(1, array.dtype), array.shape, strides)
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return array
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Checked:
    """What every loaded program shares: inputs by position or name, and checks of what is passed.

    Args:
        inputs, outputs: what it takes and returns.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Takes the inputs by position or by name, or one mapping, as numpy arrays or torch CPU tensors (shared without
        a copy through DLPack when contiguous and aligned).

        Returns:
            One array, or a tuple if the model has several outputs; torch tensors if any input was one.

        Raises:
            InputError: an input is missing, unknown, or has the wrong dtype or shape.
        """
        results = list(self.run(self._bind(args, kwargs)).values())
        if any(type(v).__module__.startswith("torch") for v in [*args, *kwargs.values()]):
            import torch

            tensors = [torch.from_numpy(r) for r in results]
            return tensors[0] if len(tensors) == 1 else tuple(tensors)
        return results[0] if len(results) == 1 else tuple(results)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            return dict(args[0])
        if len(args) > len(self.inputs):
            raise InputError(f"got {len(args)} inputs, the model takes {len(self.inputs)}: {self._signature()}")
        feeds = dict(zip((s.name for s in self.inputs), args))
        if twice := feeds.keys() & kwargs.keys():
            raise InputError(f"input {sorted(twice)[0]!r} is given twice")
        return {**feeds, **kwargs}

    def check(self, feeds: Mapping[str, Any]) -> list[np.ndarray]:
        """The inputs in order, contiguous and aligned.

        Raises:
            InputError: one is missing, unknown, or has the wrong dtype or shape.
        """
        self._check_names(feeds)
        extents: dict[str, tuple[int, str]] = {}
        arrays = []
        for spec in self.inputs:
            array = _as_numpy(feeds[spec.name], spec)
            check_form(spec, str(array.dtype), array.shape, extents)
            arrays.append(aligned(array))
        return arrays

    def _check_names(self, feeds: Mapping[str, Any]) -> None:
        known = {s.name for s in self.inputs}
        if missing := [s.name for s in self.inputs if s.name not in feeds]:
            raise InputError(f"input {missing[0]!r} is missing; the model takes {self._signature()}")
        if strange := [n for n in feeds if n not in known]:
            raise InputError(f"the model has no input {strange[0]!r}; it takes {self._signature()}")

    def _signature(self) -> str:
        return "; ".join(map(str, self.inputs))


def check_form(spec: TensorSpec, dtype: str, shape: Sequence[int], extents: dict[str, tuple[int, str]]) -> None:
    """Refuse an input of another dtype or shape; ``extents`` are those of inputs before it, by name."""
    if dtype != spec.dtype:
        raise InputError(f"input {spec.name!r} is {dtype}, the model takes {spec}")
    if len(shape) != len(spec.shape):
        raise InputError(f"input {spec.name!r} has shape {tuple(shape)}, the model takes {spec}")
    for axis, (have, want) in enumerate(zip(shape, spec.shape)):
        if isinstance(want, int) and have != want:
            raise InputError(f"input {spec.name!r} has {have} along axis {axis}, the model takes {spec}")
        if isinstance(want, str):
            first, where = extents.setdefault(want, (have, spec.name))
            if first != have:
                raise InputError(f"{want} is {first} in {where!r} but {have} in {spec.name!r}")


_files: dict[str, list[tuple[int, int]]] = {}


def _own_name(path: str) -> str:
    """A name of the file that no other file had in this process.

    The loader takes a path it knows for the library it has, even if another file lies there by now.
    """
    status = os.stat(path)
    known = _files.setdefault(path, [])
    if (status.st_dev, status.st_ino) not in known:
        known.append((status.st_dev, status.st_ino))
    folder, name = os.path.split(path)
    return os.path.join(folder, *["."] * known.index((status.st_dev, status.st_ino)), name)


class Function(Checked):
    """A function of a loaded library.

    Args:
        call: the function of the virtual machine.
        inputs, outputs: what it takes and returns.
        parameters: packed weights, in the order it takes them after the inputs.
        written: names of the inputs it writes to.
    """

    def __init__(
        self,
        call: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        parameters: Sequence[np.ndarray],
        written: Sequence[str] = (),
    ) -> None:
        import tvm_ffi

        super().__init__(inputs, outputs)
        self._call, self.written = call, tuple(written)
        self._parameters = [tvm_ffi.from_dlpack(aligned(p)) for p in parameters]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name."""
        import tvm_ffi

        arrays = self.check(feeds)
        for spec, array in zip(self.inputs, arrays):
            if spec.name not in self.written or not array.size:
                continue
            if not np.may_share_memory(array, _as_numpy(feeds[spec.name], spec)):
                raise InputError(f"{spec.name!r} is written to: pass a C-contiguous array aligned to {ALIGNMENT} bytes")
        try:
            result = self._call(*(tvm_ffi.from_dlpack(a) for a in arrays), *self._parameters)
        except Exception as error:
            shapes = ", ".join(f"{s.name} {a.shape}" for s, a in zip(self.inputs, arrays))
            raise InputError(f"the program failed on inputs of shape {shapes}: {_first_line(error)}") from error
        tensors = [result] if len(self.outputs) == 1 and not isinstance(result, (tuple, list)) else list(result)
        if len(tensors) == 1 and hasattr(tensors[0], "__len__") and not hasattr(tensors[0], "__dlpack__"):
            tensors = list(tensors[0])
        return {spec.name: np.from_dlpack(t) for spec, t in zip(self.outputs, tensors)}


class Program(Function):
    """A loaded program.

    Args:
        library: the shared object with the VM and all kernels.
        inputs, outputs, parameters: of its ``main``.

    Attributes:
        step: of a decoder with a cache, what writes to the arrays of the cache it is called with, in place: they are
            C-contiguous and aligned to 64 bytes, and have room for at least as many positions as ``attention_mask`` is long.

    Raises:
        ArtifactError: the library cannot be loaded.
    """

    step: Function | None = None

    def __init__(
        self,
        library: str | os.PathLike[str],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        parameters: Sequence[np.ndarray],
    ) -> None:
        load_runtime()
        import tvm_ffi

        try:
            module = tvm_ffi.load_module(_own_name(os.path.abspath(library)))
            self._vm = module["vm_load_executable"]()
            self._vm["vm_initialization"](1, 0, 2)  # CPU, device 0, pooled allocator
            main = self._vm["main"]
        except Exception as error:
            raise ArtifactError(f"cannot load {library}: {_first_line(error)}") from None
        super().__init__(main, inputs, outputs, parameters)

    def function(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        parameters: Sequence[np.ndarray],
        written: Sequence[str] = (),
    ) -> Function:
        """Another function of the library; see `Function`.

        Raises:
            ArtifactError: it has none of this name.
        """
        try:
            return Function(self._vm[name], inputs, outputs, parameters, written)
        except Exception as error:
            raise ArtifactError(f"the library has no function {name!r}: {_first_line(error)}") from None


def _as_numpy(value: Any, spec: TensorSpec) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        if hasattr(value, "detach"):
            value = value.detach()
        try:
            return np.from_dlpack(value)
        except (BufferError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(f"input {spec.name!r} cannot be read through DLPack: {_first_line(error)}") from None
    try:
        return np.asarray(value, np.dtype(spec.dtype) if isinstance(value, (list, tuple, int, float)) else None)
    except (TypeError, ValueError) as error:
        raise InputError(f"input {spec.name!r} is not an array: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
