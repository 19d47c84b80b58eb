"""Nodes that move elements and do not change them: parts, joins, transposition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Two streams side by side: their channels, in order."""

    kind = "concat"

    def __post_init__(self) -> None:
        if len(self.inputs) != 2 or self.inputs[0].tokens != self.inputs[1].tokens:
            raise FormatError(f"{self.name}: two streams with the same number of tokens are needed")

    @cached_property
    def output(self) -> Stream:
        a, b = self.inputs
        low, high = np.concatenate([a.low, b.low]), np.concatenate([a.high, b.high])
        return Stream(self.name, a.tokens, len(low), low, high, a.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return np.concatenate(inputs, axis=2)

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(gcd(self.inputs[0].channels, self.inputs[1].channels))

    @property
    def interval(self) -> int:
        return self.output.tokens * self.output.channels // self.folding.pe


@dataclass(frozen=True, eq=False)
class Prepend(Node):
    """Constant tokens in front of a stream (a class token).

    Attributes:
        rows: int64 ``(R, C)``.
    """

    rows: np.ndarray

    kind = "prepend"

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != self.inputs[0].channels:
            raise FormatError(f"{self.name}: rows of shape {self.rows.shape} for {self.inputs[0].channels} channels")

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        low, high = np.minimum(x.low, self.rows.min(0)), np.maximum(x.high, self.rows.max(0))
        return Stream(self.name, x.tokens + len(self.rows), x.channels, low, high, x.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        x = inputs[0]
        return np.concatenate([np.broadcast_to(self.rows, (len(x), *self.rows.shape)), x], axis=1)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        return {"rows": self.rows}

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].channels)

    @property
    def interval(self) -> int:
        return self.output.tokens * self.output.channels // self.folding.pe


@dataclass(frozen=True, eq=False)
class Select(Node):
    """A range of tokens and a range of channels.

    Attributes:
        tokens, channels: ``(start, stop)``.
    """

    tokens: tuple[int, int]
    channels: tuple[int, int]

    kind = "select"

    def __post_init__(self) -> None:
        x = self.inputs[0]
        for (start, stop), size in ((self.tokens, x.tokens), (self.channels, x.channels)):
            if not 0 <= start < stop <= size:
                raise FormatError(f"{self.name}: [{start}, {stop}) is no part of {size}")

    @cached_property
    def output(self) -> Stream:
        x, part = self.inputs[0], slice(*self.channels)
        scale = x.scale[part] if isinstance(x.scale, np.ndarray) and x.scale.ndim else x.scale
        return Stream(self.name, self.tokens[1] - self.tokens[0], len(x.low[part]), x.low[part], x.high[part], scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return inputs[0][:, slice(*self.tokens), slice(*self.channels)]

    @property
    def pe_choices(self) -> tuple[int, ...]:
        start, stop = self.channels
        return divisors(gcd(self.inputs[0].channels, start, stop))

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // self.folding.pe


@dataclass(frozen=True, eq=False)
class Transpose(Node):
    """``y[c, t] = x[t, c]``, through two buffers of a frame each. ``simd`` lanes come in, ``pe`` go out."""

    kind = "transpose"

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        low, high = (np.full(x.tokens, v, np.int64) for v in (x.low.min(), x.high.max()))
        return Stream(self.name, x.channels, x.tokens, low, high, x.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return inputs[0].transpose(0, 2, 1)

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].tokens)

    @property
    def simd_choices(self) -> tuple[int, ...]:
        return divisors(self.inputs[0].channels)

    @property
    def interval(self) -> int:
        return self.inputs[0].tokens * self.inputs[0].channels // min(self.folding.pe, self.folding.simd)
