"""Sums over all tokens: global average pooling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.formats.fixed import IntType, Requantize


@dataclass(frozen=True, eq=False)
class TokenSum(Node):
    """``y[c] = requantize(sum_t x[t, c])``.

    Attributes:
        requantize: one multiplier for all; the division by the number of tokens is part of it.
        scale: of the output stream.
    """

    requantize: Requantize
    scale: np.ndarray | float | None = None

    kind = "token_sum"

    @cached_property
    def accumulator_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range of the sum per channel."""
        x = self.inputs[0]
        return x.low * x.tokens, x.high * x.tokens

    @cached_property
    def accumulator(self) -> IntType:
        """A type for all partial sums."""
        low, high = self.accumulator_bounds
        return IntType.covering(min(0, int(low.min())), max(0, int(high.max())))

    @cached_property
    def output(self) -> Stream:
        low, high = self.requantize.bounds(*self.accumulator_bounds)
        return Stream(self.name, 1, self.inputs[0].channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.requantize.apply(inputs[0].sum(1, keepdims=True))

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"multiplier": np.broadcast_to(self.requantize.multiplier, (self.inputs[0].channels,))}

    @property
    def locals(self) -> dict[str, IntType]:
        return {
            "accumulator": self.accumulator,
            "product": self.requantize.product_type(*self.accumulator_bounds),
        }

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].channels)

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // self.folding.pe
