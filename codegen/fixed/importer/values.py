"""What the import knows of a value of the ONNX graph.

    Constant   known numbers
    Codes      a constant that is integers times scales: a weight
    Real       integers of a stream times one scale; `index` says where in the stream every element is
    Pending    a result that is not yet integers: its `QuantizeLinear` decides the last step of the node

Operators that only move elements act on `index`, an integer array with the shape of the value (without the batch axis) that
holds positions in a frame of the stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from qcompile.codegen.fixed.nodes import Add, Affine, Concat, Lookup, MatMul, MatVec, Multiply, Node, Select, Transpose
from qcompile.codegen.fixed.nodes.window import Depthwise
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import FormatError, UnsupportedOperatorError
from qcompile.formats.fixed import Requantize


@dataclass(frozen=True, eq=False)
class Constant:
    """Known numbers."""

    array: np.ndarray


@dataclass(frozen=True, eq=False)
class Codes:
    """``codes * scale``, elementwise, arrays of one shape."""

    codes: np.ndarray
    scale: np.ndarray

    @property
    def array(self) -> np.ndarray:
        """The numbers."""
        return self.codes * self.scale

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Codes:
        """Both arrays moved alike."""
        return Codes(function(self.codes), function(self.scale))


@dataclass(frozen=True, eq=False)
class Real:
    """``scale * stream[index]``.

    Attributes:
        stream: of integers.
        index: int64, shape of the value without batch.
        scale: one number.
        log2: the integers are codes of powers of two, ``2^-code``, and ``scale`` is 1.
    """

    stream: Stream
    index: np.ndarray
    scale: float
    log2: bool = False

    def moved(self, index: np.ndarray) -> Real:
        """The same elements elsewhere."""
        return replace(self, index=index)


class Builder:
    """The program under construction."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: set[str] = set()

    def name(self, wanted: str) -> str:
        """An identifier like ``wanted`` that is not taken."""
        base = "".join(c if c.isalnum() and c.isascii() else "_" for c in wanted).strip("_").lower() or "node"
        while "__" in base:
            base = base.replace("__", "_")
        if base[0].isdigit():
            base = f"n{base}"
        free, i = base, 1
        while free in self.names:
            i += 1
            free = f"{base}_{i}"
        self.names.add(free)
        return free

    def add(self, node: Node) -> Stream:
        """Add a node and return its stream."""
        self.nodes.append(node)
        return node.output


def view(stream: Stream, tokens: int, channels: int) -> Stream:
    """The same frame with another shape."""
    if (tokens, channels) == stream.shape:
        return stream
    low, high = (np.broadcast_to(v, stream.shape).reshape(tokens, channels) for v in (stream.low, stream.high))
    return replace(stream, tokens=tokens, channels=channels, low=low.min(0), high=high.max(0))


@dataclass(eq=False)
class Pending(ABC):
    """A result whose quantizer is still to come.

    Attributes:
        where: the ONNX node, for messages and names.
        index: positions in the frame of the node to be made.
        shape: ``(tokens, channels)`` of that frame.
        low, high: bounds of activations that clamp.
    """

    where: str
    index: np.ndarray
    shape: tuple[int, int]
    low: float = field(default=-np.inf, kw_only=True)
    high: float = field(default=np.inf, kw_only=True)
    made: list[tuple[Stream, float]] = field(default_factory=list, kw_only=True)

    @abstractmethod
    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        """Make the node, with output ``clamp(round(value / scale), low, high)``."""

    @abstractmethod
    def reach(self) -> float:
        """Largest magnitude of the value."""

    def moved(self, index: np.ndarray) -> Self:
        """The same elements elsewhere; the node is still made once."""
        return replace(self, index=index)

    def clamped(self, low: float, high: float) -> Self:
        """After an activation that clamps."""
        return replace(self, low=max(self.low, low), high=min(self.high, high), made=[])

    def quantize(self, builder: Builder, scale: float, low: int, high: int) -> Real:
        """Make the node, once; a second quantizer changes the scale of what the first one made."""
        if self.made:
            stream, first = self.made[0]
            if first == scale:
                return Real(stream, self.index, scale)
            stream = rescale(builder, self.where, stream, first, scale, low, high)
        else:
            # A clamp at 0 and an upper bound of an activation are clamps of the integers.
            least = max(low, int(np.rint(self.low / scale))) if np.isfinite(self.low) else low
            most = min(high, int(np.rint(self.high / scale))) if np.isfinite(self.high) else high
            stream = self.build(builder, scale, least, most)
        self.made.append((stream, scale))
        return Real(stream, self.index, scale)


def rescale(builder: Builder, where: str, stream: Stream, old: float, new: float, low: int, high: int) -> Stream:
    """``stream`` in steps of ``new``; itself if nothing changes."""
    step = Requantize.from_scale(np.array([old / new]), low, high)
    if step.is_clamp and stream.low.min() >= low and stream.high.max() <= high:
        return stream
    offset = np.zeros((1, stream.channels), np.int64)
    return builder.add(Affine(builder.name(f"{where}_rescale"), (stream,), step, offset, new))


@dataclass(eq=False)
class Linear(Pending):
    """A node with integer sums of steps ``scale`` per channel, and a real bias.

    Attributes:
        scale: float64 ``(channels,)``.
        bias: float64 ``(channels,)``.
        make: from integer bias and requantization to the node.
        takes_bias: whether the node adds a bias.
    """

    scale: np.ndarray
    bias: np.ndarray
    make: Callable[[str, np.ndarray, Requantize], MatVec | Depthwise | MatMul | Node]
    takes_bias: bool = True

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        step = Requantize.from_scale(self.scale / scale, low, high)
        return builder.add(self.make(builder.name(self.where), self._integer_bias(), step))

    def _integer_bias(self) -> np.ndarray:
        known = np.where(self.scale == 0, 1, self.scale)
        bias = np.rint(np.where(self.scale == 0, 0, self.bias) / known)
        if np.abs(bias).max(initial=0) > 2**40:
            raise FormatError(f"{self.where}: a bias is too large for its accumulator's step")
        return bias.astype(np.int64)

    def reach(self) -> float:
        probe = self.make("probe", self._integer_bias(), Requantize(np.ones(1, np.int64), 0, -(1 << 62), 1 << 62))
        low, high = probe.accumulator_bounds  # type: ignore[union-attr]
        return float(np.abs(np.stack([low, high]) * self.scale).max())

    def plus(self, bias: np.ndarray) -> Linear:
        """With a constant added, ``(channels,)``."""
        if not self.takes_bias:
            raise UnsupportedOperatorError(f"{self.where}: nothing can be added before its quantizer")
        return replace(self, bias=self.bias + bias, made=[])

    def times(self, factor: float | np.ndarray) -> Linear:
        """Multiplied by a constant."""
        return replace(self, scale=self.scale * factor, bias=self.bias * factor, made=[])


@dataclass(eq=False)
class Scaled(Pending):
    """``factor[c] * x + offset[t, c]`` of a stream of integers.

    Attributes:
        stream: shaped as it is used.
        factor: float64 ``(channels,)``, with the stream's own scale in it.
        offset: float64 ``(1 or tokens, channels)``.
    """

    stream: Stream
    factor: np.ndarray
    offset: np.ndarray

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        step = Requantize.from_scale(self.factor / scale, low, high)
        # The offset is added to the product, whose step is that of the result over 2^shift.
        offset = np.rint(self.offset / scale * 2.0**step.shift)
        if not self.offset.any() and (self.factor == self.factor[0]).all():
            return rescale(builder, self.where, self.stream, float(self.factor[0]), scale, low, high)
        if self.offset.any() and step.shift < 8:
            more = 8 - step.shift  # so that the offset is as exact as the product
            step = Requantize(step.multiplier << more, step.shift + more, low, high)
            offset = np.rint(self.offset / scale * 2.0**step.shift)
        return builder.add(Affine(builder.name(self.where), (self.stream,), step, offset.astype(np.int64), scale))

    def reach(self) -> float:
        ends = np.stack([self.stream.low * self.factor, self.stream.high * self.factor])
        return float((np.abs(ends).max(0) + np.abs(self.offset)).max())

    def plus(self, offset: np.ndarray) -> Scaled:
        """With a constant added, ``(1 or tokens, channels)``."""
        return replace(self, offset=self.offset + offset, made=[])

    def times(self, factor: np.ndarray | float) -> Scaled:
        """Multiplied by a constant per channel."""
        return replace(self, factor=self.factor * factor, offset=self.offset * factor, made=[])


@dataclass(eq=False)
class Function(Pending):
    """A function of one stream, element by element.

    Attributes:
        stream: the integers.
        step: their scale.
        function: on float64.
    """

    stream: Stream
    step: float
    function: Callable[[np.ndarray], np.ndarray]

    def _values(self) -> np.ndarray:
        kind = self.stream.type
        return self.function(np.arange(kind.low, kind.high + 1) * self.step)

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        table = np.clip(np.rint(self._values() / scale), low, high).astype(np.int64)
        return builder.add(Lookup(builder.name(self.where), (self.stream,), table, scale))

    def reach(self) -> float:
        return float(np.abs(self._values()).max())


@dataclass(eq=False)
class Sum(Pending):
    """``a + b`` of two streams of one shape."""

    streams: tuple[Stream, Stream]
    scales: tuple[float, float]

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        step = Requantize.from_scale(np.array(self.scales) / scale, low, high)
        multipliers = int(step.multiplier[0]), int(step.multiplier[1])
        return builder.add(Add(builder.name(self.where), self.streams, multipliers, step.shift, low, high, scale))

    def reach(self) -> float:
        return sum(
            max(abs(int(s.low.min())), abs(int(s.high.max()))) * abs(scale)
            for s, scale in zip(self.streams, self.scales)
        )


@dataclass(eq=False)
class Product(Pending):
    """``a * b`` of two streams of one shape."""

    streams: tuple[Stream, Stream]
    scale: float

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        step = Requantize.from_scale(np.array([self.scale / scale]), low, high)
        return builder.add(Multiply(builder.name(self.where), self.streams, step, scale))

    def reach(self) -> float:
        a, b = (max(abs(int(s.low.min())), abs(int(s.high.max()))) for s in self.streams)
        return a * b * abs(self.scale)


@dataclass(eq=False)
class Joined(Pending):
    """Streams side by side, each with a scale of its own.

    Attributes:
        parts: streams and scales, in order.
    """

    parts: tuple[tuple[Stream, float], ...]

    def build(self, builder: Builder, scale: float, low: int, high: int) -> Stream:
        streams = [rescale(builder, self.where, s, own, scale, low, high) for s, own in self.parts]
        whole = streams[0]
        for part in streams[1:]:
            whole = builder.add(Concat(builder.name(self.where), (whole, part)))
        return replace(whole, scale=scale)

    def reach(self) -> float:
        return max(max(abs(int(s.low.min())), abs(int(s.high.max()))) * scale for s, scale in self.parts)


def matrix_view(
    builder: Builder, value: Real, where: str, index: np.ndarray | None = None
) -> tuple[Stream, np.ndarray]:
    """A stream whose tokens are the rows of ``value``: the stream, and the position of every column in a token.

    A part of a stream becomes a `Select`, a transposed one a `Transpose`. A single row may be in any order.

    Args:
        builder: receives these nodes.
        value: the last axis is that of the columns.
        where: for messages.
        index: to use in the place of the value's own.

    Raises:
        UnsupportedOperatorError: the rows lie in no order that streams can deliver.
    """
    index = value.index if index is None else index
    rows = index.reshape(-1, index.shape[-1])
    tokens, columns = rows.shape
    stream = value.stream
    size = stream.tokens * stream.channels
    if rows.size < size:
        stream, rows = _part(builder, stream, rows, where)
        size = rows.size
    order = rows - np.arange(tokens)[:, None] * columns
    if tokens == 1 or (order == order[0]).all():
        return view(stream, tokens, columns), order[0]
    if (rows.T.reshape(-1) == np.arange(size)).all():
        turned = builder.add(Transpose(builder.name(f"{where}_transpose"), (view(stream, columns, tokens),)))
        return turned, np.arange(columns)
    raise UnsupportedOperatorError(f"{where}: its input is reordered in a way that no stream delivers")


def _part(builder: Builder, stream: Stream, rows: np.ndarray, where: str) -> tuple[Stream, np.ndarray]:
    """The rectangle of tokens and channels that ``rows`` covers, and positions in it."""
    token, channel = np.divmod(rows, stream.channels)
    tokens = int(token.min()), int(token.max()) + 1
    channels = int(channel.min()), int(channel.max()) + 1
    width = channels[1] - channels[0]
    if (tokens[1] - tokens[0]) * width != rows.size:
        raise UnsupportedOperatorError(
            f"{where}: it reads a part of {stream.name} that is no range of tokens and channels"
        )
    part = builder.add(Select(builder.name(f"{where}_part"), (stream,), tokens, channels))
    return part, (token - tokens[0]) * width + channel - channels[0]
