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

from collections.abc import Iterator
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
        """Pack the low ``bits`` bits of ``codes`` ``(K, N)`` into uint8 of `shape`."""
        k, n = codes.shape
        sizes = self.factors(k, n)
        padded = np.full((sizes["k0"] * self.k_tile, sizes["n0"] * self.n_tile), self.pad_code, np.uint8)
        padded[:k, :n] = codes
        plan = self._plan(k, n)
        if plan is None:
            return self._pack_bits(padded, sizes).reshape(self.shape(k, n))
        packed = np.zeros(plan.outer_shape, np.uint8)
        split = padded.reshape(plan.split_shape).transpose(plan.code_axes)
        for inner, bit, place, plane in plan.places():
            codes_here, bytes_here = split[inner], packed[plane]
            if bit is None:
                bytes_here |= (codes_here & (1 << self.bits) - 1) << place
            else:
                bytes_here |= (codes_here >> bit & 1) << place
        return packed.reshape(self.shape(k, n))

    def unpack(self, packed: np.ndarray, k: int, n: int) -> np.ndarray:
        """Inverse of `pack`: the ``(k, n)`` uint8 codes."""
        sizes = self.factors(k, n)
        rows, columns = sizes["k0"] * self.k_tile, sizes["n0"] * self.n_tile
        plan = self._plan(k, n)
        if plan is None:
            return self._unpack_bits(packed, sizes).reshape(rows, columns)[:k, :n]
        packed = np.ascontiguousarray(packed).reshape(plan.outer_shape)
        codes = np.zeros(plan.split_shape, np.uint8)
        split = codes.transpose(plan.code_axes)
        for inner, bit, place, plane in plan.places():
            if bit is None:
                split[inner] = packed[plane] >> place & (1 << self.bits) - 1
            else:
                split[inner] |= (packed[plane] >> place & 1) << bit
        return codes.reshape(rows, columns)[:k, :n]

    def _plan(self, k: int, n: int) -> _BytePlan | None:
        """Return how bytes are put together, or None if some code straddles bytes."""
        sizes = self.factors(k, n)
        outer: list[tuple[str, int]] = []
        inner: list[tuple[str, int]] = []
        room = 8
        for name in reversed(self.order.split()):
            # An axis lies outside bytes, inside them, or is cut into an outer and an inner part.
            inside = min(room, sizes[name])
            if room % inside or sizes[name] % inside:
                return None
            room //= inside
            if inside > 1:
                inner.insert(0, (name, inside))
            outer.insert(0, (name, sizes[name] // inside))
        return _BytePlan(self, sizes, outer, inner) if room == 1 else None

    def _pack_bits(self, padded: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        axes = [*self._matrix_axes(), "b"]
        split = padded.reshape([sizes[a] for a in axes[:-1]])
        bits = (split[..., None] >> np.arange(self.bits, dtype=np.uint8)) & 1
        ordered = bits.transpose([axes.index(a) for a in self.order.split()])
        return np.packbits(ordered.reshape(-1, 8), axis=1, bitorder="little")

    def _unpack_bits(self, packed: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        names = self.order.split()
        bits = np.unpackbits(np.ascontiguousarray(packed).reshape(-1), bitorder="little")
        split = bits.reshape([sizes[a] for a in names]).transpose([names.index(a) for a in [*self._matrix_axes(), "b"]])
        return (split << np.arange(self.bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)

    def _matrix_axes(self) -> list[str]:
        return [f"k{i}" for i in range(len(self.k))] + [f"n{i}" for i in range(len(self.n))]


class _BytePlan:
    """Where each code goes, byte position by byte position, so that packing moves whole strided arrays.

    Attributes:
        outer_shape: the packed array by the outer parts of the axes of ``order``.
        split_shape: the padded code matrix by outer and inner parts of its axes.
        code_axes: transposes that to the outer axes in their order, then the inner ones.
    """

    def __init__(
        self, layout: BitLayout, sizes: dict[str, int], outer: list[tuple[str, int]], inner: list[tuple[str, int]]
    ) -> None:
        self.bits, self.outer, self.inner = layout.bits, outer, inner
        self.outer_shape = tuple(size for _, size in outer)
        within = dict(inner)
        split = []
        for name in layout._matrix_axes():
            split += [(name, "outer", sizes[name] // within.get(name, 1)), (name, "inner", within.get(name, 1))]
        self.split_shape = tuple(size for _, _, size in split)
        where = {(name, part): i for i, (name, part, _) in enumerate(split)}
        ordered = [where[name, "outer"] for name, _ in outer if name != "b"]
        codes_inside = [name for name, _ in inner if name != "b"]
        rest = [i for i, (name, part, _) in enumerate(split) if part == "inner" and name not in codes_inside]
        self.code_axes = ordered + rest + [where[name, "inner"] for name in codes_inside]
        self._lead = (slice(None),) * len(ordered) + (0,) * len(rest)

    def places(self) -> Iterator[tuple[tuple, int | None, int, tuple]]:
        """Yield ``(index into codes, bit or None for the whole code, place in the byte, index into bytes)``."""
        strides, stride = {}, 1
        for name, size in reversed(self.inner):
            strides[name] = stride
            stride *= size
        codes_inside = [(name, size) for name, size in self.inner if name != "b"]
        planes_inside = dict(self.inner).get("b", 1)
        whole = planes_inside == self.bits and strides.get("b", 1) == 1
        b = [name for name, _ in self.outer].index("b")
        for index in np.ndindex(*[size for _, size in codes_inside]):
            place = sum(i * strides[name] for i, (name, _) in zip(index, codes_inside, strict=True))
            for bit in range(1 if whole else self.bits):
                plane = (slice(None),) * b + (bit // planes_inside,)
                shift = 0 if whole else bit % planes_inside * strides.get("b", 1)
                yield self._lead + index, None if whole else bit, place + shift, plane
