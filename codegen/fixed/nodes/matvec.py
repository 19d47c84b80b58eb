"""The matrix-vector unit: ``y[t] = requantize(x[t] @ weight + bias)``.

Folded to ``pe`` columns and ``simd`` rows it takes ``(K / simd) * (N / pe)`` cycles per token: every pass over ``x[t]``
makes ``pe`` outputs (Umuroglu et al., "FINN" (2017), section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType, Requantize

MOST_THRESHOLD_BITS = 4
"""Outputs of more bits are multiplied: every bit doubles the thresholds."""


@dataclass(frozen=True, eq=False)
class MatVec(Node):
    """A constant matrix times every token.

    Attributes:
        weight: int64 ``(K, N)``.
        bias: int64 ``(N,)``, in steps of the accumulator.
        requantize: to the output; None to put out accumulators.
        scale: of the output stream.
        products: how hardware forms them: ``lut`` by adders, ``dsp`` by multipliers, ``constant`` all in one cycle by adders
            made for this matrix; then there is one folding only; ``serial`` a bit of the weights per cycle.
        group_scale: int64 ``(G, N)`` where ``weight`` is integers times the scale of their group.
        group_length: consecutive k of a group; the last group may be shorter. 0 where there are no groups.
        scaling: how hardware requantizes: ``multiply``, or ``thresholds``, a search that needs no multiplier.
    """

    weight: np.ndarray
    bias: np.ndarray
    requantize: Requantize | None = None
    scale: np.ndarray | float | None = None
    products: str = "lut"
    scaling: str = "multiply"
    group_scale: np.ndarray | None = None
    group_length: int = 0

    kind = "matvec"

    def __post_init__(self) -> None:
        k, n = self.weight.shape
        if self.inputs[0].channels != k or self.bias.shape != (n,):
            raise FormatError(f"{self.name}: {self.inputs[0].channels} channels meet a weight of shape {(k, n)}")
        if self.group_scale is not None and (
            -(-k // max(self.group_length, 1)) != self.groups or (self.codes * self._spread != self.weight).any()
        ):
            raise FormatError(f"{self.name}: its weights are no multiples of the scales of their groups")

    @property
    def k(self) -> int:
        """Input channels."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Output channels."""
        return self.weight.shape[1]

    @property
    def groups(self) -> int:
        """Groups of input channels that share a scale."""
        return 1 if self.group_scale is None else len(self.group_scale)

    @property
    def _spread(self) -> np.ndarray:
        assert self.group_scale is not None
        return np.repeat(self.group_scale, self.group_length, axis=0)[: self.k]

    @property
    def group_rows(self) -> int:
        """Steps of ``simd`` channels per group; those past the last channel multiply by zero."""
        return (self.group_length or self.k) // self.folding.simd

    @cached_property
    def codes(self) -> np.ndarray:
        """Weights without the scales of their groups."""
        if self.group_scale is None:
            return self.weight
        return self.weight // np.where(self._spread == 0, 1, self._spread)

    @cached_property
    def code_type(self) -> IntType:
        """The narrowest type of `codes`."""
        return IntType.covering(int(self.codes.min()), int(self.codes.max()))

    @property
    def thresholds(self) -> np.ndarray | None:
        """Thresholds int64 ``(2^bits - 1, N)`` of the search for ``bits`` bits; None where hardware multiplies.

        They begin at the smallest output; those that no sum reaches fill up the count.
        """
        step = self.requantize
        if self.scaling != "thresholds" or step is None or step.is_shift or (step.multiplier < 0).any():
            return None
        low, high = self.accumulator_bounds
        found = step.thresholds(low, high)
        bits = len(found).bit_length()
        if bits > MOST_THRESHOLD_BITS:
            return None
        unreached = np.broadcast_to(high.max() + 1, ((1 << bits) - 1 - len(found), self.n))
        return np.concatenate([found, unreached])

    @cached_property
    def weight_type(self) -> IntType:
        """The narrowest signed type of the weights; unsigned if none is negative."""
        return IntType.covering(int(self.weight.min()), int(self.weight.max()))

    @cached_property
    def accumulator_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range of ``x @ weight + bias`` per output channel."""
        low, high = dot_bounds(self.inputs[0].low, self.inputs[0].high, self.weight)
        return low + self.bias, high + self.bias

    @cached_property
    def accumulator(self) -> IntType:
        """A type for the accumulator at every moment: all partial sums, in any order, bias first or last."""
        x = self.inputs[0]
        low, high = dot_bounds(np.minimum(x.low, 0), np.maximum(x.high, 0), self.weight)
        ends = np.stack([low, high, low + self.bias, high + self.bias])
        return IntType.covering(int(ends.min()), int(ends.max()))

    @cached_property
    def output(self) -> Stream:
        low, high = self.accumulator_bounds
        if self.requantize is not None:
            low, high = self.requantize.bounds(low, high)
        return Stream(self.name, self.inputs[0].tokens, self.n, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        # Products of this size are exact in float64, where the multiplication is fast.
        exact = self.accumulator.bits <= 52
        x = inputs[0].astype(np.float64 if exact else np.int64)
        accumulator = (x @ self.weight.astype(x.dtype)).astype(np.int64) + self.bias
        return accumulator if self.requantize is None else self.requantize.apply(accumulator)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        step = np.ones(1, np.int64) if self.requantize is None else self.requantize.multiplier
        return {"weight": self.weight, "bias": self.bias, "multiplier": np.broadcast_to(step, (self.n,))}

    @property
    def locals(self) -> dict[str, IntType]:
        found = {"accumulator": self.accumulator}
        if self.requantize is not None:
            found["product"] = self.requantize.product_type(*self.accumulator_bounds)
        return found

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return (self.n,) if self.products == "constant" else divisors(self.n)

    @property
    def simd_choices(self) -> tuple[int, ...]:
        if self.products == "constant":
            return (self.k,)
        if self.products != "serial":
            return divisors(self.k)
        # The sum of a group takes at least as long as its multiplication, a cycle per bit of the scale.
        length, needed = self.group_length or self.k, 1
        if self.group_scale is not None:
            needed = IntType.covering(min(-1, int(self.group_scale.min())), int(self.group_scale.max())).bits
        lanes = divisors(int(np.gcd(length, self.k)))
        found = tuple(d for d in lanes if self.code_type.bits * length // d >= needed)
        if not found:
            raise FormatError(
                f"{self.name}: groups of {length} weights are too short to multiply their sums bit by bit; "
                "use products=lut or longer groups"
            )
        return found

    @property
    def interval(self) -> int:
        rows = self.k // self.folding.simd
        if self.products == "serial":
            rows = self.code_type.bits * self.groups * self.group_rows
        return self.inputs[0].tokens * rows * (self.n // self.folding.pe)


def dot_bounds(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact range of ``x @ weight`` for ``low <= x <= high``, all int64."""
    up, down = np.maximum(weight, 0), np.minimum(weight, 0)
    return low @ up + high @ down, high @ up + low @ down
