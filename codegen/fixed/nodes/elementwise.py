"""Nodes that treat every element alike: affine maps, tables, sums and products of two streams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType, Requantize, shift_half_even


@dataclass(frozen=True, eq=False)
class _Elementwise(Node):
    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].channels)

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // self.folding.pe


@dataclass(frozen=True, eq=False)
class Affine(_Elementwise):
    """``y = clamp(round_half_even((x * multiplier[c] + offset[t, c]) / 2^shift))``: a change of scale, a constant added.

    Attributes:
        step: multipliers per channel or one for all, shift and range.
        offset: int64 ``(1 or tokens, C)``, in steps of the product.
        scale: of the output stream.
    """

    step: Requantize
    offset: np.ndarray
    scale: np.ndarray | float | None = None

    kind = "affine"

    def __post_init__(self) -> None:
        x = self.inputs[0]
        if self.offset.shape not in ((1, x.channels), x.shape):
            raise FormatError(f"{self.name}: an offset of shape {self.offset.shape} for a stream of {x.shape}")

    @cached_property
    def total_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range per channel of what is shifted."""
        ends = np.stack([v * self.step.multiplier for v in (self.inputs[0].low, self.inputs[0].high)])
        return ends.min(0) + self.offset.min(0), ends.max(0) + self.offset.max(0)

    @property
    def rounding(self) -> Requantize:
        """The shift and the clamp alone."""
        return Requantize(np.ones(1, np.int64), self.step.shift, self.step.low, self.step.high)

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        low, high = self.rounding.bounds(*self.total_bounds)
        return Stream(self.name, x.tokens, x.channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.rounding.apply(inputs[0] * self.step.multiplier + self.offset)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        channels = self.inputs[0].channels
        return {"multiplier": np.broadcast_to(self.step.multiplier, (channels,)), "offset": self.offset}

    @property
    def locals(self) -> dict[str, IntType]:
        low, high = self.total_bounds
        return {"product": IntType.covering(int(low.min()), int(high.max()))}


@dataclass(frozen=True, eq=False)
class Lookup(_Elementwise):
    """``y = table[x - low]``: any function of one integer.

    Attributes:
        table: int64, one entry for every value of the input's type, ascending.
        scale: of the output stream.
    """

    table: np.ndarray
    scale: np.ndarray | float | None = None

    kind = "lookup"

    def __post_init__(self) -> None:
        if self.table.shape != (1 << self.inputs[0].type.bits,):
            raise FormatError(f"{self.name}: a table of {len(self.table)} entries for {self.inputs[0].type}")

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        seen = [self.table[lo - x.type.low : hi - x.type.low + 1] for lo, hi in zip(x.low, x.high)]
        low, high = (np.array([f(s) for s in seen], np.int64) for f in (np.min, np.max))
        return Stream(self.name, x.tokens, x.channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.table[inputs[0] - self.inputs[0].type.low]

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"table": self.table}


@dataclass(frozen=True, eq=False)
class _Joined(_Elementwise):
    def __post_init__(self) -> None:
        if len(self.inputs) != 2 or self.inputs[0].shape != self.inputs[1].shape:
            raise FormatError(f"{self.name}: two streams of the same shape are needed")


@dataclass(frozen=True, eq=False)
class Add(_Joined):
    """``y = clamp(round_half_even((a * multipliers[0] + b * multipliers[1]) / 2^shift))``: a residual sum, exact before rounding.

    Attributes:
        multipliers: of both streams.
        shift, low, high: as in `Requantize`.
        scale: of the output stream.
    """

    multipliers: tuple[int, int]
    shift: int
    low: int
    high: int
    scale: np.ndarray | float | None = None

    kind = "add"

    @cached_property
    def total_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range per channel of what is shifted."""
        ends = [np.stack([s.low * m, s.high * m]) for s, m in zip(self.inputs, self.multipliers)]
        return ends[0].min(0) + ends[1].min(0), ends[0].max(0) + ends[1].max(0)

    @property
    def rounding(self) -> Requantize:
        """The shift and the clamp."""
        return Requantize(np.ones(1, np.int64), self.shift, self.low, self.high)

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        low, high = self.rounding.bounds(*self.total_bounds)
        return Stream(self.name, x.tokens, x.channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        total = inputs[0] * self.multipliers[0] + inputs[1] * self.multipliers[1]
        return np.clip(shift_half_even(total, self.shift), self.low, self.high)

    @property
    def locals(self) -> dict[str, IntType]:
        low, high = self.total_bounds
        return {"product": IntType.covering(int(low.min()), int(high.max()))}


@dataclass(frozen=True, eq=False)
class Multiply(_Joined):
    """``y = requantize(a * b)``: gates.

    Attributes:
        step: one multiplier for all, shift and range.
        scale: of the output stream.
    """

    step: Requantize
    scale: np.ndarray | float | None = None

    kind = "multiply"

    @cached_property
    def total_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range per channel of ``a * b``."""
        a, b = self.inputs
        ends = np.stack([x * y for x in (a.low, a.high) for y in (b.low, b.high)])
        return ends.min(0), ends.max(0)

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        low, high = self.step.bounds(*self.total_bounds)
        return Stream(self.name, x.tokens, x.channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.step.apply(inputs[0] * inputs[1])

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"multiplier": np.broadcast_to(self.step.multiplier, (self.inputs[0].channels,))}

    @property
    def locals(self) -> dict[str, IntType]:
        return {"product": self.step.product_type(*self.total_bounds)}
