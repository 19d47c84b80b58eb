"""How the tensor cores rotate rows by Walsh-Hadamard blocks: who holds which element, and where it lies in between.

An order ``core 2^p`` is a Kronecker product, so its factors may be applied one after another in any order:

    8 bits of the index (or p, if fewer)   two products of 16 x 16 signs with 16 x 16 elements, by one warp, in registers
    up to 2 more                           butterflies between the 256-element vectors a warp holds
    the rest, and the core                 through shared memory: a product of ``radix x radix`` signs, filled up with zeros to
                                           multiples of 16, with 32 columns, by one warp

A warp holds a vector of 256 elements as it is loaded: lane l has elements 8 l .. 8 l + 7, in words of two. With l = 4 g + t
these are the second operand of `mma` (PTX ISA, "Matrix fragments for mma.m16n8k16"), if bits of the index are named so:

    first product    its 16 positions are bits 0, 3, 4, 1; the other bits, 5, 6, 7 and 2, tell its columns apart
    second product   positions 5, 6, 7, 2; columns 0, 3, 4, 1

What the first one leaves in a lane is what the second one takes, and what that leaves are elements 8 l .. 8 l + 7 again:
nothing is exchanged between lanes. In shared memory word j of lane l is word 32 j + l of its vector, so that four lanes' words
j are a row of eight columns of the third product, read by ``ldmatrix.trans``; what a lane gets of four such products are
eight neighbours.

Elements are float16 between the products, signs are +-1/4, sums float32. So every step keeps the length of a row and rounds by
what float16 rows were rounded by before. Rows of other types, and rows that leave float16's range on the way, are multiplied
with a power of two that is found by trying again.

A row may be shared by the blocks of a cluster: each transforms its vectors, puts the results where their columns are multiplied,
and multiplies its columns. Or each loads all of the row, in 2^s parts, and adds them up by the signs of its row of the Hadamard matrix
of that order: bits of the index are transformed so, too, and what is left for the block is a row of its own. Blocks then exchange
nothing but the maximum.

Sources: Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform" (1976); Agarwal et al., "HadaCore:
Tensor Core Accelerated Hadamard Transform Kernel" (2024), for the idea of a transform by chained products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qcompile.formats.hadamard import factors
from qcompile.targets.cuda import CudaTarget

VECTOR = 256
"""Elements a warp transforms in registers."""

FIRST, SECOND = (0, 3, 4, 1), (5, 6, 7, 2)
"""Bits of the index that are positions of the two products, the lowest bit of the position first."""

COLUMNS = 32
"""Of the third product, by one warp."""

MOST_RADIX = 48
"""Its signs are held in registers."""


@dataclass(frozen=True)
class RotationConfig:
    """How a row is divided.

    Attributes:
        warps: of a block.
        held: vectors a warp holds that are neighbours, with butterflies between them; 1, 2 or 4.
        blocks: that share a row, a cluster.
        resident: blocks that are to fit a multiprocessor.
        twice: the third product is computed for the maximum and again for the codes, instead of being kept.
        ahead: the next row of a block is loaded while one is computed.
        gathered: blocks that share a row load all of it and add up what they rotate, instead of exchanging it.
        staged: warps find the maximum of a block before blocks tell each other.
    """

    warps: int
    held: int
    blocks: int = 1
    resident: int = 1
    twice: bool = False
    ahead: bool = False
    gathered: bool = False
    staged: bool = False


@dataclass(frozen=True)
class WarpRotation:
    """A row of ``width`` elements in blocks of ``order``.

    Attributes:
        bits: of the index within a vector that are transformed.
        radix: points of the third product; 1 if there is none.
        gather: blocks that each transform such a row, made of this many, into a share of the result; 1 if there is one row.
    """

    width: int
    order: int
    bits: int
    radix: int
    config: RotationConfig
    gather: int = 1

    @property
    def held(self) -> int:
        """See `RotationConfig`."""
        return self.config.held

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.config.warps

    @property
    def tasks(self) -> int:
        """What warps take in turn: `held` vectors."""
        return self.width // (VECTOR * self.held)

    @property
    def share(self) -> int:
        """Tasks of a block, at most."""
        return -(-self.tasks // self.config.blocks)

    @property
    def rounds(self) -> int:
        """Tasks of a warp, at most."""
        return -(-self.share // self.config.warps)

    @property
    def shares(self) -> int:
        """Blocks of a row."""
        return self.config.blocks * self.gather

    @property
    def run(self) -> int:
        """Neighbours of a row that are neighbours before they are gathered."""
        return 1 << factors(self.order)[1]

    def gathered(self, at: Any, part: Any) -> Any:
        """The column that is added up to column ``at``, of ``gather``, and where it goes in the result of block ``part``."""
        return at // self.run * (self.run * self.gather) + part * self.run + at % self.run if self.gather > 1 else at

    @property
    def stride(self) -> int:
        """Distance of the points of the third product."""
        return self.order // self.radix

    @property
    def quads(self) -> int:
        """Products with 32 columns for what a vector holds of a point."""
        return (1 << self.bits) // COLUMNS

    @property
    def pieces(self) -> int:
        """Products with 32 columns that make a row."""
        return self.width // (self.radix * COLUMNS)

    @property
    def piece_share(self) -> int:
        """Those of a block, at most."""
        return -(-self.pieces // self.config.blocks)

    @property
    def piece_rounds(self) -> int:
        """Those of a warp, at most."""
        return -(-self.piece_share // self.config.warps)

    @property
    def tiles(self) -> int:
        """Of 16 points."""
        return -(-self.radix // 16)

    @property
    def row_words(self) -> int:
        """Words of shared memory: four are left out after `held` vectors, so that eight points lie in different banks."""
        return self.width // 2 + 4 * self.tasks if self.radix > 1 else 0

    def vector_place(self, vector: int) -> int:
        """First word of a vector."""
        return vector * (VECTOR // 2) + vector // self.held * 4

    def point_place(self, block: int, point: int, part: int, quad: int) -> int:
        """First word of 8 columns of a point in product j = 0; those of product j are 32 j words further."""
        if self.bits == 8:
            return (block * self.radix + point) * (self.held * VECTOR // 2 + 4) + part * (VECTOR // 2) + quad * 4
        index = block * self.radix + point
        vector, lane = index >> 8 - self.bits, (index & (1 << 8 - self.bits) - 1) << self.bits - 3
        return self.vector_place(vector) + lane + quad * 4

    def piece_of(self, vector: int, lane: int) -> int:
        """The product with 32 columns that an element of a lane is for."""
        if self.bits == 8:
            return (vector // (self.held * self.radix) * self.held + vector % self.held) * self.quads + lane // 4
        index = (vector << 8 - self.bits) + (lane >> self.bits - 3)
        return index // self.radix * self.quads + lane % (1 << self.bits - 3) // 4

    def piece(self, number: int) -> tuple[int, int, int]:
        """Hadamard block, vector of those held together, columns / 32 within it."""
        group, quad = number // self.quads, number % self.quads
        return group // self.held, group % self.held, quad

    def column(self, block: int, point: int, part: int, quad: int) -> int:
        """First of 32 columns."""
        return block * self.order + point * self.stride + part * VECTOR + quad * COLUMNS


def rotations(width: int, order: int) -> list[WarpRotation]:
    """The ways to divide such a row over the vectors of a warp and the third product, for one block per row; none if rows are not
    made of whole vectors or the third product would be too large or too small."""
    if not order or width % VECTOR:
        return []
    power = factors(order)[1]
    bits = min(power, 8)
    found = []
    for held in (1, 2, 4):
        more = held.bit_length() - 1
        radix = order >> bits + more
        if power - bits < more or width % (VECTOR * held):
            continue
        if radix > 1 and (bits < 5 or not 8 <= radix <= MOST_RADIX):
            continue
        tasks = width // (VECTOR * held)
        pieces = width // (radix * COLUMNS) if radix > 1 else tasks
        rounds = -(-max(tasks, pieces) // 16)
        warps = -(-max(tasks, pieces) // rounds)
        found.append(WarpRotation(width, order, bits, radix, RotationConfig(warps, held)))
    return found


def warp_rotation(width: int, order: int, config: RotationConfig | None = None) -> WarpRotation | None:
    """How to rotate such rows, with ``config`` if that is given; None if tensor cores do not."""
    if config is not None and config.gathered:
        inner, parts = replace(config, blocks=1), config.blocks
        if order % parts or parts & (parts - 1) or factors(order)[1] < parts.bit_length() + 2:
            return None
        found = [
            replace(w, config=inner, gather=parts)
            for w in rotations(width // parts, order // parts)
            if w.held == config.held and factors(w.order)[0] == factors(order)[0]
        ]
        return found[0] if found else None
    found = rotations(width, order)
    if config is not None:
        found = [replace(w, config=config) for w in found if w.held == config.held]
    if not found:
        return None
    # The fewest vectors to a warp whose third product takes 32 points at most.
    return next((w for w in found if w.radix <= 32), found[0])


def rotation_configs(width: int, order: int, target: CudaTarget, direct: bool) -> list[tuple[int, RotationConfig]]:
    """Configs for up to so many rows, in this order; the last one takes any number. ``direct``: elements are float16 and go to
    the tensor cores as they are loaded.

    The rule fits what was fastest of 150 candidates on H100 and H200 at 4096, 8192, 11008, 14336 and 28672: clusters where a row
    is much work for one multiprocessor and rows are few, then a block per multiprocessor, then as many as registers allow.
    """
    found = rotations(width, order)
    best = warp_rotation(width, order)
    assert best is not None
    chosen = []
    most = max((w for w in found if w.radix == 1 or w.radix >= 12), key=lambda w: w.held, default=best)
    if direct and width == order and target.has("cluster"):
        for rows, blocks, warps, held, staged in GATHERED.get(width, ()):
            chosen.append((rows, RotationConfig(warps, held, blocks=blocks, ahead=True, gathered=True, staged=staged)))
    gathered = chosen[-1][0] if chosen else 0
    if target.has("cluster") and width >= SHARED_WIDTH:
        for rows, blocks in _sharing(most):
            if rows <= gathered:
                continue
            # Two blocks have as many warps as vectors to load, more blocks as many as products.
            work = most.pieces if most.radix > 1 and blocks > 2 else most.tasks
            share = -(-work // blocks)
            warps = -(-share // -(-share // (8 if most.radix == 1 else 16)))
            chosen.append((rows, RotationConfig(warps, most.held, blocks, ahead=direct)))
    if width > NARROW:
        chosen.append((target.multiprocessors, _fitting(most, _warps(most, 16), direct)))
    few = 3 if best.radix == 1 else 7  # elements of a lane / 8
    chosen.append((0, _fitting(best, _warps(best, max(8, -(-width // (VECTOR * few)))), direct)))
    return [entry for entry, (_, later) in zip(chosen, [*chosen[1:], (0, None)]) if entry[1] != later]


GATHERED = {
    4096: ((16, 8, 1, 2, False), (66, 2, 4, 1, False)),
    8192: ((16, 4, 8, 1, False), (66, 2, 4, 2, False)),
    14336: ((8, 8, 4, 1, False), (32, 2, 14, 1, False)),
    28672: ((8, 8, 7, 1, True), (16, 8, 4, 1, True), (66, 2, 14, 2, True)),
}
"""By width: up to so many rows are gathered by so many blocks, their warps, the vectors one holds, and whether maxima are staged. The
fastest of six to ten on an H200."""

SHARED_WIDTH = 8192
"""From which width on few rows are shared by blocks."""


def _sharing(w: WarpRotation) -> list[tuple[int, int]]:
    """Up to so many rows are shared by so many blocks."""
    if w.radix == 1:  # nothing but the maximum to tell each other
        return [(16, 4), (64, 2)]
    if w.tiles > 1 and w.pieces < 32:  # eighths would be less than four products of several tiles
        return [(16, 4), (32, 2)]
    return [(8, 8), (16, 4), (32, 2)]


NARROW = 4096
"""Up to this width all numbers of rows have the same config."""


def _warps(w: WarpRotation, most: int) -> int:
    """At most so many, in as many turns, but no more than have work."""
    work = w.pieces if w.radix > 1 else w.tasks
    return -(-work // -(-work // min(most, 16)))


def _fitting(w: WarpRotation, warps: int, direct: bool) -> RotationConfig:
    """As many blocks as the registers of a multiprocessor hold, counted by what a thread keeps."""
    w = replace(w, config=replace(w.config, warps=warps))
    chunks = w.rounds * w.held
    kept = 16 * w.tiles * w.piece_rounds if w.radix > 1 else 8 * chunks
    registers = 32 + kept + (4 if direct else 12) * chunks
    resident = max(1, min(8, 65536 // (32 * warps * registers), 2048 // (32 * warps)))
    return RotationConfig(warps, w.held, resident=resident, ahead=direct)
