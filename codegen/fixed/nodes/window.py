"""Nodes that slide a window over an image: the window itself for convolutions, depthwise convolution, maximum pooling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node, divisors
from qcompile.codegen.fixed.nodes.geometry import Geometry
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError
from qcompile.formats.fixed import IntType, Requantize


@dataclass(frozen=True, eq=False)
class _Windowed(Node):
    geometry: Geometry

    def __post_init__(self) -> None:
        g = self.geometry
        if self.inputs[0].tokens != g.height * g.width:
            raise FormatError(f"{self.name}: {self.inputs[0].tokens} tokens are not an image of {g.height} x {g.width}")

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return self.inputs[0].channels

    @property
    def pe_choices(self) -> tuple[int, ...]:
        return divisors(self.channels)

    @property
    def interval(self) -> int:
        g, groups = self.geometry, self.channels // self.folding.pe
        return max(g.windows * g.taps, g.height * g.width) * groups

    def _seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Range of a tap per channel: that of the input, and 0 if windows reach outside."""
        x = self.inputs[0]
        if not self.geometry.padded:
            return x.low, x.high
        return np.minimum(x.low, 0), np.maximum(x.high, 0)


@dataclass(frozen=True, eq=False)
class Window(_Windowed):
    """Every window as one token: channels in the order (row, column, channel). With `MatVec` it makes a convolution."""

    kind = "window"

    @cached_property
    def output(self) -> Stream:
        low, high = (np.tile(v, self.geometry.taps) for v in self._seen())
        return Stream(self.name, self.geometry.windows, len(low), low, high, self.inputs[0].scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.geometry.gather(inputs[0]).reshape(len(inputs[0]), *self.output.shape)


@dataclass(frozen=True, eq=False)
class Depthwise(_Windowed):
    """``y[w, c] = requantize(sum_tap x[w, tap, c] * weight[tap, c] + bias[c])``; with equal weights average pooling.

    Attributes:
        weight: int64 ``(taps, C)``.
        bias: int64 ``(C,)``.
        requantize: to the output; None to put out accumulators.
        scale: of the output stream.
        products: ``lut`` or ``dsp``, see `MatVec`.
    """

    weight: np.ndarray
    bias: np.ndarray
    requantize: Requantize | None = None
    scale: np.ndarray | float | None = None
    products: str = "lut"

    kind = "depthwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight.shape != (self.geometry.taps, self.channels) or self.bias.shape != (self.channels,):
            raise FormatError(f"{self.name}: a weight of shape {self.weight.shape} for {self.channels} channels")

    @cached_property
    def weight_type(self) -> IntType:
        """The narrowest type of the weights."""
        return IntType.covering(int(self.weight.min()), int(self.weight.max()))

    @cached_property
    def accumulator_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact range of the sum per channel; a superset where some windows reach outside."""
        low, high = self._seen()
        ends = np.stack([low * self.weight, high * self.weight])
        return ends.min(0).sum(0) + self.bias, ends.max(0).sum(0) + self.bias

    @cached_property
    def accumulator(self) -> IntType:
        """A type for the accumulator at every moment, bias first or last."""
        low, high = self._seen()
        ends = np.stack([low * self.weight, high * self.weight, 0 * self.weight])
        low, high = ends.min(0).sum(0), ends.max(0).sum(0)
        ends = np.stack([low, high, low + self.bias, high + self.bias])
        return IntType.covering(int(ends.min()), int(ends.max()))

    @cached_property
    def output(self) -> Stream:
        low, high = self.accumulator_bounds
        if self.requantize is not None:
            low, high = self.requantize.bounds(low, high)
        return Stream(self.name, self.geometry.windows, self.channels, low, high, self.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        total = (self.geometry.gather(inputs[0]) * self.weight).sum(2) + self.bias
        return total if self.requantize is None else self.requantize.apply(total)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        step = np.ones(1, np.int64) if self.requantize is None else self.requantize.multiplier
        return {
            "weight": self.weight,
            "bias": self.bias,
            "multiplier": np.broadcast_to(step, (self.channels,)),
        }

    @property
    def locals(self) -> dict[str, IntType]:
        found = {"accumulator": self.accumulator}
        if self.requantize is not None:
            found["product"] = self.requantize.product_type(*self.accumulator_bounds)
        return found


@dataclass(frozen=True, eq=False)
class MaxPool(_Windowed):
    """The largest of every window; positions outside the image do not count."""

    kind = "maxpool"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.geometry.tokens < 0).all(1).any():
            raise FormatError(f"{self.name}: a window lies outside the image altogether")

    @cached_property
    def output(self) -> Stream:
        x = self.inputs[0]
        return Stream(self.name, self.geometry.windows, x.channels, x.low, x.high, x.scale)

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return self.geometry.gather(inputs[0], int(self.inputs[0].low.min())).max(2)

    @property
    def locals(self) -> dict[str, IntType]:
        return {"largest": self.inputs[0].type}
