"""Bit-serial products by table look-up: what does not depend on the processor.

A weight matrix whose codes are sums of scaled bit planes

    w[k, n] = sum_p s[p, g, n] b_p[k, n] + o[g, n],     b_p in 0, 1,     g = k // group

needs no multiplication by codes. Four consecutive activations have 16 subset sums; a plane's four bits, a *nibble*,
index a table of them, and 16-entry tables are what byte shuffles (``pshufb``, ``tbl``) look up:

    y[n] = sum_g ( sum_p s[p, g, n] sum_j T_j[nibble_p[j, n]]  +  o[g, n] sum_k a[k] )

Source of the method: Wei et al., "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge" (2025).

**Exact 8-bit tables.** Biased by the sum of the negative activations among the four, a table holds numbers from 0 to
``|a_0| + |a_1| + |a_2| + |a_3|``, which for int8 activations nearly always fit in a byte. Where they do not, the
activations are split, ``a = a' + a''``, so that each part fits, and the second part gets a table of its own: an *extra*
entry that names the nibbles it applies to (`exact_tables`). The sum is exact, and its time depends a little on the data.
The alternative of one scale per group, which rounds the tables, is `scaled_tables`.

**Layout.** Columns are cut into panels of ``width``. A panel is a sequence of *pairs* of tables: 8 consecutive k, the
first four in the low nibble of a byte, the others in the high one. In a pair the planes of a column are adjacent bytes,
so that one multiply-add of byte pairs by (1, 2) merges two of them (order ``n0 k0 n1 b k1 k2``), or planes follow each other
(order ``n0 k0 b n1 k1 k2``). Then neighbouring bytes are columns that must not be added; where a processor widens bytes by
separating even from odd ones, the two halves of a register's columns take turns (order ``n0 k0 b n1 n3 n2 k1 k2``). Every
group of K is padded to whole pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.kernels.cpu.panels import half_scales
from qcompile.formats import BitLayout, BitPlane, DualInt4, FixedPoint, Format, IntFormat, NvFp4, Quantized, Ternary

PAIR = 8
"""Activations of two tables, whose nibbles share a byte."""

LARGEST = 255
"""The largest entry of a table."""


@dataclass(frozen=True)
class PlaneSum:
    """How a format reads as a sum of bit planes.

    Attributes:
        bits: planes of an unsigned code.
        group: weights along K that share scales; 0 for one group per column.
        uniform: plane ``p`` counts ``2^p`` of one scale; otherwise every plane has a scale of its own.
        offset: ``constant`` (``o = -bias s``), ``zero`` (``o = -z s`` with an unsigned code ``z`` per group) or ``free``.
        bias: what the unsigned codes of a symmetric format exceed the signed ones by.
        unused: how many of the largest unsigned codes do not occur.
    """

    bits: int
    group: int
    uniform: bool = True
    offset: str = "constant"
    bias: int = 0
    unused: int = 0

    @property
    def centre(self) -> int:
        """The code integer sums are taken around: that of 0, or the middle one where 0 has another code in every group."""
        return self.bias if self.offset == "constant" else 1 << (self.bits - 1) if self.offset == "zero" else 0

    @property
    def reach(self) -> int:
        """How far codes get from the centre."""
        return max(self.centre, (1 << self.bits) - 1 - self.unused - self.centre)


def plane_sum(fmt: Format) -> PlaneSum | None:
    """The planes of ``fmt``, or None if it is no sum of planes."""
    if isinstance(fmt, IntFormat):
        return PlaneSum(fmt.bits, fmt.group, True, "constant" if fmt.symmetric else "zero", -fmt.qmin)
    if isinstance(fmt, Ternary):
        return PlaneSum(2, fmt.group, bias=1, unused=1)
    if isinstance(fmt, BitPlane):
        return PlaneSum(fmt.bits, fmt.group, False, "free")
    if isinstance(fmt, FixedPoint):
        return PlaneSum(fmt.bits, 0, bias=1 << (fmt.bits - 1))
    if isinstance(fmt, DualInt4):
        return PlaneSum(4, fmt.group, bias=8)
    return None


def unsigned_codes(weight: Quantized, bias: int) -> np.ndarray:
    """The codes as unsigned numbers, uint8 ``(K, N)``."""
    return (weight.codes.astype(np.int16) + bias).astype(np.uint8)


def group_scales(fmt: Format, weight: Quantized, kind: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    """Scales as the kernels store them: ``(P, G, N)`` of dtype ``kind``, and float32 factors per column ``(N,)``.

    Two-level formats keep their levels: the scales of a dual-grained matrix are its integer group scales, and those of an
    NVFP4 matrix its e4m3 block scales, exactly.
    """
    if isinstance(fmt, DualInt4):
        return weight.aux["group_scale"][None].astype(kind), weight.scale[0].astype(np.float32)
    scale = weight.scale.astype(np.float32)
    scale = scale[None] if scale.ndim == 2 else scale
    if isinstance(fmt, NvFp4):
        whole = np.broadcast_to(np.float32(weight.aux["tensor_scale"]), (1, scale.shape[-1]))
        return (scale / whole).astype(np.float16).astype(kind), whole[0].copy()
    if kind == "float32":
        return scale, np.ones(scale.shape[-1], np.float32)
    offset = weight.aux.get("offset")
    rows = scale.reshape(-1, scale.shape[-1])
    _, column = half_scales(rows if offset is None else np.concatenate([rows, offset]))
    return (scale / column).astype(np.float16), column


@dataclass(frozen=True)
class PlanePanels:
    """Geometry of the packed bit planes of a ``(k, n)`` matrix.

    Attributes:
        k, n: shape of the matrix.
        planes: its planes.
        width: columns of a panel.
        adjacent: whether the planes of a column are adjacent bytes.
        turns: columns of a register whose halves take turns; 0 for columns in their order.
    """

    k: int
    n: int
    planes: PlaneSum
    width: int
    adjacent: bool
    turns: int = 0

    @property
    def group(self) -> int:
        """Length of a group of K, as the format defines it."""
        return min(self.planes.group or self.k, self.k)

    @property
    def groups(self) -> int:
        """Number of groups along K."""
        return -(-self.k // self.group)

    @property
    def pairs_per_group(self) -> int:
        """Pairs of tables of one group."""
        return -(-self.group // PAIR)

    @property
    def pairs(self) -> int:
        """Pairs of tables of one row of activations."""
        return self.groups * self.pairs_per_group

    @property
    def padded(self) -> bool:
        """Whether padded positions follow a group, so that k and its position differ."""
        return self.pairs * PAIR != self.k

    @property
    def count(self) -> int:
        """Number of panels."""
        return -(-self.n // self.width)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a panel for one pair of tables."""
        return self.width * self.planes.bits

    @cached_property
    def layout(self) -> BitLayout:
        """The bit permutation from padded codes ``(K', N)`` to the packed array."""
        if self.turns:
            n = (-1, self.width // self.turns, 2, self.turns // 2)
            return BitLayout(self.planes.bits, (-1, 2, 4), n, "n0 k0 b n1 n3 n2 k1 k2")
        order = "n0 k0 n1 b k1 k2" if self.adjacent else "n0 k0 b n1 k1 k2"
        return BitLayout(self.planes.bits, (-1, 2, 4), (-1, self.width), order)

    def source(self) -> np.ndarray:
        """For every padded position its k, or -1."""
        position = np.arange(self.pairs_per_group * PAIR)
        k = np.arange(self.groups)[:, None] * self.group + position
        return np.where((position < self.group) & (k < self.k), k, -1).reshape(-1)

    def pack_codes(self, weight: Quantized) -> np.ndarray:
        """The panels, uint8 ``(count, pairs, pair_bytes)``. Padded positions hold 0; their activations are 0 too."""
        codes, source = (
            unsigned_codes(weight, self.planes.bias if self.planes.offset == "constant" else 0),
            self.source(),
        )
        padded = np.where(source[:, None] >= 0, codes[np.maximum(source, 0)], 0).astype(np.uint8)
        return self.layout.pack(padded).reshape(self.count, self.pairs, self.pair_bytes)

    def columns(self, values: np.ndarray) -> np.ndarray:
        """Pad ``(..., n)`` with zeros to whole panels."""
        pad = self.count * self.width - self.n
        return np.ascontiguousarray(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)]))

    def by_panel(self, values: np.ndarray) -> np.ndarray:
        """``(..., groups, n)`` values as ``(count, groups, ..., width)``, next to the panel they belong to."""
        padded = self.columns(values)
        split = padded.reshape(*padded.shape[:-1], self.count, self.width)
        axes = list(range(split.ndim))
        return np.ascontiguousarray(split.transpose([axes[-2], axes[-3], *axes[:-3], axes[-1]]))

    def positions(self, a: np.ndarray) -> np.ndarray:
        """Signed activations ``(M, k)`` at their padded positions, int64 ``(M, pairs, 8)``."""
        source = self.source()
        padded = np.where(source >= 0, a.astype(np.int64)[:, np.maximum(source, 0)], 0)
        return padded.reshape(len(a), self.pairs, PAIR)


_SUBSETS = np.arange(16)[:, None] >> np.arange(4) & 1


def biased_tables(four: np.ndarray) -> np.ndarray:
    """Subset sums of ``(..., 4)`` integers less the sum of the negative ones: ``(..., 16)``, none negative."""
    return four @ _SUBSETS.T - np.minimum(four, 0).sum(-1, keepdims=True)


def split(four: np.ndarray) -> np.ndarray:
    """Integers ``(4,)`` as a sum of parts ``(parts, 4)`` of equal signs, the magnitudes of each adding up to 255 at most."""
    rest = np.abs(four)
    parts: list[np.ndarray] = []
    while not parts or rest.any():
        room = LARGEST - (np.cumsum(rest) - rest)
        part = np.clip(room, 0, rest)
        parts.append(part * np.sign(four))
        rest = rest - part
    return np.array(parts)


def exact_tables(pairs: np.ndarray) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Tables of one row: uint8 ``(pairs, 2, 16)``, and extra entries ``(pair, tables (2, 16))`` in ascending order.

    Args:
        pairs: signed activations ``(pairs, 8)``.
    """
    tables = np.zeros((len(pairs), 2, 16), np.int64)
    extra = []
    for i, pair in enumerate(pairs.reshape(-1, 2, 4)):
        parts = [split(four) for four in pair]
        for j in range(max(map(len, parts))):
            both = np.stack([biased_tables(p[j]) if j < len(p) else np.zeros(16, np.int64) for p in parts])
            if j == 0:
                tables[i] = both
            else:
                extra.append((i, both.astype(np.uint8)))
    return tables.astype(np.uint8), extra


def scaled_tables(pairs: np.ndarray, pairs_per_group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded tables of one row, uint8 ``(pairs, 2, 16)``, and the float32 scale of each group, 1 where they are exact."""
    tables = biased_tables(pairs.reshape(-1, 2, 4))
    largest = tables.reshape(-1, pairs_per_group * 32).max(1)
    scale = np.maximum(np.float32(1), largest.astype(np.float32) / np.float32(LARGEST))
    inverse = np.repeat(np.float32(1) / scale, pairs_per_group)[:, None, None]
    return np.floor(tables.astype(np.float32) * inverse + np.float32(0.5)).astype(np.uint8), scale


def plane_sums(panels: PlanePanels, tables: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """What look-ups of one row add up to: ``(groups, bits, n)`` sums of ``tables`` ``(pairs, 2, 16)`` at the stored nibbles."""
    codes = panels.layout.unpack(packed, panels.pairs * PAIR, panels.n).reshape(panels.pairs, 2, 4, panels.n)
    sums = np.zeros((panels.groups, panels.planes.bits, panels.n), np.int64)
    first, second = np.arange(panels.pairs)[:, None, None], np.arange(2)[None, :, None]
    for p in range(panels.planes.bits):
        nibbles = ((codes >> p & 1) << np.arange(4, dtype=np.uint8)[:, None]).sum(2)
        found = tables[first, second, nibbles].astype(np.int64).sum(1)
        sums[:, p] = found.reshape(panels.groups, panels.pairs_per_group, panels.n).sum(1)
    return sums
