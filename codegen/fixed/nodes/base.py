"""A node of a fixed-point program: integers in, integers out, said three times.

`Node.reference` is the definition, in numpy. `qcompile.codegen.fixed.tir` has the same function on one frame in TIR, folded by
a schedule, from which C99 and HLS C++ are printed. `qcompile.codegen.verilog` has the hardware. Tests keep all of them equal.

A node is *folded* to ``pe`` outputs and ``simd`` inputs per cycle; both divide the channels they split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np

from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import TargetError
from qcompile.formats.fixed import IntType


@dataclass(frozen=True)
class Folding:
    """``pe`` output and ``simd`` input channels per cycle."""

    pe: int = 1
    simd: int = 1

    def __str__(self) -> str:
        return f"PE={self.pe} SIMD={self.simd}"


@dataclass(frozen=True, eq=False)
class Node(ABC):
    """One operator on streams.

    Attributes:
        name: unique in its program; an identifier in C and Verilog.
        inputs: the streams it reads.
        folding: how much of it there is in hardware.
    """

    name: str
    inputs: tuple[Stream, ...]
    folding: Folding = field(default=Folding(), kw_only=True)

    kind: ClassVar[str]

    @property
    @abstractmethod
    def output(self) -> Stream:
        """The stream it writes, with exact ranges."""

    @abstractmethod
    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        """The function, on frames ``(V, tokens, channels)`` of integers; int64."""

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """Integer arrays of the node, by the name of the parameter of its PrimFunc; in order."""
        return {}

    @property
    def locals(self) -> dict[str, IntType]:
        """Narrowest types of buffers inside its PrimFunc, by name."""
        return {}

    @property
    @abstractmethod
    def pe_choices(self) -> tuple[int, ...]:
        """Values `Folding.pe` may have, ascending."""

    @property
    def simd_choices(self) -> tuple[int, ...]:
        """Values `Folding.simd` may have, ascending; only 1 where the inputs are taken as they are produced."""
        return (1,)

    @property
    @abstractmethod
    def interval(self) -> int:
        """Cycles between the starts of two frames when nothing else holds it up."""

    def folded(self, pe: int | None = None, simd: int | None = None) -> Self:
        """A copy with another folding.

        Raises:
            TargetError: the folding does not divide the channels.
        """
        folding = Folding(self.folding.pe if pe is None else pe, self.folding.simd if simd is None else simd)
        if folding.pe not in self.pe_choices or folding.simd not in self.simd_choices:
            raise TargetError(
                f"{self.name}: {folding} is not possible; PE is one of {self.pe_choices}, SIMD of {self.simd_choices}"
            )
        return replace(self, folding=folding)


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of a positive integer, ascending."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)
