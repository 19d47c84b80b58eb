"""Instructions of tensor cores in numpy: operands and results by the lanes of PTX's fragments (PTX ISA, "Matrix fragments for
mma.m16n8k16")."""

from __future__ import annotations

import numpy as np

LANE = np.arange(32)
G, THREAD = LANE // 4, LANE % 4


def first_operand(a: np.ndarray) -> np.ndarray:
    """The matrix (16, 16) of registers ``a[register, half, lane]``."""
    out = np.zeros((16, 16))
    for register in range(4):
        for half in range(2):
            out[G + register % 2 * 8, 2 * THREAD + half + register // 2 * 8] = a[register, half]
    return out


def mma(first: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``mma.m16n8k16``: the first operand (16, 16) as a matrix, registers ``b[register, half, lane]``; ``[register, lane]``."""
    second = np.zeros((16, 8))
    for register in range(2):
        for half in range(2):
            second[2 * THREAD + half + 8 * register, G] = b[register, half]
    d = first @ second
    return np.stack([d[G + 8 * (c // 2), 2 * THREAD + c % 2] for c in range(4)])


def load_matrices(shared: np.ndarray, places: np.ndarray, transposed: bool = False) -> np.ndarray:
    """``ldmatrix.x4``, or with ``.trans``: rows of eight numbers at ``places`` (words), one per lane; ``[matrix, half, lane]``."""
    rows = shared[places[:, None] * 2 + np.arange(8)].reshape(4, 8, 8)
    rows = rows.transpose(0, 2, 1) if transposed else rows
    return np.stack([[rows[i][G, 2 * THREAD + half] for half in range(2)] for i in range(4)])
