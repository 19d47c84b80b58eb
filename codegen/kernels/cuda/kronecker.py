"""How tensor cores multiply rows by Kronecker products: who holds which element, and where it lies in between.

    x @ (L (x) R) = vec(L^T X R)     with the row x read as a matrix X of n1 x n2, n1 = rows(L), n2 = rows(R)

Both products take their matrix as the first operand of `mma` and what the row is read as for the second (PTX ISA, "Matrix
fragments for mma.m16n8k16"), so that pairs of the second operand are neighbours in memory every time:

    Z^T = R^T X^T     rows of X are columns, positions are n2 neighbours of a row
    Y   = L^T Z       rows of Z^T are columns, positions are n1 neighbours of a row

A warp computes tiles of 32 x 32, the same number of both. X and Z^T lie in shared memory as float16, filled up with zeros: rows
to multiples of 32, positions to multiples of 16, and eight more so that `ldmatrix` meets all banks. The matrices come from
memory as the lanes hold them (`KroneckerRows.pack`), through the first-level cache, and stay there from row to row; where rows are
few, they are copied to shared memory while the kernel before ends. Rows of R^T
are ordered so that a lane has eight neighbours of Y: column 2 t + h of tile j of four is column 8 t + 2 j + h of 32.

Operands are float16, sums float32: what is rounded is x, Z and the matrices, each by 2^-12 of an element on average. The matrices
are divided by a power of two, so that no column is longer than 1; rows that leave float16's range on the way are multiplied with one
that is found by trying again (`scaled_code`).

Source of the transform: Sun et al., "FlatQuant: Flatness Matters for LLM Quantization" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod

import numpy as np

from qcompile.targets.cuda import CudaTarget

TILE = 32
"""Rows and columns of what a warp computes at a time."""

STEP = 16
"""Positions of one product."""

MOST_FACTOR = 256
"""Rows of a matrix, at most: beyond, products take longer than passes over the row by far."""

MOST_WARPS, MOST_ROUNDS = 16, 4
"""Of a block; tiles of a warp, whose sums stay in registers."""


@dataclass(frozen=True)
class KroneckerConfig:
    """How a row is divided.

    Attributes:
        warps: of a block, which computes one row at a time.
        resident: blocks that are to fit a multiprocessor.
        ahead: the next row of a block is loaded while one is computed.
        overlaid: Z^T takes the place of X in shared memory.
        kept: the matrices lie there, too, copied before the row is there.
        paired: a warp computes two neighbouring tiles at once, which share one of their operands.
        blocks: that share a row, a cluster: each loads all of it and computes columns of Z and Y, and they exchange the maximum.
    """

    warps: int
    resident: int = 1
    ahead: bool = False
    overlaid: bool = False
    kept: bool = False
    paired: bool = False
    blocks: int = 1


@dataclass(frozen=True)
class KroneckerRows:
    """A row of ``width`` elements in blocks of ``sizes[0] * sizes[1]``."""

    width: int
    sizes: tuple[int, int]
    config: KroneckerConfig

    @property
    def blocks(self) -> int:
        """Of the row."""
        return self.width // prod(self.sizes)

    @cached_property
    def tiles(self) -> tuple[int, int]:
        """Of a block: along n1 and n2."""
        return -(-self.sizes[0] // TILE), -(-self.sizes[1] // TILE)

    @cached_property
    def mine(self) -> tuple[int, int]:
        """Those that one of the blocks that share a row computes."""
        return self.tiles[0], -(-self.tiles[1] // self.config.blocks)

    @property
    def count(self) -> int:
        """Tiles of a block."""
        return self.blocks * prod(self.mine)

    @cached_property
    def unit(self) -> tuple[int, int]:
        """Tiles that a warp computes at once, along n1 and n2."""
        even = [size % 2 == 0 for size in self.mine]
        return (1, 1) if not (self.config.paired and any(even)) else (2, 1) if even[0] else (1, 2)

    @property
    def rounds(self) -> int:
        """Units of a warp, at most."""
        return -(-self.count // prod(self.unit) // self.config.warps)

    @property
    def held(self) -> int:
        """Tiles of a warp, at most."""
        return self.rounds * prod(self.unit)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.config.warps

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Products along n1 and n2."""
        return -(-self.sizes[0] // STEP), -(-self.sizes[1] // STEP)

    @property
    def vector(self) -> int:
        """Neighbours that one thread loads: they lie in one row of X."""
        return gcd(self.sizes[1], 8)

    @property
    def row_pitch(self) -> int:
        """Elements from a row of X to the next."""
        return STEP * self.steps[1] + 8

    @property
    def turned_pitch(self) -> int:
        """Elements from a row of Z^T to the next."""
        return TILE * self.tiles[0] + 8

    @property
    def row_words(self) -> int:
        """Words of shared memory for X."""
        return self.blocks * self.tiles[0] * TILE * self.row_pitch // 2

    @property
    def turned_words(self) -> int:
        """Words for Z^T."""
        return self.blocks * self.mine[1] * TILE * self.turned_pitch // 2

    @property
    def row_space(self) -> int:
        """Words for both."""
        parts = self.row_words, self.turned_words
        return max(parts) if self.config.overlaid else sum(parts)

    @property
    def words(self) -> int:
        """Words of shared memory, those of the matrices last."""
        return self.row_space + (self.kept_words(0) + self.kept_words(1) if self.config.kept else 0)

    @property
    def turned_at(self) -> int:
        """First word of Z^T, after that of X."""
        return 0 if self.config.overlaid else self.row_words

    def matrix_words(self, side: int) -> int:
        """Words of a packed matrix."""
        return self.tiles[side] * self.steps[side] * 2 * 32 * 4

    def kept_words(self, side: int) -> int:
        """Those that a block multiplies by."""
        return self.matrix_words(side) // self.tiles[side] * self.mine[side]

    def pack(self, left: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
        """``left`` and ``right`` as uint32 words of two float16, in the order tile, product, half of the tile, lane, register; ``gain``
        float32 ``(1,)``, what products of them are to be multiplied with.

        Raises:
            ValueError: a matrix has other sizes, or entries that are not finite.
        """
        packed, gain = {}, 1.0
        orders = np.arange(TILE * self.tiles[0]), neighbours(TILE * self.tiles[1])
        for name, matrix, size, tiles, steps, order in zip(
            ("left", "right"), (left, right), self.sizes, self.tiles, self.steps, orders
        ):
            if matrix.shape != (size, size) or not np.isfinite(matrix).all():
                raise ValueError(f"the {name} matrix is to be {size} x {size} finite numbers")
            longest = np.sqrt((matrix.astype(np.float64) ** 2).sum(0).max())
            unit = 2.0 ** np.ceil(np.log2(longest)) if longest else 1.0
            gain *= unit
            turned = np.zeros((TILE * tiles, STEP * steps), np.float16)
            turned[:size, :size] = matrix.T / unit
            turned = turned[order].reshape(tiles, 2, 2, 8, steps, 2, 4, 2)  # tile, half, +8, g, step, +8, t, pair
            words = turned.transpose(0, 4, 1, 3, 6, 5, 2, 7)  # registers: row + 8, then position + 8
            packed[name] = np.ascontiguousarray(words).view(np.uint32).reshape(-1)
        return packed | {"gain": np.array([gain], np.float32)}


def neighbours(count: int) -> np.ndarray:
    """Which column of Y the rows of Z^T are: those of tile j of 8, at 2 t + h, are 8 t + 2 j + h of 32."""
    row = np.arange(count)
    tile, place = row % TILE // 8, row % 8
    return row - row % TILE + 8 * (place // 2) + 2 * tile + place % 2


def kronecker_rows(width: int, sizes: tuple[int, int], config: KroneckerConfig | None = None) -> KroneckerRows | None:
    """How to multiply such rows, with ``config`` if that is given; None if the kernels do not."""
    if min(sizes) < 1 or max(sizes) > MOST_FACTOR or width % prod(sizes):
        return None
    found = KroneckerRows(width, sizes, config or KroneckerConfig(1))
    if config is None:
        found = replace(found, config=KroneckerConfig(_warps(found.count, 2)))
    if found.tiles[1] % found.config.blocks:
        return None
    return found if found.config.warps <= MOST_WARPS and found.held <= MOST_ROUNDS else None


SHARED_WIDTH, SHARED_ROWS = 11008, 16
"""From which width on up to how many rows are shared by the blocks of a cluster."""


def kronecker_configs(
    width: int, sizes: tuple[int, int], target: CudaTarget, direct: bool
) -> list[tuple[int, KroneckerConfig]]:
    """Configs for up to so many rows, in this order; the last one takes any number. ``direct``: elements are float16 that are multiplied
    as they are loaded.

    The rule fits what was fastest of 37 candidates on an H200, and of clusters on an H100, at 4096, 8192, 11008, 14336 and 28672:
    clusters for few wide rows, then a block per row and multiprocessor, then as many as registers allow; pairs of tiles where a
    row is much work.
    """
    rows = kronecker_rows(width, sizes)
    assert rows is not None
    count, chosen = rows.blocks * prod(rows.tiles), []
    if width >= SHARED_WIDTH and (shared := shared_config(width, sizes, target, direct)):
        chosen.append((SHARED_ROWS, shared))
    even = any(size % 2 == 0 for size in rows.tiles)
    paired = even and (count > 16 or count % 8 == 0)
    config = KroneckerConfig(_warps(count, 2 if paired else 1), ahead=direct, paired=paired)
    chosen.append((target.multiprocessors, _placed(rows, config, target)))
    config = KroneckerConfig(_warps(count, 2), ahead=direct, paired=even and count >= 8)
    w = replace(rows, config=config)
    elements = -(-width // w.threads)
    registers = 56 + TILE * w.held + (elements // 2 if direct else elements)
    fitting = min(65536 // (w.threads * registers), target.shared_sm // (4 * w.words + 3072), 2048 // w.threads, 8)
    config = replace(config, resident=fitting) if fitting > 1 else _placed(rows, config, target)
    chosen.append((0, config))
    return [entry for entry, (_, later) in zip(chosen, [*chosen[1:], (0, None)]) if entry[1] != later]


def shared_config(width: int, sizes: tuple[int, int], target: CudaTarget, direct: bool) -> KroneckerConfig | None:
    """Of the largest cluster that shares a row, if there is one."""
    rows = kronecker_rows(width, sizes)
    assert rows is not None
    blocks = max(n for n in range(1, 9) if rows.tiles[1] % n == 0)
    if blocks == 1 or not target.has("cluster"):
        return None
    warps = _warps(rows.blocks * prod(rows.tiles) // blocks, 1)
    return _placed(rows, KroneckerConfig(warps, ahead=direct, blocks=blocks), target)


def _placed(rows: KroneckerRows, config: KroneckerConfig, target: CudaTarget) -> KroneckerConfig:
    """Of one block to a multiprocessor: with the matrices in shared memory if there is room, if need be Z^T over X."""
    options = [replace(config, kept=kept, overlaid=overlaid) for kept in (True, False) for overlaid in (False, True)]
    return next((c for c in options if 4 * replace(rows, config=c).words + 2048 <= target.shared), options[-1])


def _warps(count: int, rounds: int) -> int:
    """So many that each has ``rounds`` tiles, or more where a block has no more warps."""
    turns = max(rounds, -(-count // MOST_WARPS))
    if turns > 2:  # sums fill more registers than sixteen warps have
        turns = max(turns, -(-count // 12))
    return -(-count // turns)


def refusal(width: int, sizes: tuple[int, int], target: CudaTarget) -> str:
    """Why rows are not multiplied by such a Kronecker product in one kernel; empty if they are."""
    product = f"a Kronecker product of {sizes[0]} x {sizes[1]} over rows of {width}"
    if min(sizes) < 1 or width % prod(sizes):
        return f"{product}: blocks of {prod(sizes)} do not divide the row"
    if max(sizes) > MOST_FACTOR:
        return f"{product}: factors go up to {MOST_FACTOR} rows"
    rows = kronecker_rows(width, sizes)
    if rows is None:
        return f"{product}: the sums of a row are held by one block, {MOST_WARPS * 3} tiles of {TILE} x {TILE} at most"
    config = kronecker_configs(width, sizes, target, False)[-1][1]
    if (need := 4 * replace(rows, config=config).words + 2048) > target.shared:
        return f"{product}: it takes {need} bytes of shared memory, {target.cpu} has {target.shared}"
    return ""
