"""How the tensor cores rotate rows by Walsh-Hadamard blocks: who holds which element, and where it lies in between.

An order ``core 2^p`` is a Kronecker product, so its factors may be applied one after another in any order:

    8 bits of the index (or p, if fewer)   two products of 16 x 16 signs with 16 x 16 elements, by one warp, in registers
    up to 2 more                           butterflies between the 256-element vectors a warp holds
    the rest, and the core                 a pass through shared memory: `radix` points, `stride` apart, to a thread

A warp holds a vector of 256 elements as it is loaded: lane l has elements 8 l .. 8 l + 7. With l = 4 g + t these are the
second operand of `mma` (PTX ISA, "Matrix fragments for mma.m16n8k8 / m16n8k16"), if bits of the index are named so:

    first product    its 16 positions are bits 0, 3, 4, 1; the other bits, 5, 6, 7 and 2, tell its columns apart
    second product   positions 5, 6, 7, 2; columns 0, 3, 4, 1

What the first one leaves in a lane is what the second one takes, and what that leaves are elements 8 l .. 8 l + 7 again:
nothing is exchanged between lanes. Operands are tf32; a float32 is split in two of them, 22 bits in all. Float16 and bfloat16
rows go into the first product as they are.

Sources: Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform" (1976); Agarwal et al., "HadaCore:
Tensor Core Accelerated Hadamard Transform Kernel" (2024), for the idea of a transform by chained products.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.formats.hadamard import factors

VECTOR = 256
"""Elements a warp transforms in registers."""

FIRST, SECOND = (0, 3, 4, 1), (5, 6, 7, 2)
"""Bits of the index that are positions of the two products, the lowest bit of the position first."""

MOST_THREADS = 512


@dataclass(frozen=True)
class WarpRotation:
    """A row of ``width`` elements in blocks of ``order``.

    Attributes:
        bits: of the index within a vector that are transformed.
        held: vectors a warp holds that are neighbours, with butterflies between them; 1, 2 or 4.
        radix: points of the pass through shared memory; 1 if there is none.
        neighbours: columns of a thread in that pass.
        warps: of the block that computes a row.
    """

    width: int
    order: int
    bits: int
    held: int
    radix: int
    neighbours: int
    warps: int

    @property
    def threads(self) -> int:
        """Of the block."""
        return 32 * self.warps

    @property
    def tasks(self) -> int:
        """What warps take in turn: `held` vectors."""
        return self.width // (VECTOR * self.held)

    @property
    def rounds(self) -> int:
        """Tasks of a warp, at most."""
        return -(-self.tasks // self.warps)

    @property
    def stride(self) -> int:
        """Distance of the points of the pass through shared memory."""
        return self.order // self.radix


def warp_rotation(width: int, order: int) -> WarpRotation | None:
    """How to rotate such rows; None if they are not made of whole vectors, or blocks are too small for the pass that is left."""
    if not order or width % VECTOR:
        return None
    _, power = factors(order)
    bits = min(power, 8)
    vectors = width // VECTOR
    more = min(max(power - 8, 0), 2)
    while vectors % (1 << more):
        more -= 1
    while more and order >> bits + more > 1 and vectors >> more < 8:  # work for eight warps
        more -= 1
    held = 1 << more
    radix = order >> bits + more
    if radix == 1:
        tasks = vectors // held
        rounds = -(-tasks // (MOST_THREADS // 32))
        return WarpRotation(width, order, bits, held, 1, 1, -(-tasks // rounds))
    if order // radix < 64 or radix > 48:
        return None
    columns = width // radix
    for neighbours in (1, 2, 4):
        threads = columns // neighbours
        few_enough = threads <= MOST_THREADS and (threads <= 32 * vectors // held or neighbours == 4)
        if columns % neighbours == 0 and threads % 32 == 0 and few_enough:
            return WarpRotation(width, order, bits, held, radix, neighbours, threads // 32)
    return None
