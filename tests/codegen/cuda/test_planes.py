"""Products of bit planes, executed in numpy from packed words and codes of x as a warp computes them."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda.plan import make_plan
from qcompile.codegen.kernels.cuda.planes import SPAN, PlaneLinear, plane_layout
from qcompile.formats import ActivationFormat, IntFormat, Quantized, parse_format
from qcompile.targets.cuda import TARGETS

TARGET = TARGETS["sm_90a"]
G, THREAD = np.arange(32) // 4, np.arange(32) % 4


def words_of_x(x: np.ndarray, planes: int) -> np.ndarray:
    """Registers of bit planes of one row group, ``[plane, half, lane]``, by the kernel's shifts and masks."""
    bytes_ = x.astype(np.int8).view(np.uint8).reshape(8, 2, 4, 32)  # row, half, thread, 32 codes
    words = np.ascontiguousarray(bytes_).view(np.uint32)[G, :, THREAD]  # lane, half, word
    found = np.zeros((planes, 2, 32), np.uint32)
    for j in range(planes):
        for c in range(8):
            word = words[:, :, c]
            moved = word >> np.uint32(j - c) if j > c else word << np.uint32(c - j)
            found[j] |= (moved & np.uint32(0x01010101 << c & 0xFFFFFFFF)).T
    found[-1] ^= np.uint32(0xFFFFFFFF)
    return found


@pytest.mark.parametrize("bits, q, asym", [(6, 6, False), (1, 2, False), (2, 8, True), (8, 3, False), (5, 4, True)])
def test_planes_give_the_product(bits: int, q: int, asym: bool) -> None:
    rng = np.random.default_rng(bits)
    k, n = 600, 40
    fmt = IntFormat(bits, 0, not asym)
    low, high = (0, 1 << bits) if asym else (-(1 << bits - 1), 1 << bits - 1)
    codes = rng.integers(low, high, (k, n)).astype(np.uint8 if asym else np.int8)
    zero = rng.integers(0, 1 << bits, (1, n)).astype(np.uint8) if asym else None
    x = np.zeros((8, 3 * SPAN), np.int64)
    x[:, :k] = rng.integers(-(1 << q - 1), 1 << q - 1, (8, k))
    problem = LinearProblem(k, n, fmt, ActivationFormat(q))
    kernel = PlaneLinear()
    packed = kernel.pack(problem, {}, Quantized(codes, np.ones((1, n), np.float32), zero))
    tiles = -(-n // 16)
    weights = packed["codes"].view(np.uint32).reshape(tiles, 3, bits, 32, 4)
    sums = np.zeros((bits + q - 1, 8, tiles * 16), np.int64)
    for block in range(3):
        planes = words_of_x(x[:, block * SPAN : (block + 1) * SPAN], q)
        for i in range(bits):
            for j in range(q):
                for h in range(2):
                    for a in range(2):
                        # Lane 4 g + t: channel g + 8 a of the first operand, row g of the second; the same t meet.
                        w = weights[:, block, i, :, 2 * h + a].reshape(tiles, 8, 4)
                        b = planes[j, h].reshape(8, 4)
                        counts = np.bitwise_count(w[:, :, None, :] & b[None, None]).sum(-1)  # tile, g, row
                        channel = np.arange(tiles)[:, None] * 16 + 8 * a + np.arange(8)
                        sums[i + j][:, channel] += counts.transpose(2, 0, 1).astype(np.int64)
    total = (sums << np.arange(bits + q - 1)[:, None, None]).sum(0)[:, :n]
    got = total - packed["zero"] * x.sum(1)[:, None] - packed["offset"]
    real = codes.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))
    assert np.array_equal(got, x[:, :k] @ real)


def test_round_trip() -> None:
    codes = np.random.default_rng(0).integers(0, 64, (300, 20)).astype(np.uint8)
    layout = plane_layout(6)
    assert np.array_equal(layout.unpack(layout.pack(codes), 300, 20), codes)


def test_planes_are_chosen_where_nothing_else_is() -> None:
    def families(weight: str, **given: str) -> set[str]:
        problem = LinearProblem(1024, 512, parse_format(weight), ActivationFormat(6))
        return {e.family for e in make_plan(problem, TARGET, "float16", "float16", configs={1: given}).entries}

    assert families("int6") == {"cuda-planes"}
    assert "cuda-planes" not in families("int4")
    assert families("int4", family="cuda-planes") == {"cuda-planes"}
    assert (
        "scales per channel"
        in PlaneLinear()
        .supports(LinearProblem(1024, 512, parse_format("int6/g128"), ActivationFormat(6)), TARGET)
        .reason
    )
