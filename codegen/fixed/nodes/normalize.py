"""Layer and RMS normalisation in integers, without gain and offset (an `Affine` follows).

For a row ``x`` of ``C`` integers with a step that cancels out,

    S1 = sum(x)  (0 for RMS),   S2 = sum(x^2),   d = C x - S1,   v = C S2 - S1^2 + epsilon,   z = d / sqrt(v)

since ``v`` is ``C^2`` times the variance. The root is a table of ``m = v / 4^k`` in [1, 4), with F bits after the point:

    k = floor(log2(v) / 2),   i = floor(v 2^F / 4^k),   r_i = round(2^R / sqrt((i + 1/2) / 2^F)),
    z = round_half_even(d r_i / 2^(R + k - Z))            Z bits after the point

Its relative error is below ``2^-(F + 2)``. The range follows from ``sum(d) = 0``: ``d^2 <= (C - 1) (v - epsilon)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType

F, R, Z = 8, 14, 10
"""Bits after the point: of the table's index, of its entries, of the result."""


def root_table() -> np.ndarray:
    """``r_i`` for ``i = 2^F .. 4 * 2^F - 1``; int64."""
    i = np.arange(1 << F, 4 << F)
    return np.rint((1 << R) / np.sqrt((i + 0.5) / (1 << F))).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Normalize(Node):
    """Every token to mean 0 (if ``centred``) and variance 1.

    Attributes:
        epsilon: positive integer, added to ``v``.
        centred: False for RMS normalisation.
    """

    epsilon: int
    centred: bool = True

    kind = "normalize"

    def __post_init__(self) -> None:
        if self.epsilon < 1:
            raise FormatError(f"{self.name}: epsilon must be a positive integer")
        if (self.square_bound << F).bit_length() > 62:
            raise FormatError(
                f"{self.name}: squares of {self.inputs[0].type} over {self.inputs[0].channels} are too large"
            )

    @property
    def reach(self) -> int:
        """Largest magnitude of an input."""
        return max(abs(int(self.inputs[0].low.min())), abs(int(self.inputs[0].high.max())))

    @property
    def square_bound(self) -> int:
        """No ``v`` is larger."""
        return (self.inputs[0].channels * self.reach) ** 2 + self.epsilon

    @property
    def largest_k(self) -> int:
        """No ``k`` is larger."""
        return (self.square_bound.bit_length() - 1) // 2

    @cached_property
    def deviation_bound(self) -> int:
        """No ``|d|`` is larger."""
        x = self.inputs[0]
        low, high = int(x.low.min()), int(x.high.max())
        return (x.channels - 1) * (high - low) if self.centred else x.channels * self.reach

    @cached_property
    def bound(self) -> int:
        """No ``|z|`` is larger: the worst of every entry of the table and every ``k``."""
        c = self.inputs[0].channels
        worst, table = 0, root_table().tolist()
        for k in range(self.largest_k + 1):
            for i, r in zip(range(1 << F, 4 << F), table):
                largest_v = min((((i + 1) << (2 * k)) - 1) >> F, self.square_bound)
                if largest_v < 1 << (2 * k):
                    continue
                room = max(largest_v - self.epsilon, 0)
                d = min(isqrt((c - 1) * room if self.centred else c * room), self.deviation_bound)
                worst = max(worst, ((d * r) >> (R + k - Z)) + 1)
        return worst

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        ends = np.full(x.channels, self.bound, np.int64)
        return Stream(self.name, x.tokens, x.channels, -ends, ends, 2.0**-Z)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        x = inputs[0]
        c = x.shape[2]
        s1 = x.sum(2, keepdims=True) if self.centred else np.zeros((*x.shape[:2], 1), np.int64)
        v = c * (x * x).sum(2, keepdims=True) - s1 * s1 + self.epsilon
        k = sum((v >= 1 << (2 * j)).astype(np.int64) for j in range(1, self.largest_k + 1))
        k = np.broadcast_to(k, v.shape)
        r = root_table()[((v << F) >> (2 * k)) - (1 << F)]
        p, s = (c * x - s1) * r, R + k - Z
        return (p + (np.int64(1) << (s - 1)) - 1 + ((p >> s) & 1)) >> s

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"roots": root_table()}

    @property
    def sum_type(self) -> IntType:
        """A type for ``S1``."""
        x = self.inputs[0]
        return IntType.covering(min(0, int(x.low.min()) * x.channels), max(0, int(x.high.max()) * x.channels))

    @property
    def locals(self) -> dict[str, IntType]:
        return {
            "total": self.sum_type,
            "squares": IntType.covering(0, self.inputs[0].channels * self.reach**2),
        }

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].channels)

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // self.folding.pe
