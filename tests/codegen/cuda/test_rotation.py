"""Rotation of rows by tensor cores, executed in numpy: operands and results by the lanes of PTX's fragments, shared memory by
the places the code uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cuda.rotation import (
    COLUMNS,
    FIRST,
    SECOND,
    VECTOR,
    RotationConfig,
    WarpRotation,
    rotations,
    warp_rotation,
)
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, source
from qcompile.errors import TargetError
from qcompile.formats.hadamard import factors, hadamard_signs
from qcompile.targets.cuda import TARGETS

from .fragments import LANE, load_matrices, mma


def signs(axes: tuple[int, ...], bits: int) -> np.ndarray:
    """The first operand, entries +-1: position bits are half, thread, thread, register column."""
    m, k = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    out = np.ones((16, 16))
    for bit, axis in enumerate(axes):
        a, b = m >> bit & 1, k >> bit & 1
        out *= (-1.0) ** (a & b) if axis < bits else a == b
    return out


def transform(vector: np.ndarray, bits: int, rounded: type = np.float64) -> np.ndarray:
    """What a warp does with 256 elements."""
    scale = [2.0 ** -(sum(axis < bits for axis in axes) // 2) for axes in (FIRST, SECOND)]
    words = vector.reshape(32, 4, 2).transpose(1, 2, 0)  # [word, half, lane]
    between = np.stack([mma(scale[0] * signs(FIRST, bits), words[2 * j : 2 * j + 2]) for j in range(2)])
    between = between.astype(rounded).astype(np.float64)
    out = np.zeros((8, 32))
    for h in range(2):
        after = mma(scale[1] * signs(SECOND, bits), np.stack([between[j, 2 * h : 2 * h + 2] for j in range(2)]))
        for c in range(4):
            out[c % 2 + 2 * h + 4 * (c // 2)] = after[c]
    return out.T.reshape(-1)


@pytest.mark.parametrize("bits", range(9))
def test_a_warp_transforms_a_vector(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal(VECTOR)
    want = (x.reshape(-1, 1 << bits) @ hadamard_signs(1 << bits)).reshape(-1)
    scale = 2.0 ** -sum(sum(axis < bits for axis in axes) // 2 for axes in (FIRST, SECOND))
    assert np.allclose(transform(x, bits), want * scale)


def hadamard(x: np.ndarray, order: int) -> np.ndarray:
    """``x @ hadamard_matrix(order)`` by blocks, factor by factor."""
    core, power = factors(order)
    y = x.reshape(-1, core, *(2,) * power)
    for axis in range(2, 2 + power):
        y = np.stack([y.sum(axis), np.diff(-y, axis=axis).squeeze(axis)], axis)
    return np.einsum("bc...,cd->bd...", y, hadamard_signs(core)).reshape(-1) / np.sqrt(order)


def butterflies(value: np.ndarray, held: int, rounded: type) -> None:
    """Between vectors ``[task, vector, element]``."""
    level = 1
    while level < held:
        for c in range(held):
            if not c & level:
                a, b = value[:, c].copy(), value[:, c | level].copy()
                value[:, c], value[:, c | level] = (a + b).astype(rounded), (a - b).astype(rounded)
        level *= 2


def product(w: WarpRotation, shared: np.ndarray, number: int) -> np.ndarray:
    """The third product of 32 columns: ``[tile of 8 points, column of the lane, lane]``."""
    block, part, quad = w.piece(number)
    padded = np.zeros((16 * w.tiles, 16 * w.tiles))
    padded[: w.radix, : w.radix] = hadamard_signs(w.radix).T
    operand = np.zeros((w.tiles, 4, 2, 2, 32))
    for k in range(0, w.tiles, 2):
        two = k + 1 < w.tiles
        points = np.minimum(16 * k + (LANE if two else LANE % 16), w.radix - 1)
        places = np.array([w.point_place(block, p, part, quad) for p in points])
        for j in range(0, 4, 1 if two else 2):
            got = load_matrices(shared, places + 32 * (j if two else j + LANE // 16), transposed=True)
            for i in range(2):
                operand[(k + i, j) if two else (k, j + i)] = got[2 * i : 2 * i + 2]
    out = np.zeros((2 * w.tiles, 8, 32))
    for m in range(w.tiles):
        for j in range(4):
            block_of = [padded[16 * m : 16 * m + 16, 16 * k : 16 * k + 16] for k in range(w.tiles)]
            sums = sum(mma(signs, operand[k, j]) for k, signs in enumerate(block_of))
            for c in range(4):
                out[2 * m + c // 2, 2 * j + c % 2] = sums[c]
    return out


def rotate(w: WarpRotation, x: np.ndarray, rounded: type = np.float64) -> np.ndarray:
    """A row, by the steps of the kernel."""
    exponent = sum(sum(axis < w.bits for axis in axes) // 2 for axes in (FIRST, SECOND))
    factor = 2.0**exponent / np.sqrt(w.order)
    value = x.reshape(w.tasks, w.held, VECTOR).copy()
    butterflies(value, w.held, rounded)
    value = np.stack([transform(v, w.bits, rounded) for v in value.reshape(-1, VECTOR)])
    if w.radix == 1:
        return value.reshape(-1) * factor
    assert w.pieces * w.radix * COLUMNS == w.width
    blocks = w.config.blocks
    shared = np.full((blocks, 2 * w.row_words), np.nan)
    for vector, elements in enumerate(value.reshape(-1, 32, 4, 2)):
        for lane in range(32):
            owner = w.piece_of(vector, lane) // w.piece_share
            for j in range(4):
                place = w.vector_place(vector) + lane + 32 * j
                shared[owner, 2 * place : 2 * place + 2] = elements[lane, j].astype(rounded)
    out = np.full(w.width, np.nan)
    for number in range(w.pieces):
        rank, within = divmod(number, w.piece_share)
        assert rank < blocks and within < w.piece_rounds * w.config.warps
        block, part, quad = w.piece(number)
        sums = product(w, shared[rank], number)
        for h in range(-(-w.radix // 8)):
            for lane in range(32):
                point = 8 * h + lane // 4
                if point < w.radix:
                    at = w.column(block, point, part, quad) + lane % 4 * 8
                    out[at : at + 8] = sums[h, :, lane]
    return out * factor


ORDERS = [
    (256, 64),
    (512, 512),
    (768, 128),
    (1536, 1536),
    (768, 384),
    (2048, 2048),
    (4096, 4096),
    (5120, 1024),
    (5120, 5120),
]
ORDERS += [(8192, 8192), (9216, 9216), (11008, 256), (14336, 14336), (16384, 16384), (24576, 24576), (28672, 28672)]
ORDERS += [(8192, 4096), (32768, 32768), (7168, 7168), (1792, 896), (2560, 640)]


@pytest.mark.parametrize("width, order", ORDERS)
def test_rows_are_rotated(width: int, order: int) -> None:
    x = np.random.default_rng(0).standard_normal(width)
    want = hadamard(x, order)
    found = rotations(width, order)
    assert found and warp_rotation(width, order) in found
    for w in found:
        for blocks in (1, 3):
            w = replace(w, config=replace(w.config, blocks=blocks, warps=4))
            assert np.allclose(rotate(w, x), want), w


@pytest.mark.parametrize(
    "width, order, parts, held", [(8192, 8192, 8, 4), (14336, 14336, 4, 1), (28672, 28672, 8, 1), (5120, 1024, 4, 1)]
)
def test_rows_are_gathered(width: int, order: int, parts: int, held: int) -> None:
    """Every block adds the row up by the signs of its own row of a small Hadamard matrix, and rotates that."""
    w = warp_rotation(width, order, RotationConfig(4, held, blocks=parts, gathered=True))
    assert w is not None and w.shares == parts and w.width * parts == width
    x = np.random.default_rng(0).standard_normal(width)
    column, out = np.arange(w.width), np.full(width, np.nan)
    assert (w.gathered(column[::8], 1) % 8 == 0).all()  # eight neighbours of a lane stay neighbours
    for rank in range(parts):
        signs = hadamard_signs(parts)[rank]
        gathered = sum(sign * x[w.gathered(column, part)] for part, sign in enumerate(signs))
        out[w.gathered(column, rank)] = rotate(w, gathered) / np.sqrt(parts)
    assert np.allclose(out, hadamard(x, order))


def test_gathers_that_cannot_be() -> None:
    gathered = RotationConfig(4, 1, blocks=8, gathered=True)
    assert warp_rotation(7168, 896, gathered) is None  # 112 is too few for a product of what is left
    assert warp_rotation(14336, 14336, replace(gathered, blocks=7)) is None
    with pytest.raises(TargetError, match="as they are loaded"):
        CudaRowwise(14336, hadamard=14336, quantize="token", dtype="float32", config=gathered)


@pytest.mark.parametrize("width, order", [(4096, 4096), (14336, 14336), (28672, 28672), (11008, 256)])
def test_rounding_is_far_below_that_of_the_quantizer(width: int, order: int) -> None:
    """The quantizer's error is 0.29 steps."""
    x = np.random.default_rng(width).standard_normal(width).astype(np.float16).astype(np.float64)
    w, want = warp_rotation(width, order), hadamard(x, order)
    assert w is not None
    error = np.abs(rotate(w, x, np.float16) - want) / (np.abs(want).max() / 127)
    assert np.sqrt((error**2).mean()) < 0.015 and error.max() < 0.1


@given(
    st.integers(1, 60), st.sampled_from([1, 12, 20, 28, 36]), st.integers(0, 13), st.integers(1, 8), st.integers(1, 16)
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_every_element_has_one_place(blocks: int, core: int, power: int, sharing: int, warps: int) -> None:
    order = core << power
    assume(blocks * order <= 1 << 15)
    for w in rotations(blocks * order, order):
        assert (1 << w.bits) * w.held * w.radix == w.order
        w = replace(w, config=replace(w.config, blocks=sharing, warps=warps))
        kernel = CudaRowwise(w.width, hadamard=order, quantize="token", config=w.config)
        seen = np.zeros(w.width, int)
        for rank in range(sharing):
            for chunk in range(kernel.chunks):
                at, conditions = kernel.place(chunk, np.arange(kernel.threads), rank)
                inside = np.all([np.ones(kernel.threads, bool), *conditions], 0)
                np.add.at(seen, at[inside][:, None] + np.arange(8), 1)
        assert (seen == 1).all()
        if w.radix == 1:
            continue
        vectors = np.arange(w.width // VECTOR)
        words = (w.vector_place(vectors)[:, None] + np.arange(VECTOR // 2)).reshape(-1)
        assert len(set(words)) == len(words) and words.max() < w.row_words
        # Lanes of a quad go to the block that multiplies their columns, and it finds them there.
        numbers = np.arange(w.pieces)
        block, part, quad = w.piece(numbers)
        for point in (0, w.radix - 1):
            place = w.point_place(block, point, part, quad)
            element = w.column(block, point, part, quad)
            vector, lane = element // VECTOR, element % VECTOR // 8
            assert (place == w.vector_place(vector) + lane).all() and (place % 4 == 0).all()
            assert (w.piece_of(vector, lane) == numbers).all() and (w.piece_of(vector, lane + 3) == numbers).all()


@pytest.mark.parametrize("width, order", ORDERS)
def test_eight_points_lie_in_different_banks(width: int, order: int) -> None:
    for w in rotations(width, order):
        for start in range(0, w.radix - 7 if w.radix > 1 else 0, 8):
            chunks = {w.point_place(0, start + i, 0, 0) // 4 % 8 for i in range(8)}
            assert len(chunks) == 8


def test_other_rows_are_left_to_butterflies() -> None:
    assert warp_rotation(384, 384) is None and warp_rotation(1024, 0) is None
    assert warp_rotation(4096, 4096, RotationConfig(8, 4)) is None  # four points are too few for a product


@pytest.mark.parametrize("width, order", ORDERS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_number_of_rows_has_a_kernel_that_fits(width: int, order: int, arch: str) -> None:
    target = TARGETS[arch]
    for dtype in ("float16", "float32"):
        variants = CudaRowwise(width, hadamard=order, quantize="token", dtype=dtype).variants(target)
        rows = [most for most, _ in variants]
        assert rows[-1] == 0 and rows[:-1] == sorted(set(rows[:-1]))
        for _, kernel in variants:
            assert (
                kernel.threads <= 1024
                and kernel.shared_bytes * kernel.resident <= target.shared_sm - 1024 * kernel.resident
            )
            assert kernel.shares == 1 or target.has("cluster")
            assert kernel.direct or not kernel.rotation.config.ahead  # type: ignore[union-attr]


def test_a_function_picks_the_kernel_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    kernel = CudaRowwise(8192, hadamard=8192, quantize="token", dtype="float16")
    text = source({"rotate": kernel}, TARGETS["sm_90a"]).read_text()
    for i, (rows, variant) in enumerate(kernel.variants(TARGETS["sm_90a"])):
        call = f"return __tvm_ffi_rotate_{i}(self, args, count, result);"
        assert (f"if (rows <= {rows}) {call}" if rows else call) in text
        assert (f"__cluster_dims__(1, {variant.shares}, 1)" in text) or variant.shares == 1


def test_configs_that_cannot_be_are_refused() -> None:
    rotated = {"hadamard": 28672, "quantize": "token", "dtype": "float16"}
    with pytest.raises(TargetError, match="are not rotated"):
        CudaRowwise(28672, **rotated, config=RotationConfig(8, 1))
    with pytest.raises(TargetError, match="keep"):
        CudaRowwise(28672, **rotated, config=RotationConfig(8, 4, blocks=2, twice=True))
    with pytest.raises(TargetError, match="no clusters"):
        CudaRowwise(28672, **rotated, config=RotationConfig(8, 4, blocks=2)).build(TARGETS["sm_80"], "rotate")
