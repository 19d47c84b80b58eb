"""Kernels whose blocks share rows, executed on the CPU: barriers, copies to several blocks, products, sums that are sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompile.formats import parse_format
from qcompile.kernels import plan

from . import blocks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize(
    ("weight", "n", "k", "m", "config"),
    [
        ("int4", 331, 1031, 70, {"rows": 64, "wg": 2, "split": 3, "share": 2, "stages": 3, "late": True}),
        ("int8", 200, 700, 33, {"rows": 16, "wg": 1, "split": 1, "share": 2, "stages": 2}),
        ("int2", 130, 900, 20, {"rows": 32, "wg": 1, "split": 2, "share": 1, "stages": 4}),
    ],
)
def test_matches_float64(
    weight: str, n: int, k: int, m: int, config: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    given = {
        "family": "cuda-tiled-shared-int8",
        "mt": 1,
        "wgmma": True,
        "cluster": True,
        "overlap": True,
        "resident": 1,
    }
    p = plan(k, n, weight, "int8/token", torch.float16, bias=True, rows=(m,), configs={m: given | config})
    rng = np.random.default_rng(0)
    fmt = parse_format(weight)
    encoded = fmt.encode(rng.standard_normal((k, n)).astype(np.float32))
    x, scale = rng.integers(-127, 128, (m, k)).astype(np.int8), rng.random(m).astype(np.float32) * 0.01
    bias = rng.standard_normal(n).astype(np.float32)
    got = blocks.run(p, encoded, x, scale, bias, tmp_path).astype(np.float64)
    want = x.astype(np.float64) @ fmt.decode(encoded).astype(np.float64) * scale[:, None] + bias
    np.testing.assert_allclose(got, want, rtol=2.0**-10, atol=1e-4)
