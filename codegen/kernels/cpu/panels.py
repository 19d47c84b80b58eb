"""Weight panels: how the x86 kernels store a quantized matrix, and the vectors that go with it.

The matrix is cut into panels of ``width = lanes * vectors`` columns. A panel is a sequence of rows, each holding the
codes of ``step`` consecutive k for all its columns, so that a kernel streams it linearly. Inside a row each 32-bit
lane of a vector belongs to one column and holds ``depth`` consecutive k in its bytes:

    bytes    8 bits                             order "n0 k0 n1 k1 b",      step = depth
    fields   1, 2 or 4 bits, 8 / bits per byte  order "n0 k0 n1 k2 k1 b",   step = depth * 8 / bits
    planes   3, 5, 6, 7 bits, one bit per byte  order "n0 k0 b n1 k2 k1",   step = depth * 8

so shifting a whole vector and masking its bytes gives ``depth`` codes of every column.

K is cut into groups (one, if scales are per channel), each padded to whole steps. The activations are not padded:
the kernel reads ``depth`` bytes at ``min(k, K - depth)``. Where that is less than ``k`` the last rows hold their codes
shifted accordingly, and a code that stands for 0 elsewhere, so nothing is read past the end of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.formats import BitLayout, DualInt4, FixedPoint, Format, IntFormat, Quantized, Ternary


@dataclass(frozen=True)
class Panels:
    """Geometry of the packed form of a ``(k, n)`` matrix of format ``fmt``.

    Attributes:
        k, n: shape of the matrix.
        fmt: its integer format.
        lanes: 32-bit lanes of a vector register.
        vectors: registers per panel row and code.
        depth: codes of one column in a 32-bit lane: 4 (bytes) or 2 (16-bit values after widening).
        stored: bits a code is stored in: those of the format, or 8.
        twos_complement: store symmetric codes as two's complement instead of with their offset added.
    """

    k: int
    n: int
    fmt: IntFormat
    lanes: int
    vectors: int
    depth: int = 4
    stored: int = 0
    twos_complement: bool = False

    @property
    def bits(self) -> int:
        """Stored bits per code."""
        return self.stored or self.fmt.bits

    @property
    def planes(self) -> bool:
        """Whether bits of a code lie in separate planes."""
        return 8 % self.bits != 0

    @property
    def per_byte(self) -> int:
        """Codes of one column that share a byte position: the number of k in a row is ``depth`` times this."""
        return 8 if self.planes else 8 // self.bits

    @property
    def step(self) -> int:
        """Number of k in a panel row."""
        return self.depth * self.per_byte

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def row_bytes(self) -> int:
        """Bytes of a panel row."""
        return self.width * self.depth * self.per_byte * self.bits // 8

    @property
    def count(self) -> int:
        """Number of panels."""
        return -(-self.n // self.width)

    @property
    def group(self) -> int:
        """Length of a group of K that shares a scale, as the format defines it."""
        return min(self.fmt.group or self.k, self.k)

    @property
    def groups(self) -> int:
        """Number of groups along K."""
        return -(-self.k // self.group)

    @property
    def rows_per_group(self) -> int:
        """Panel rows of one group."""
        return -(-self.group // self.step)

    @property
    def clamped(self) -> bool:
        """Whether the last reads of a row of activations must be moved back to stay inside the row."""
        return (self.groups - 1) * self.group + self.rows_per_group * self.step > self.k

    @cached_property
    def layout(self) -> BitLayout:
        """The bit permutation from padded codes ``(K', N)`` to the packed array."""
        if self.planes:
            return BitLayout(self.bits, (-1, 8, self.depth), (-1, self.width), "n0 k0 b n1 k2 k1")
        if self.bits == 8:
            return BitLayout(8, (-1, self.depth), (-1, self.width), "n0 k0 n1 k1 b")
        return BitLayout(self.bits, (-1, self.per_byte, self.depth), (-1, self.width), "n0 k0 n1 k2 k1 b")

    @property
    def bias(self) -> int:
        """What is added to a symmetric code to store it."""
        return 0 if self.twos_complement or self.bits == 8 else -self.fmt.qmin

    def source(self) -> np.ndarray:
        """For every padded k the k whose code is stored there, or -1 for a code that stands for 0."""
        first = np.arange(self.groups)[:, None] * self.group
        ideal = first + np.arange(0, self.rows_per_group * self.step, self.depth)
        read = np.maximum(np.minimum(ideal, self.k - self.depth), 0)[..., None] + np.arange(self.depth)
        end = np.minimum(first + self.group, self.k)[..., None]
        return np.where((read >= ideal[..., None]) & (read < end), read, -1).reshape(-1)

    def pack_codes(self, weight: Quantized) -> np.ndarray:
        """The panels, uint8 ``(count, groups * rows_per_group, row_bytes)``."""
        source = self.source()
        codes = weight.codes.astype(np.int16) + (self.bias if self.fmt.symmetric else 0)
        zero = np.repeat(self.zeros(weight), self.rows_per_group * self.step, axis=0)
        padded = np.where(source[:, None] >= 0, codes[np.maximum(source, 0)], zero) & ((1 << self.bits) - 1)
        return self.layout.pack(padded.astype(np.uint8)).reshape(
            self.count, self.groups * self.rows_per_group, self.row_bytes
        )

    def zeros(self, weight: Quantized) -> np.ndarray:
        """The unsigned code that stands for 0, uint8 ``(groups, n)``."""
        if self.fmt.symmetric:
            return np.full((self.groups, self.n), self.bias, np.uint8)
        assert weight.zero_point is not None
        return weight.zero_point.astype(np.uint8)

    def integers(self, weight: Quantized) -> np.ndarray:
        """Codes less their zero points, int64 ``(k, n)``."""
        codes = weight.codes.astype(np.int64)
        if weight.zero_point is None:
            return codes
        return codes - self.fmt.expand(weight.zero_point.astype(np.int64), self.k)

    def columns(self, values: np.ndarray) -> np.ndarray:
        """Pad ``(..., n)`` with zeros to whole panels."""
        pad = self.count * self.width - self.n
        return np.ascontiguousarray(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)]))

    def by_panel(self, values: np.ndarray) -> np.ndarray:
        """``(groups, n)`` values as ``(count, groups, width)``, next to the panel they belong to."""
        padded = self.columns(values).reshape(values.shape[0], self.count, self.width)
        return np.ascontiguousarray(padded.transpose(1, 0, 2))


@dataclass(frozen=True)
class PaddedPanels(Panels):
    """Panels of unsigned codes whose activations are copied, so that every position has one of its own or 0."""

    @property
    def bias(self) -> int:
        return -self.fmt.qmin

    @property
    def clamped(self) -> bool:
        return False

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.groups * self.rows_per_group * self.step

    def source(self) -> np.ndarray:
        position = np.arange(self.rows_per_group * self.step)
        k = np.arange(self.groups)[:, None] * self.group + position
        return np.where((position < self.group) & (k < self.k), k, -1).reshape(-1)


@dataclass(frozen=True)
class IndexPanels(PaddedPanels):
    """The same of table indices or bit patterns, stored as they are."""

    @property
    def bias(self) -> int:
        return 0


def integer_format(fmt: Format) -> IntFormat | None:
    """The integer format whose codes and scales those of ``fmt`` are, up to where a scale is kept; None if there is none."""
    if isinstance(fmt, IntFormat):
        return fmt
    if isinstance(fmt, Ternary):
        return IntFormat(2, fmt.group)
    if isinstance(fmt, DualInt4):
        return IntFormat(4, fmt.group)
    return IntFormat(fmt.bits) if isinstance(fmt, FixedPoint) else None


def largest(fmt: IntFormat) -> int:
    """Largest magnitude of a code less its zero point."""
    return -fmt.qmin if fmt.symmetric else fmt.qmax


def half_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split scales ``(groups, n)`` into float16 ones and a power of two per column, float32 ``(n,)``.

    The power of two brings the largest scale of a column to [2^14, 2^15), so that float16 keeps its 11 bits for every
    scale down to 2^-29 of the largest.
    """
    _, exponent = np.frexp(np.abs(scale).max(0))
    column = np.ldexp(np.float32(1), exponent - 15).astype(np.float32)
    return (scale / column).astype(np.float16), column
