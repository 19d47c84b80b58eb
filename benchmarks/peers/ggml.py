"""llama.cpp's matrix products, called through ggml's C interface.

The library comes from the ``llama-cpp-python`` package (extra ``peers``), or from a folder that holds ``libggml-base.so``
and ``libggml-cpu.so``. A product is a ggml graph of ``ggml_mul_mat`` nodes, computed by ggml's CPU backend. Weights go to
the buffer type that llama.cpp itself would choose: the repacked layout where the processor and the type have one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "TQ2_0": 35}
"""Members of ``enum ggml_type``."""

BLOCK = {"Q4_0": 32, "Q8_0": 32, "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "TQ2_0": 256}
"""Weights along K in one block of a type; K must be a multiple."""


REPACKED = ("Q4_0", "Q4_K")
"""Types with a repacked layout for AVX2, which needs N to be a multiple of 8; ggml does not check."""


SAMPLE = 64
"""Rows of weights that are really quantized; the rest repeats them."""


class InitParams(Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The functions used here, with their types.

    Args:
        folder: where the libraries lie; by default those of the package ``llama_cpp``.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        if folder is None:
            spec = importlib.util.find_spec("llama_cpp")
            if spec is None or not spec.submodule_search_locations:
                raise FileNotFoundError("llama-cpp-python is not installed")
            folder = Path(spec.submodule_search_locations[0]) / "lib"
        base = ctypes.CDLL(str(Path(folder) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(Path(folder) / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        p, i, n = c_void_p, c_int, c_int64
        signatures = {
            base: {
                "ggml_init": (p, InitParams),
                "ggml_free": (None, p),
                "ggml_new_tensor_2d": (p, p, i, n, n),
                "ggml_mul_mat": (p, p, p, p),
                "ggml_new_graph_custom": (p, p, c_size_t, c_bool),
                "ggml_build_forward_expand": (None, p, p),
                "ggml_backend_alloc_ctx_tensors_from_buft": (p, p, p),
                "ggml_backend_buffer_set_usage": (None, p, i),
                "ggml_backend_buffer_free": (None, p),
                "ggml_backend_tensor_set": (None, p, p, c_size_t, c_size_t),
                "ggml_backend_tensor_get": (None, p, p, c_size_t, c_size_t),
                "ggml_backend_graph_compute": (i, p, p),
                "ggml_backend_buft_name": (c_char_p, p),
                "ggml_backend_get_device": (p, p),
                "ggml_backend_dev_backend_reg": (p, p),
                "ggml_backend_reg_get_proc_address": (p, p, c_char_p),
                "ggml_gallocr_new": (p, p),
                "ggml_gallocr_alloc_graph": (c_bool, p, p),
                "ggml_gallocr_free": (None, p),
                "ggml_quantize_chunk": (c_size_t, i, POINTER(c_float), p, n, n, n, p),
                "ggml_row_size": (c_size_t, i, n),
                "ggml_backend_cpu_buffer_type": (p,),
            },
            cpu: {"ggml_backend_cpu_init": (p,), "ggml_backend_cpu_set_n_threads": (None, p, i)},
        }
        for library, functions in signatures.items():
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()
        registry = self.backend_dev_backend_reg(self.backend_get_device(self.backend))
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_get_device(self.backend))
        self.buffer_types = [self.plain]
        while found and found[len(self.buffer_types) - 1]:
            self.buffer_types.append(found[len(self.buffer_types) - 1])

    def names(self) -> list[str]:
        """Names of the buffer types, the plain one first."""
        return [self.backend_buft_name(b).decode() for b in self.buffer_types]


class Product:
    """``copies`` products of one ``(m, k)`` input with different ``(k, n)`` weights, as one graph.

    Attributes:
        layout: name of the buffer type the weights are in.
    """

    def __init__(self, ggml: Ggml, kind: str, k: int, n: int, m: int, copies: int, repack: bool, seed: int = 0) -> None:
        self.ggml, self.m, self.n, self.copies = ggml, m, n, copies
        few = min(n, SAMPLE)
        sample = np.random.default_rng(seed).normal(size=(few, k)).astype(np.float32)
        row = ggml.row_size(TYPES[kind], k)
        quantized = np.empty((few, row), np.uint8)
        source = sample.ctypes.data_as(POINTER(c_float))
        ggml.quantize_chunk(TYPES[kind], source, quantized.ctypes.data, 0, few, k, None)
        quantized = np.ascontiguousarray(np.tile(quantized, (-(-n // few), 1))[:n])
        room = InitParams((copies + 2) * 4096 + (1 << 20), None, True)
        self.weights, self.work = ggml.init(room), ggml.init(room)
        tensors = [ggml.new_tensor_2d(self.weights, TYPES[kind], k, n) for _ in range(copies)]
        place = ggml.plain
        if repack and kind in REPACKED and n % 8 == 0 and "CPU_REPACK" in ggml.names():
            place = ggml.buffer_types[ggml.names().index("CPU_REPACK")]
        self.layout = ggml.backend_buft_name(place).decode()
        self.buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.weights, place)
        ggml.backend_buffer_set_usage(self.buffer, 1)
        for tensor in tensors:
            ggml.backend_tensor_set(tensor, quantized.ctypes.data, 0, quantized.nbytes)
        self.x = ggml.new_tensor_2d(self.work, TYPES["F32"], k, m)
        self.inputs = ggml.backend_alloc_ctx_tensors_from_buft(self.work, ggml.plain)
        self.graph = ggml.new_graph_custom(self.work, 2 * copies + 8, False)
        self.outputs = [ggml.mul_mat(self.work, tensor, self.x) for tensor in tensors]
        for output in self.outputs:
            ggml.build_forward_expand(self.graph, output)
        self.allocator = ggml.gallocr_new(ggml.plain)
        ggml.gallocr_alloc_graph(self.allocator, self.graph)
        self.set(np.random.default_rng(seed + 1).normal(size=(m, k)))

    def set(self, x: np.ndarray) -> None:
        """Give the input, ``(m, k)``."""
        x = np.ascontiguousarray(x, np.float32)
        self.ggml.backend_tensor_set(self.x, x.ctypes.data, 0, x.nbytes)

    def result(self) -> np.ndarray:
        """The last product, ``(m, n)``."""
        out = np.empty((self.m, self.n), np.float32)
        self.ggml.backend_tensor_get(self.outputs[-1], out.ctypes.data, 0, out.nbytes)
        return out

    def caller(self, threads: int) -> Callable[[], None]:
        """A function that computes all products."""
        ggml, graph = self.ggml, self.graph

        def call() -> None:
            ggml.backend_cpu_set_n_threads(ggml.backend, threads)
            ggml.backend_graph_compute(ggml.backend, graph)

        return call

    def close(self) -> None:
        """Free the memory ggml holds."""
        self.ggml.gallocr_free(self.allocator)
        for buffer in (self.buffer, self.inputs):
            self.ggml.backend_buffer_free(buffer)
        for context in (self.weights, self.work):
            self.ggml.free(context)
