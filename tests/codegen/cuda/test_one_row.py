"""Products of one row, as generated, on a CPU: `sliced` with sums of warps and clusters, repeated tiles, ends of K and N, and
`persistent` with several groups of tiles to a block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompile.formats import parse_format
from qcompile.kernels import plan

from . import rows

CASES = [
    # weight, K, N, bias, config
    ("int2/g128", 512, 96, False, {"tn": 3, "kw": 2, "stages": 3, "split": 2, "overlap": True, "early": 1}),
    ("int4/g64", 777, 147, True, {"tn": 4, "kw": 3, "stages": 4, "wide": 2, "split": 2}),
    ("int4/g128", 1100, 100, False, {"tn": 5, "kw": 1, "stages": 5, "split": 3, "overlap": True, "late": True}),
    ("int3/g64", 300, 70, False, {"tn": 2, "kw": 2, "stages": 4, "split": 1}),
    (
        "int2/g128",
        1280,
        70,
        False,
        {"tn": 2, "kw": 2, "stages": 6, "split": 2, "bulk": True, "overlap": True, "early": 1},
    ),
    ("int3/g64", 896, 50, True, {"tn": 3, "kw": 3, "stages": 9, "split": 1, "bulk": True}),
    ("int8", 900, 70, False, {"tn": 2, "kw": 2, "stages": 0, "split": 3, "bulk": True, "overlap": True}),
    ("int4/g32", 100, 90, True, {"tn": 3, "kw": 4, "stages": 3, "split": 1, "overlap": True}),
    ("int4/g128/asym", 640, 64, False, {"tn": 1, "kw": 2, "stages": 3, "split": 2}),
]


PERSISTENT = [
    ("int4/g128", 520, 210, True, {"tn": 1, "kw": 2, "grid": 3, "stages": 4, "raw": True}),
    ("nf4/g64", 300, 50, False, {"tn": 1, "kw": 2, "grid": 3, "stages": 3, "raw": False}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are those of the code as it is."""
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))


@pytest.mark.parametrize(("weight", "k", "n", "bias", "config"), CASES, ids=[f"{c[0]}-{c[1]}x{c[2]}" for c in CASES])
def test_products(weight: str, k: int, n: int, bias: bool, config: dict, tmp_path: Path) -> None:
    config = {"family": "cuda-stream-sliced", "wide": 1, "cluster": config["split"] > 1, **config}
    check(weight, k, n, bias, config, tmp_path)


@pytest.mark.parametrize(
    ("weight", "k", "n", "bias", "config"), PERSISTENT, ids=[f"{c[0]}-{c[1]}x{c[2]}" for c in PERSISTENT]
)
def test_products_of_persistent_blocks(weight: str, k: int, n: int, bias: bool, config: dict, tmp_path: Path) -> None:
    check(weight, k, n, bias, {"family": "cuda-stream-persistent", **config}, tmp_path)


def check(weight: str, k: int, n: int, bias: bool, config: dict, folder: Path) -> None:
    """Compare with float64."""
    rng = np.random.default_rng(k)
    fmt = parse_format(weight)
    quantized = fmt.encode(rng.standard_normal((k, n)).astype(np.float32))
    x = rng.standard_normal((1, k)).astype(np.float16)
    added = rng.standard_normal(n).astype(np.float32) if bias else None
    p = plan(k, n, weight, "none", torch.float16, "sm_90a", bias, rows=(1,), configs={1: config})
    got = rows.multiply(p, quantized, x, added, folder / "run").astype(np.float64)
    want = x.astype(np.float64) @ fmt.decode(quantized).astype(np.float64) + (added if bias else 0)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()
