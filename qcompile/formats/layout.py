"""Weight layouts: a permutation of the bits of a code matrix.

Every packed weight a kernel reads is the same bits in another order. A `BitLayout` states that order once; the
packer (numpy), the unpacker, the ONNX subgraph that unpacks a shared file, and the kernel's index arithmetic all
follow from it.

Codes are an unsigned matrix ``(K, N)`` of ``bits`` bits (a signed code is stored with its bias added). Both axes are
padded with ``pad_code`` to multiples of their factors, then split: ``K = k0 x k1 x ...`` and ``N = n0 x n1 x ...``,
outermost first, the leading factor being free (-1). The bit axis ``b`` counts from the least significant bit.
``order`` names the axes from slowest to fastest; the fastest 8 bits form a byte, first bit lowest.

Example: ``BitLayout(4, k=(-1, 2, 4), n=(-1, 8), order="n0 k0 n1 k2 k1 b")`` holds, per byte, the codes of k and k + 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.errors import FormatError


@dataclass(frozen=True)
class BitLayout:
    """See the module docstring. ``shape(K, N)`` is the shape of the packed uint8 array, ``order`` its axes."""

    bits: int
    k: tuple[int, ...]
    n: tuple[int, ...]
    order: str
    pad_code: int = 0

    def __post_init__(self) -> None:
        names = [f"k{i}" for i in range(len(self.k))] + [f"n{i}" for i in range(len(self.n))] + ["b"]
        if sorted(self.order.split()) != sorted(names):
            raise FormatError(f"layout order {self.order!r} must name each of {' '.join(names)} once")
        if self.k[0] != -1 or self.n[0] != -1 or min(self.k[1:] + self.n[1:], default=1) < 1:
            raise FormatError("the leading factor of an axis is free (-1), all others are positive")

    @property
    def k_tile(self) -> int:
        """K is padded to a multiple of this."""
        return int(np.prod(self.k[1:], dtype=np.int64))

    @property
    def n_tile(self) -> int:
        """N is padded to a multiple of this."""
        return int(np.prod(self.n[1:], dtype=np.int64))

    def factors(self, k: int, n: int) -> dict[str, int]:
        """Extent of every axis for a ``(k, n)`` matrix, padding included."""
        sizes = {"b": self.bits, "k0": -(-k // self.k_tile), "n0": -(-n // self.n_tile)}
        sizes |= {f"k{i}": f for i, f in enumerate(self.k) if i} | {f"n{i}": f for i, f in enumerate(self.n) if i}
        return sizes

    def shape(self, k: int, n: int) -> tuple[int, ...]:
        """Shape of the packed array: the axes of ``order`` without those that lie inside a byte."""
        sizes = self.factors(k, n)
        dims = [sizes[a] for a in self.order.split()]
        inside = 1
        while inside < 8 and dims:
            inside *= dims.pop()
        if inside % 8:
            raise FormatError(f"layout {self.order!r}: the fastest axes do not fill whole bytes")
        return tuple(dims) + ((inside // 8,) if inside > 8 else ())

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Pack unsigned ``codes`` ``(K, N)`` into uint8 of `shape`."""
        k, n = codes.shape
        sizes = self.factors(k, n)
        padded = np.full((sizes["k0"] * self.k_tile, sizes["n0"] * self.n_tile), self.pad_code, np.uint8)
        padded[:k, :n] = codes
        split = padded.reshape(
            [sizes[f"k{i}"] for i in range(len(self.k))] + [sizes[f"n{i}"] for i in range(len(self.n))]
        )
        axes = [f"k{i}" for i in range(len(self.k))] + [f"n{i}" for i in range(len(self.n))] + ["b"]
        bits = (split[..., None] >> np.arange(self.bits, dtype=np.uint8)) & 1
        ordered = bits.transpose([axes.index(a) for a in self.order.split()])
        return np.packbits(ordered.reshape(-1, 8), axis=1, bitorder="little").reshape(self.shape(k, n))

    def unpack(self, packed: np.ndarray, k: int, n: int) -> np.ndarray:
        """Inverse of `pack`: the ``(k, n)`` uint8 codes."""
        sizes = self.factors(k, n)
        names = self.order.split()
        bits = np.unpackbits(np.ascontiguousarray(packed).reshape(-1), bitorder="little").reshape(
            [sizes[a] for a in names]
        )
        axes = [f"k{i}" for i in range(len(self.k))] + [f"n{i}" for i in range(len(self.n))] + ["b"]
        split = bits.transpose([names.index(a) for a in axes])
        codes = (split << np.arange(self.bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        return codes.reshape(sizes["k0"] * self.k_tile, sizes["n0"] * self.n_tile)[:k, :n]
