"""Rotation of rows by tensor cores, executed in numpy: operands and results by the lanes of PTX's fragments, shared memory by
the places the code uses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cuda.rotation import FIRST, SECOND, VECTOR, WarpRotation, warp_rotation
from qcompile.formats.hadamard import factors, hadamard_signs

LANE = np.arange(32)
G, THREAD = LANE // 4, LANE % 4


def mma_8(signs: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``mma.m16n8k8``: the first operand (16, 8) as a matrix, registers ``b[register, lane]``; ``[register, lane]``."""
    second = np.zeros((8, 8))
    for register in range(2):
        second[THREAD + 4 * register, G] = b[register]
    d = signs @ second
    return np.stack([d[G + 8 * (c // 2), 2 * THREAD + c % 2] for c in range(4)])


def signs(axes: tuple[int, ...], bits: int, step: int) -> np.ndarray:
    """The first operand of a step: position bits are register column, thread, thread, step."""
    out = np.zeros((16, 8))
    for m in range(16):
        for slot in range(8):
            k = (slot >> 2) | (slot & 3) << 1 | step << 3
            value = 1
            for bit, axis in enumerate(axes):
                a, b = m >> bit & 1, k >> bit & 1
                value *= (-1) ** (a & b) if axis < bits else int(a == b)
            out[m, slot] = value
    return out


def transform(vector: np.ndarray, bits: int) -> np.ndarray:
    """What a warp does with 256 elements."""
    value = vector.reshape(32, 8).T  # [element, lane]
    between = np.zeros((2, 4, 32))
    for j in range(2):
        for step in range(2):
            between[j] += mma_8(signs(FIRST, bits, step), value[4 * j + 2 * step : 4 * j + 2 * step + 2])
    out = np.zeros((8, 32))
    for h in range(2):
        after = np.zeros((4, 32))
        for step in range(2):
            after += mma_8(signs(SECOND, bits, step), between[step, 2 * h : 2 * h + 2])
        for c in range(4):
            out[c % 2 + 2 * h + 4 * (c // 2)] = after[c]
    return out.T.reshape(-1)


@pytest.mark.parametrize("bits", range(9))
def test_a_warp_transforms_a_vector(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal(VECTOR)
    want = (x.reshape(-1, 1 << bits) @ hadamard_signs(1 << bits)).reshape(-1)
    assert np.allclose(transform(x, bits), want)


def hadamard(x: np.ndarray, order: int) -> np.ndarray:
    """``x @ hadamard_signs(order)`` by blocks, factor by factor."""
    core, power = factors(order)
    y = x.reshape(-1, core, *(2,) * power)
    for axis in range(2, 2 + power):
        y = np.stack([y.sum(axis), np.diff(-y, axis=axis).squeeze(axis)], axis)
    return np.einsum("bc...,cd->bd...", y, hadamard_signs(core)).reshape(-1)


def rotate(w: WarpRotation, x: np.ndarray) -> np.ndarray:
    """A row, by the steps of the kernel."""
    value = np.stack([transform(v, w.bits) for v in x.reshape(-1, VECTOR)]).reshape(w.tasks, w.held, VECTOR)
    level = 1
    while level < w.held:
        for c in range(w.held):
            if not c & level:
                a, b = value[:, c].copy(), value[:, c | level].copy()
                value[:, c], value[:, c | level] = a + b, a - b
        level *= 2
    row = value.reshape(-1)
    if w.radix == 1:
        return row
    shared = np.full(w.width, np.nan)
    piece = np.arange(w.width) // 4
    shared[(piece ^ piece // 8 % 2) * 4 + np.arange(w.width) % 4] = row
    out = np.full(w.width, np.nan)
    for thread in range(w.threads):
        first = thread * w.neighbours
        column = first // w.stride * w.order + first % w.stride
        place = (column // 4 ^ column // 4 // 8 % 2) * 4 + column % 4
        for v in range(w.neighbours):
            points = shared[place + v + np.arange(w.radix) * w.stride]
            out[column + v + np.arange(w.radix) * w.stride] = points @ hadamard_signs(w.radix)
    return out


ORDERS = [(256, 64), (512, 512), (768, 128), (1536, 1536), (4096, 4096), (5120, 1024), (5120, 5120), (8192, 8192)]
ORDERS += [(11008, 256), (14336, 14336), (16384, 16384), (28672, 28672)]


@pytest.mark.parametrize("width, order", ORDERS)
def test_rows_are_rotated(width: int, order: int) -> None:
    w = warp_rotation(width, order)
    assert w is not None and w.threads <= 512
    x = np.random.default_rng(0).standard_normal(width)
    assert np.allclose(rotate(w, x), hadamard(x, order))


@given(st.integers(1, 60), st.sampled_from([1, 12, 20, 28]), st.integers(0, 13))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_every_element_has_one_place(blocks: int, core: int, power: int) -> None:
    order = core << power
    assume(blocks * order <= 1 << 15)
    w = warp_rotation(blocks * order, order)
    assume(w is not None)
    assert w is not None
    assert w.tasks * w.held * VECTOR == w.width and (w.rounds - 1) * w.warps < w.tasks <= w.rounds * w.warps
    if w.radix > 1:
        assert w.threads * w.neighbours * w.radix == w.width and w.stride % 64 == 0 and w.neighbours * w.radix <= 128
    assert (1 << w.bits) * w.held * w.radix == w.order


def test_other_rows_are_left_to_butterflies() -> None:
    assert warp_rotation(384, 384) is None and warp_rotation(1024, 0) is None
