"""A peer from a shared library of the user's own, given as ``--peer NAME=PATH``.

The library exports three functions with C linkage; it chooses its own weights, of ``bits`` bits in groups of ``group``:

    void *peer_create(int k, int n, int bits, int group, int threads);      NULL: cannot do this product
    void  peer_run(void *peer, const float *x, int m, float *y);            (m, k) -> (m, n), row by row
    void  peer_destroy(void *peer);
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np


def product(
    path: str, k: int, n: int, m: int, bits: int, group: int, copies: int, threads: int
) -> Callable[[], None] | None:
    """A call that computes ``copies`` products, or None if the library declines."""
    library = ctypes.CDLL(path)
    library.peer_create.restype = ctypes.c_void_p
    library.peer_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    peers = [library.peer_create(k, n, bits, group, threads) for _ in range(copies)]
    if not all(peers):
        return None
    x, y = np.random.default_rng(0).normal(size=(m, k)).astype(np.float32), np.empty((m, n), np.float32)

    def call() -> None:
        for peer in peers:
            library.peer_run(peer, x.ctypes.data, m, y.ctypes.data)

    return call
