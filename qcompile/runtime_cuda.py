"""Run a program compiled for CUDA on torch tensors.

The Relax virtual machine allocates from a pool of its own and launches on torch's current stream. After a first call with
the same shapes nothing is allocated from the driver, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.errors import ArtifactError, InputError
from qcompile.runtime import Checked, TensorSpec, check_form, load_runtime

CPU, CUDA, POOLED = 1, 2, 2
"""Device types of DLPack; the kind of allocator."""

_loaded = False


def load_cuda_runtime() -> None:
    """Load TVM's run-time with its CUDA device, once; its libraries are those torch has loaded."""
    global _loaded
    if _loaded:
        return
    torch.cuda.init()
    load_runtime()
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.submodule_search_locations
    library = Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"TVM's CUDA run-time cannot be loaded: {error}") from None
    _loaded = True


class CudaProgram(Checked):
    """A loaded program on torch's current device.

    Args:
        library: folder with ``model.so`` and ``kernels.so``.
        parameters: weights as arrays, scratch as ``(shape, dtype)``, in the order the program takes them.
        inputs, outputs: what it takes and returns.

    Raises:
        ArtifactError: a library cannot be loaded.
    """

    def __init__(
        self, library: Path, parameters: Sequence[Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        load_cuda_runtime()
        import tvm_ffi

        super().__init__(inputs, outputs)
        self.device = torch.device("cuda", torch.cuda.current_device())
        try:
            module = tvm_ffi.load_module(str(library / "model.so"))
            module.import_module(tvm_ffi.load_module(str(library / "kernels.so")))
            self._vm = module["vm_load_executable"]()
            index = self.device.index
            self._vm["vm_initialization"](CUDA, index, POOLED, CPU, 0, POOLED)
            self._main = self._vm["main"]
        except Exception as error:
            raise ArtifactError(f"cannot load {library}: {str(error).strip().splitlines()[-1]}") from None
        self._tensors = [self._parameter(p) for p in parameters]
        self._parameters = [tvm_ffi.from_dlpack(t) for t in self._tensors]

    def _parameter(self, value: Any) -> torch.Tensor:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value)).to(self.device)
        shape, dtype = value
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on inputs by position or by name, or one mapping: torch tensors or numpy arrays.

        Returns:
            One tensor, or a tuple if the model has several outputs: CUDA tensors if an input was one, else arrays.

        Raises:
            InputError: an input is missing, unknown, or has the wrong dtype or shape.
        """
        feeds = self._bind(args, kwargs)
        results = list(self.run_torch(feeds).values())
        if not any(isinstance(v, torch.Tensor) for v in feeds.values()):
            arrays = [r.cpu().numpy() for r in results]
            return arrays[0] if len(arrays) == 1 else tuple(arrays)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name, as numpy arrays."""
        return {name: tensor.cpu().numpy() for name, tensor in self.run_torch(feeds).items()}

    def run_torch(self, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run with inputs by name; returns every output by name, as tensors on the device."""
        import tvm_ffi

        tensors = self._placed(feeds)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", self.device.index), stream):
            try:
                result = self._main(*(tvm_ffi.from_dlpack(t) for t in tensors), *self._parameters)
            except Exception as error:
                shapes = ", ".join(f"{s.name} {tuple(t.shape)}" for s, t in zip(self.inputs, tensors))
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"the program failed on inputs of shape {shapes}: {reason}") from error
            found = [result] if hasattr(result, "__dlpack__") else list(result)
            return {spec.name: torch.from_dlpack(t) for spec, t in zip(self.outputs, found)}

    def _placed(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        """The inputs in order on the device, as `Checked.check`."""
        self._check_names(feeds)
        extents: dict[str, tuple[int, str]] = {}
        found = []
        for spec in self.inputs:
            value = feeds[spec.name]
            tensor = (
                value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            )
            check_form(spec, str(tensor.dtype).removeprefix("torch."), tensor.shape, extents)
            found.append(tensor.to(self.device).contiguous())
        return found
