"""Attention in integers: products of two streams, and the softmax between them.

The softmax takes differences to the largest logit, so its exponentials come from a table; the probabilities are powers of two,

    e_s = table[max(x) - x_s],    code_s = clip(round(log2(sum(e) / e_s)), 0, L - 1),    p_s = 2^-code_s

so that the product with the values is shifts and additions (Li et al., "RepQ-ViT" (2023), section 3.3, with base 2). In integers

    code_s = number of j in 0 .. L - 2 with  sum(e) * 2^15 > e_s * 2^j * 46341        46341 ~ 2^15 sqrt(2)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType, Requantize

ROOT_TWO = 46341
"""``sqrt(2)`` with 15 fractional bits, rounded up."""

EXP_BITS = 12
"""Fractional bits of exponentials."""


def exp_table(scale: float, kind: IntType) -> np.ndarray:
    """``exp(-scale * d)`` with `EXP_BITS` fractional bits for ``d = 0 .. 2^bits - 1``; int64."""
    d = np.arange(1 << kind.bits)
    return np.rint(np.exp(-scale * d) * (1 << EXP_BITS)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Softmax(Node):
    """The softmax of every ``channels / heads`` consecutive channels, as codes of powers of two.

    Attributes:
        table: exponentials, see `exp_table`.
        heads: rows per token.
        bits: of a code; ``L = 2^bits``.
    """

    table: np.ndarray
    heads: int = 1
    bits: int = 4

    kind = "softmax"

    def __post_init__(self) -> None:
        x = self.inputs[0]
        if x.channels % self.heads:
            raise FormatError(f"{self.name}: {x.channels} channels are not {self.heads} rows")
        if len(self.table) <= int(x.high.max() - x.low.min()) or self.table[0] <= 0:
            raise FormatError(f"{self.name}: the table of exponentials is too short or begins with 0")

    @property
    def length(self) -> int:
        """Of a row."""
        return self.inputs[0].channels // self.heads

    @property
    def sum_type(self) -> IntType:
        """A type for the sum of exponentials."""
        return IntType.covering(0, self.length * int(self.table.max()))

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        return Stream.of(self.name, x.tokens, x.channels, IntType(self.bits, False))

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        x = inputs[0].reshape(*inputs[0].shape[:2], self.heads, self.length)
        e = self.table[x.max(-1, keepdims=True) - x]
        total = e.sum(-1, keepdims=True) << 15
        code = sum(((e << j) * ROOT_TWO < total).astype(np.int64) for j in range((1 << self.bits) - 1))
        return np.asarray(code).reshape(inputs[0].shape)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"table": self.table}

    @property
    def locals(self) -> dict[str, IntType]:
        return {
            "largest": self.inputs[0].type,
            "exponential": IntType.covering(0, int(self.table.max())),
            "total": self.sum_type,
        }

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.length)

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // self.folding.pe


@dataclass(frozen=True, eq=False)
class MatMul(Node):
    """The product of two streams, head by head.

        scores   a (T, H D), b (S, H D):  y[t, h S + s] = requantize(sum_d a[t, h D + d] * b[s, h D + d])
        values   a (T, H S), b (S, H D):  y[t, h D + d] = requantize(sum_s a[t, h S + s] * b[s, h D + d])

    Attributes:
        heads: ``H``.
        transposed: True for scores, False for values.
        requantize: one multiplier for all.
        exponent: if not None, ``a`` holds codes of powers of two: ``2^(exponent - a)`` is multiplied.
        scale: of the output stream.
        products: ``lut`` or ``dsp``, see `MatVec`.
    """

    heads: int
    transposed: bool
    requantize: Requantize
    exponent: int | None = None
    scale: np.ndarray | float | None = None
    products: str = "lut"

    kind = "matmul"

    def __post_init__(self) -> None:
        a, b = self.inputs
        expected = (b.channels, a.channels) if self.transposed else (a.channels, b.tokens * self.heads)
        if expected[0] != expected[1] or b.channels % self.heads or a.channels % self.heads:
            raise FormatError(f"{self.name}: streams of {a.shape} and {b.shape} have no product of {self.heads} heads")
        if self.exponent is not None and not 0 <= int(a.low.min()) <= int(a.high.max()) <= self.exponent:
            raise FormatError(f"{self.name}: codes up to {int(a.high.max())} exceed the exponent {self.exponent}")

    @property
    def rows(self) -> int:
        """Length of the sums: ``D`` for scores, ``S`` for values."""
        return self.inputs[0].channels // self.heads

    @property
    def columns(self) -> int:
        """Outputs per head: ``S`` for scores, ``D`` for values."""
        return self.inputs[1].tokens if self.transposed else self.inputs[1].channels // self.heads

    @cached_property
    def accumulator_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Range of the sum, the same for every channel: both operands may take any value of theirs."""
        low, high = self.product_bounds
        one = np.ones(self.heads * self.columns, np.int64)
        return self.rows * low * one, self.rows * high * one

    @cached_property
    def product_bounds(self) -> tuple[int, int]:
        """Range of a product."""
        a = [int(self.inputs[0].low.min()), int(self.inputs[0].high.max())]
        b = [int(self.inputs[1].low.min()), int(self.inputs[1].high.max())]
        if self.exponent is not None:
            a = [1 << (self.exponent - v) for v in a]
        ends = [x * y for x in a for y in b]
        return min(ends), max(ends)

    @cached_property
    def accumulator(self) -> IntType:
        """A type for all partial sums."""
        low, high = self.accumulator_bounds
        return IntType.covering(min(0, int(low.min())), max(0, int(high.max())))

    @cached_property
    def output(self) -> Stream:
        low, high = self.requantize.bounds(*self.accumulator_bounds)
        return Stream(self.name, self.inputs[0].tokens, self.heads * self.columns, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        a, b = inputs
        if self.exponent is not None:
            a = 1 << (self.exponent - a)
        a = a.reshape(*a.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)
        b = b.reshape(*b.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)
        total = a @ (b.transpose(0, 1, 3, 2) if self.transposed else b)
        return self.requantize.apply(total.transpose(0, 2, 1, 3).reshape(len(a), *self.output.shape))

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"multiplier": np.broadcast_to(self.requantize.multiplier, (self.output.channels,))}

    @property
    def locals(self) -> dict[str, IntType]:
        return {
            "accumulator": self.accumulator,
            "product": self.requantize.product_type(*self.accumulator_bounds),
        }

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.columns)

    @property
    def simd_choices(self) -> tuple[int, ...]:
        return divisors(self.rows)

    @property
    def interval(self) -> int:
        a, b = self.inputs
        load = b.tokens * b.channels // (self.folding.simd if self.transposed else self.folding.pe)
        steps = a.tokens * self.heads * (self.rows // self.folding.simd) * (self.columns // self.folding.pe)
        return max(load, steps)
