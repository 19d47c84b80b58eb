"""Compile one kernel and call it on numpy arrays: what tests and benchmarks of x86 kernels share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tvm

from qcompile.targets.target import Target

AVX2 = Target("x86", "x86-64-v3", frozenset({"avx2", "fma"}))
AVX512 = Target("x86", "x86-64-v4", frozenset({"avx2", "fma", "avx512"}))


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as info:
            return next((set(line.split()) for line in info if line.startswith("flags")), set())
    except OSError:
        return set()


TARGETS = [AVX2] + ([AVX512] if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= _cpu_flags() else [])
"""The vector lengths this machine can execute."""


@functools.cache
def compiled(kernel: Any, target: Target) -> Any:
    """The executable function of a kernel."""
    return tvm.compile(tvm.IRModule({"kernel": kernel.build(target, "kernel")}), target=target.tvm())["kernel"]


def run(kernel: Any, target: Target, extents: dict[str, int], *inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Call a kernel on numpy arrays; outputs by name. Output buffers are filled with garbage first."""
    outputs: dict[str, np.ndarray] = {}
    for param in kernel.params:
        if param.output:
            shape = tuple(int(extents[e]) if isinstance(e, str) else e for e in param.shape)
            outputs[param.name] = np.full(shape, 77, param.dtype)
    arrays = [*inputs, *outputs.values()]
    # Numpy's strides of an array without elements are not those the callee checks for.
    compiled(kernel, target)(*(a if a.size else tvm.runtime.empty(a.shape, str(a.dtype)) for a in arrays))
    return outputs


def unaligned(array: np.ndarray, elements: int) -> np.ndarray:
    """The same values at an address ``elements`` elements off an aligned one."""
    base = np.empty(array.size + elements + 16, array.dtype)
    view = base[elements : elements + array.size].reshape(array.shape)
    view[...] = array
    return view
