"""Kronecker products of rows by tensor cores, executed in numpy: operands and results by the lanes of PTX's fragments, shared memory by
the places the code uses."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cuda import build, kronecker
from qcompile.codegen.kernels.cuda.kronecker import (
    STEP,
    TILE,
    KroneckerConfig,
    KroneckerRows,
    kronecker_configs,
    kronecker_rows,
    neighbours,
    refusal,
    shared_config,
)
from qcompile.codegen.kernels.cuda.rotation import RotationConfig
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, source
from qcompile.errors import TargetError
from qcompile.passes.learn.mixing import balanced
from qcompile.targets.cuda import TARGETS

from .fragments import LANE, THREAD, G, first_operand, load_matrices, mma
from .test_source import nvcc


def product(
    w: KroneckerRows, side: int, words: np.ndarray, tile: int, shared: np.ndarray, place: int, pitch: int
) -> np.ndarray:
    """A tile of 32 x 32: ``[row / 8, column of the lane, lane]``."""
    steps = w.steps[side]
    halves = words.view(np.float16).astype(np.float64).reshape(w.mine[side], steps, 2, 32, 4, 2)[tile]
    out = np.zeros((4, 8, 32))
    columns = LANE % 8 + LANE // 16 * 8
    for s in range(steps):
        b = np.zeros((4, 2, 2, 32))
        for j in range(0, 4, 2):
            lanes = place + (columns + 8 * j) * (pitch // 2) + LANE // 8 % 2 * 4 + s * (STEP // 2)
            b[j : j + 2] = load_matrices(shared, lanes).reshape(2, 2, 2, 32)
        for m in range(2):
            for j in range(4):
                sums = mma(first_operand(halves[s, m].transpose(1, 2, 0)), b[j])
                for c in range(4):
                    out[2 * m + c // 2, 2 * j + c % 2] += sums[c]
    return out


def tiles(w: KroneckerRows, side: int) -> list[tuple[int, int, int]]:
    """Tiles of all warps of a block, those of a unit by `KroneckerCode._units`."""
    step, other = w.unit[side], w.unit[1 - side]
    inner, each = w.mine[1 - side] // other, prod(w.mine) // prod(w.unit)
    found = []
    for number in range(w.rounds * w.config.warps):
        block, within = divmod(number, each)
        if number < w.blocks * each:
            first, second = within // inner * step, within % inner * other
            found += [(block, first + i, second + c) for i in range(step) for c in range(other)]
    assert len(set(found)) == len(found) == w.count
    return found


def multiply(w: KroneckerRows, x: np.ndarray, packed: dict[str, np.ndarray], rounded: type = np.float64) -> np.ndarray:
    """A row, by the steps of the kernel; elements that none of them writes are not numbers."""
    parts = [multiply_part(w, rank, x, packed, rounded) for rank in range(w.config.blocks)]
    written = ~np.isnan(parts)
    assert (written.sum(0) == 1).all()
    return np.nansum(parts, 0) * packed["gain"][0]


def multiply_part(
    w: KroneckerRows, rank: int, x: np.ndarray, packed: dict[str, np.ndarray], rounded: type
) -> np.ndarray:
    """What one block of those that share a row computes."""
    (n1, n2), half = w.sizes, TILE // 2
    own = packed["right"].reshape(w.tiles[1], -1)[rank * w.mine[1] :][: w.mine[1]].reshape(-1)
    shared = np.zeros(2 * w.words)  # `KroneckerCode._clear`
    row, column = np.divmod(np.arange(w.width), n2)
    row = row // n1 * (w.tiles[0] * TILE) + row % n1
    shared[row * w.row_pitch + column] = x.astype(rounded)
    turned = {}
    for block, first, second in tiles(w, 1):
        place = (block * w.tiles[0] + second) * (TILE * w.row_pitch // 2)
        turned[block, first, second] = product(w, 1, own, first, shared, place, w.row_pitch)
    if w.config.overlaid:
        shared[:] = np.nan
    for (block, first, second), sums in turned.items():
        line = (block * w.mine[1] + first) * TILE + G
        place = w.turned_at + line * (w.turned_pitch // 2) + second * half + THREAD
        for h in range(4):
            for c in range(8):
                at = place + 8 * h * (w.turned_pitch // 2) + 4 * (c // 2)
                shared[2 * at + c % 2] = sums[h, c].astype(rounded)
    out = np.full(w.width, np.nan)
    for block, first, second in tiles(w, 0):
        place = w.turned_at + (block * w.mine[1] + second) * TILE * (w.turned_pitch // 2)
        sums = product(w, 0, packed["left"], first, shared, place, w.turned_pitch)
        for h in range(4):
            for c in range(8):
                line, column = first * TILE + 8 * h + G, (rank * w.mine[1] + second) * TILE + 8 * THREAD + c
                inside = (line < n1) & (column < n2)
                assert (np.abs(sums[h, c][~inside]) == 0).all()  # they count among the largest
                out[((block * n1 + line) * n2 + column)[inside]] = sums[h, c][inside]
    return out


def expected(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, len(left), len(right))
    return (left.T.astype(np.float64) @ blocks @ right).reshape(-1)


SIZES = st.integers(1, 70)


@given(SIZES, SIZES, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_rows_are_multiplied(
    first: int, second: int, blocks: int, overlaid: bool, paired: bool, sharing: int, seed: int
) -> None:
    """Small integers, so that float16 holds the matrices and float64 everything else."""
    sharing = sharing if -(-second // TILE) % sharing == 0 else 1
    config = KroneckerConfig(4, overlaid=overlaid, paired=paired, blocks=sharing)
    w = KroneckerRows(first * second * blocks, (first, second), config)
    rng = np.random.default_rng(seed)
    left, right = (rng.integers(-4, 5, (n, n)).astype(np.float32) for n in w.sizes)
    x = rng.standard_normal(w.width)
    assert np.allclose(multiply(w, x, w.pack(left, right)), expected(x, left, right), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("width", [384, 1376, 4096, 5504])
def test_rounding_is_far_below_that_of_the_quantizer(width: int) -> None:
    """The quantizer's error is 0.29 steps; matrices as FlatQuant learns them: orthogonal ones, rows scaled."""
    w = kronecker_rows(width, balanced(width))
    assert w is not None
    rng = np.random.default_rng(width)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] * rng.uniform(0.5, 2, (n, 1)) for n in w.sizes)
    x = rng.standard_normal(width).astype(np.float16).astype(np.float64)
    want = expected(x, left, right)
    error = np.abs(multiply(w, x, w.pack(left, right), np.float16) - want) / (np.abs(want).max() / 127)
    assert np.sqrt((error**2).mean()) < 0.03 and error.max() < 0.15


def test_columns_are_no_longer_than_one() -> None:
    w = KroneckerRows(48, (6, 8), KroneckerConfig(1))
    rng = np.random.default_rng(0)
    left, right = 1e5 * rng.standard_normal((6, 6)), 1e-6 * rng.standard_normal((8, 8))
    packed = w.pack(left, right)
    for part in ("left", "right"):
        halves = (
            packed[part].view(np.float16).astype(np.float64).reshape(2, 8, 4, 2, 2, 2)
        )  # half, g, t, position + 8, row + 8, pair
        assert 0.4 < np.sqrt((halves**2).sum((2, 3, 5))).max() <= 1.001
    with pytest.raises(ValueError, match="6 x 6"):
        w.pack(right, right)
    with pytest.raises(ValueError, match="finite"):
        w.pack(left, right * np.inf)
    zeros = w.pack(np.zeros((6, 6)), right)
    assert not zeros["left"].any() and np.isfinite(zeros["gain"]).all()


def test_lanes_have_neighbours() -> None:
    order = neighbours(64)
    assert sorted(order) == list(range(64))
    for tile in range(4):
        for t in range(4):
            at = 8 * tile + 2 * t
            assert list(order[at : at + 2]) == [8 * t + 2 * tile, 8 * t + 2 * tile + 1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_widths_of_models_have_kernels_that_fit(arch: str) -> None:
    target = TARGETS[arch]
    for width in (
        384,
        512,
        768,
        1376,
        1536,
        2048,
        3584,
        4096,
        5120,
        8192,
        8960,
        11008,
        13824,
        14336,
        18944,
        27648,
        28672,
    ):
        sizes = balanced(width)
        assert refusal(width, sizes, target) == ""
        for dtype in ("float16", "float32"):
            kernel = CudaRowwise(width, kronecker=sizes, quantize="token", dtype=dtype)
            variants = kernel.variants(target)
            assert variants[-1][0] == 0
            for _, variant in variants:
                assert variant.shared_bytes <= target.shared and variant.threads <= 512
                resident = variant.resident
                assert resident * (variant.shared_bytes + 1024) <= target.shared_sm
                assert resident * variant.threads <= 2048 and (variant.direct or not variant.ahead)


def test_clusters_fit() -> None:
    for width in (1376, 4096, 11008, 14336, 28672):
        sizes = balanced(width)
        config = shared_config(width, sizes, TARGETS["sm_90a"], True)
        assert config is not None and config.blocks > 1 and shared_config(width, sizes, TARGETS["sm_89"], True) is None
        kernel = CudaRowwise(width, kronecker=sizes, quantize="token", dtype="float16", config=config)
        assert kernel.shares == config.blocks and kernel.shared_bytes <= TARGETS["sm_90a"].shared
        with pytest.raises(TargetError, match="no clusters"):
            kernel.build(TARGETS["sm_89"], "mix")
    assert shared_config(384, (16, 24), TARGETS["sm_90a"], True) is None


@pytest.mark.parametrize("width", [width for width in range(384, 28673, 1499) if max(balanced(width)) <= 256])
def test_every_element_is_loaded_once(width: int) -> None:
    for _, config in kronecker_configs(width, balanced(width), TARGETS["sm_90a"], True):
        kernel = CudaRowwise(width, kronecker=balanced(width), quantize="token", dtype="float16", config=config)
        seen = np.zeros(width, int)
        for chunk in range(kernel.chunks):
            at, conditions = kernel.place(chunk, np.arange(kernel.threads))
            at = np.broadcast_to(at, kernel.threads)[np.all([np.ones(kernel.threads, bool), *conditions], 0)]
            places = at[:, None] + np.arange(kernel.vector)
            assert (places // kernel.kronecker[1] == at[:, None] // kernel.kronecker[1]).all()  # one row of X
            np.add.at(seen, places, 1)
        assert (seen == 1).all()
        assert config.warps * kernel.mixed.held >= kernel.mixed.count  # type: ignore[union-attr]


def test_rows_of_tiles_meet_all_banks() -> None:
    for width in range(384, 28673, 331):
        w = KroneckerRows(width, balanced(width), KroneckerConfig(1))
        assert w.row_pitch // 8 % 2 and w.turned_pitch // 8 % 2


def test_other_products_are_refused() -> None:
    assert "up to 256" in refusal(997, (1, 997), TARGETS["sm_90a"])
    assert "divide" in refusal(4096, (64, 60), TARGETS["sm_90a"])
    assert "tiles" in refusal(1 << 16, (256, 256), TARGETS["sm_90a"])
    with pytest.raises(TargetError, match="in one kernel"):
        CudaRowwise(997, kronecker=(1, 997), quantize="token")
    with pytest.raises(TargetError, match="before a quantizer"):
        CudaRowwise(4096, kronecker=(64, 64), out="float32")
    with pytest.raises(TargetError, match="before a quantizer"):
        CudaRowwise(4096, kronecker=(64, 64), hadamard=4096, quantize="token")
    with pytest.raises(TargetError):
        CudaRowwise(4096, kronecker=(64, 64), quantize="token", config=RotationConfig(4, 1))
    small = replace(TARGETS["sm_86"], shared=16 << 10)
    assert "shared memory" in refusal(8192, (64, 128), small)


def test_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    kernel = CudaRowwise(8192, kronecker=(64, 128), quantize="token", dtype="float16")
    text = source({"mix": kernel}, TARGETS["sm_90a"]).read_text()
    assert "mma_sync_aligned_m16n8k16" in text
    for i, (rows, variant) in enumerate(kernel.variants(TARGETS["sm_90a"])):
        call = f"return __tvm_ffi_mix_{i}(self, args, count, result);"
        assert (f"if (rows <= {rows}) {call}" if rows else call) in text
        assert (f"__cluster_dims__(1, {variant.shares}, 1)" in text) or variant.shares == 1
    assert "left" in text and "gain" in text and "griddepcontrol" in text


@nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_nvcc_accepts_it(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    kernels = {
        "half": CudaRowwise(2048, kronecker=(32, 64), quantize="token", dtype="float16"),
        "odd": CudaRowwise(1376, norm="rms", gamma=True, factor=True, kronecker=(32, 43), quantize="token"),
    }
    library = build.compile_library(source(kernels, TARGETS[arch]), TARGETS[arch])
    log = library.with_suffix(".log").read_text()
    assert all(" 0 bytes spill stores" in line for line in log.splitlines() if "spill stores" in line)


def test_reference_is_the_product_of_kronecker() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((3, 3)), rng.standard_normal((4, 4))
    x = rng.standard_normal((5, 24)).astype(np.float32)
    kernel = CudaRowwise(24, kronecker=(3, 4), factor=True, quantize="token", dtype="float16")
    factor = rng.random(24)
    want = (x * factor).reshape(-1, prod((3, 4))) @ np.kron(left, right)
    real, scale = (kernel.reference(x, factor, left, right)[part] for part in ("real", "scale"))
    assert np.allclose(real * scale[:, None], want.reshape(5, 24), rtol=1e-5, atol=1e-5)
    assert kronecker.kronecker_rows(24, (3, 4)) == kernel.mixed
