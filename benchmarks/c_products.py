"""Products of our kernels called one after the other from C, as programs exported as C libraries call them.

The peers' graphs are computed by one call; a Python call for each of our products would add its own time, 0.3 us and more.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.codegen.cexport.extents import evaluate
from qcompile.codegen.cexport.kernels import Kernel, build_object
from qcompile.targets.target import Target

Call = Callable[[], None]


class CProducts:
    """A quantizer and a kernel of one thread, ``m`` rows, and their calls for several weights.

    Args:
        functions: PrimFuncs ``quantize`` (rows, codes, scale) and ``gemm`` (codes, scale, weights, out).
    """

    def __init__(self, functions: Mapping[str, Any], target: Target) -> None:
        built, self.kernels = build_object(functions, target)
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        built.write_to_file(str(place / "kernels.o"))
        (place / "loop.c").write_text(_loop(self.kernels["quantize"], self.kernels["gemm"]))
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", "loop.so", "loop.c", "kernels.o", "-lm"]
        subprocess.run(command, cwd=place, check=True)
        self.library = ctypes.CDLL(str(place / "loop.so"))

    def calls(self, rows: np.ndarray, weights: list[list[np.ndarray]], n: int) -> dict[str, Call]:
        """``ours`` quantizes ``rows`` for every product, ``kernel`` does not. Every product has an output of its own."""
        m, k = rows.shape
        codes, scale = np.empty((m, k), np.uint8), np.empty(m, np.float32)
        outputs = [np.empty((m, n), np.float32) for _ in weights]
        operands = [[codes, scale, *weight, out] for weight, out in zip(weights, outputs)]
        scratch = {name: self._scratch(name, m) for name in ("quantize", "gemm")}
        first = _pointers([[rows, codes, scale, *scratch["quantize"]]])
        each = _pointers([[*arrays, *scratch["gemm"]] for arrays in operands])
        kept = (rows, operands, scratch)  # the pointers do not keep them

        def call(quantize: bool) -> Call:
            def run(_: Any = kept) -> None:
                count, extent = ctypes.c_int64(len(operands)), ctypes.c_int64(m)
                failed = self.library.loop(first, each, count, extent, ctypes.c_int(quantize))
                assert not failed, f"check {failed} of a kernel"

            return run

        call(True)()
        return {"ours": call(True), "kernel": call(False)}

    def _scratch(self, name: str, m: int) -> list[np.ndarray]:
        """Temporaries of a kernel for ``m`` rows, the same for all products."""
        kernel = self.kernels[name]
        values = dict.fromkeys(kernel.extents, m)
        return [_aligned([evaluate(e, values) for e in b.shape], b.dtype) for b in kernel.scratch]


def _aligned(shape: list[int], dtype: str) -> np.ndarray:
    base, _, lanes = dtype.partition("x")
    size = int(np.prod(shape)) * int(lanes or 1) * np.dtype(base).itemsize
    raw = np.zeros(size + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :]


def _pointers(operands: list[list[np.ndarray]]) -> Any:
    flat = [array.ctypes.data for arrays in operands for array in arrays]
    return (ctypes.c_void_p * len(flat))(*flat)


def _loop(quantize: Kernel, gemm: Kernel) -> str:
    """C source: ``loop(operands of the quantizer, those of every product, products, m, whether to quantize)``."""

    def call(kernel: Kernel, table: str) -> str:
        count = len(kernel.buffers) + len(kernel.scratch)
        failed = ["&failed"] if kernel.checks else []
        return f"{kernel.name}({', '.join([f'{table}[{i}]' for i in range(count)] + failed + ['m'] * len(kernel.extents))})"

    def prototype(kernel: Kernel) -> str:
        kinds = ["void *"] * (len(kernel.buffers) + len(kernel.scratch))
        kinds += ["int32_t *"] * bool(kernel.checks) + ["int64_t"] * len(kernel.extents)
        return f"int32_t {kernel.name}({', '.join(kinds)});"

    step = len(gemm.buffers) + len(gemm.scratch)
    return f"""#include <stdint.h>
{prototype(quantize)}
{prototype(gemm)}
int32_t loop(void **q, void **p, int64_t count, int64_t m, int quantized) {{
    int32_t failed = 0;
    for (int64_t i = 0; i < count; i++, p += {step}) {{
        if (quantized) {call(quantize, "q")};
        {call(gemm, "p")};
    }}
    return failed;
}}
"""
