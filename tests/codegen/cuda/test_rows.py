"""Row kernels executed on the CPU: blocks that share a row, matrices in shared memory, rows that are computed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qcompile.codegen.kernels.cuda.kronecker import KroneckerConfig
from qcompile.codegen.kernels.cuda.rotation import RotationConfig
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, SpreadConfig

from . import rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HALF = {"quantize": "token", "dtype": "float16"}
GATHERED = {"gathered": True, "staged": True, "ahead": True}

KERNELS = {
    "rotated": CudaRowwise(2048, **HALF, hadamard=2048, config=RotationConfig(4, 1, ahead=True)),
    "exchanged": CudaRowwise(5120, **HALF, hadamard=5120, config=RotationConfig(2, 1, blocks=2, staged=True)),
    "gathered": CudaRowwise(2048, **HALF, hadamard=2048, config=RotationConfig(1, 1, blocks=8, **GATHERED)),
    "gathered28": CudaRowwise(7168, **HALF, hadamard=7168, bits=4, config=RotationConfig(2, 1, blocks=4, **GATHERED)),
    "gathered_blocks": CudaRowwise(2560, **HALF, hadamard=512, config=RotationConfig(2, 1, blocks=2, gathered=True)),
    "mixed": CudaRowwise(1376, **HALF, kronecker=(32, 43), config=KroneckerConfig(1, paired=True)),
    "mixed_shared": CudaRowwise(
        2752, norm="rms", gamma=True, factor=True, quantize="token", out="float32", kronecker=(43, 64),
        config=KroneckerConfig(2, blocks=2, kept=True),
    ),
    "mixed_overlaid": CudaRowwise(
        1980, quantize="tensor", zero_point=5, kronecker=(33, 60), config=KroneckerConfig(2, overlaid=True)
    ),
    "spread_uneven": CudaRowwise(1003, norm="rms", gamma=True, quantize="token", config=SpreadConfig(4)),
    "spread_by_eight": CudaRowwise(5001, **HALF, config=SpreadConfig(8)),
    "spread": CudaRowwise(1032, norm="layer", gamma=True, beta=True, quantize="token", config=SpreadConfig(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_matches_numpy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    kernel, count = KERNELS[name], 3
    rng = np.random.default_rng(len(name))
    x = rng.standard_normal((count, kernel.width))
    x[1] = 0
    if not kernel.norm and kernel.quantize == "token":
        x[2] = 60000 * np.sign(x[2] + 1.5)  # leaves the range of float16 on the way
    x = x.astype(kernel.dtype)
    vectors = {
        n: (rng.random(kernel.width) + 0.5).astype(np.float32)
        for n in ("gamma", "beta", "factor")
        if getattr(kernel, n)
    }
    given, arrays = list(vectors.values()), {"x": x, **vectors}
    if kernel.mixed:
        matrices = [rng.standard_normal((n, n)).astype(np.float32) for n in kernel.kronecker]
        given += matrices
        arrays |= kernel.mixed.pack(*matrices)
    if kernel.quantize == "tensor":
        given.append(np.array([20.0], np.float32))
        arrays["static_scale"] = given[-1]
    if kernel.out:
        arrays["y"] = np.full((count, kernel.width), np.nan, np.float32)
    arrays |= {"codes": np.full((count, kernel.width), 99, np.int8), "scale": np.full(count, np.nan, np.float32)}
    rows.run(kernel, arrays, count, 2 if kernel.transform else count, tmp_path / "run")
    want = kernel.reference(x.astype(np.float32), *given)
    assert np.allclose(arrays["scale"], want["scale"], rtol=2e-3, atol=0)
    assert "y" not in arrays or np.allclose(arrays["y"], want["y"], rtol=1e-5, atol=1e-6)
    off = arrays["codes"] != want["codes"]
    tie = np.abs(want["real"] - np.floor(want["real"]) - 0.5)
    assert (
        off.mean() < 0.05
        and (tie[off] < 0.25).all()
        and (np.abs(arrays["codes"] - want["codes"].astype(int)) <= 1).all()
    )
