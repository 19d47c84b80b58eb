"""Convolution kernels, channels last: the windows of a tensor as rows of a matrix, and depthwise convolution of codes.

    unfold      out[n, o, (t, c)] = x[n, o s + t d - p, c]                                    a copy; padding is a constant
    depthwise   out[n, o, c] = act((sum_t (x[n, o s + t d - p, c] - 128) w[t, c]) x_scale[n] w_scale[c] + b[c])

Both take a line of outputs at a time. Positions whose windows lie inside of the tensor are handled without tests; the
others read clamped positions and choose. Padding of codes is 128, the code of zero, so the constant every depthwise sum
starts from, ``-128 sum_t w[t, c]``, holds at the border too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.codegen.kernels.cpu.emission import Register
from qcompile.codegen.kernels.cpu.tail import quantized
from qcompile.errors import TargetError
from qcompile.targets.target import Target

ZERO = 128
"""The stored code of zero."""

GRAIN = 4
"""Lines of outputs another thread is woken for at least."""

PIXELS = 4
"""Neighbouring outputs that share a load of the weights."""


@dataclass(frozen=True)
class Geometry:
    """Windows over two spatial axes.

    Attributes:
        kernel, strides, dilations: extents along height and width.
        before: padding above and to the left; what lies below and to the right follows from the size of the output.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)

    def place(self, axis: int, out: Any, tap: int) -> Any:
        """Where tap ``tap`` of the window of output ``out`` reads."""
        return out * self.strides[axis] + (tap * self.dilations[axis] - self.before[axis])

    def inner(self, axis: int, size: Any, outputs: Any) -> tuple[Any, Any]:
        """The range of outputs whose windows lie inside of an axis of ``size``, possibly empty."""
        stride, before = self.strides[axis], self.before[axis]
        reach = (self.kernel[axis] - 1) * self.dilations[axis]
        begin = v.let(T.min(T.int64(-(-before // stride)), outputs))
        room = size - 1 - reach + before
        fit = T.Select(room < 0, T.int64(0), T.truncdiv(T.max(room, 0), stride) + 1)
        return begin, v.let(T.max(T.min(fit, outputs), begin))


@dataclass(frozen=True)
class Unfold:
    """Parameters: ``x (batch, height, width, channels)``; output ``out (batch, rows, columns, taps * channels)``.

    Attributes:
        channels: number of channels.
        geometry: the windows.
        dtype: ``uint8`` (codes; padding is 128) or ``float32`` (padding is 0).
    """

    channels: int
    geometry: Geometry
    dtype: str = "uint8"

    @property
    def params(self) -> list[v.Param]:
        """The parameters of the PrimFunc in order."""
        kh, kw = self.geometry.kernel
        return [
            v.Param("x", ("batch", "height", "width", self.channels), self.dtype),
            v.Param("out", ("batch", "rows", "columns", kh * kw * self.channels), self.dtype, output=True),
        ]

    def build(self, target: Target, name: str = "unfold") -> Any:
        """The PrimFunc."""
        g, c = self.geometry, self.channels
        lanes = v.lanes_of(target) * (4 if self.dtype == "uint8" else 1)
        fill = ZERO if self.dtype == "uint8" else 0
        kh, kw = g.kernel
        with v.kernel(name, self.params) as (builder, names):
            x, out = names["x"], names["out"]
            height, width = names["height"], names["width"]

            def copy(at: list[Any], source: list[Any], count: int) -> None:
                def part(start: Any, n: int, slot: int) -> None:
                    # Neighbouring taps lie one after another in both: the last axis may run over into the next position.
                    v.store(out, [*at[:-1], at[-1] + start], v.load(x, [*source, start], n), n)

                v.sweep(count, lanes, part)

            def clear(at: list[Any], count: int) -> None:
                v.sweep(
                    count,
                    lanes,
                    lambda start, n, _: v.store(out, [*at[:-1], at[-1] + start], v.const(fill, n, self.dtype), n),
                )

            def line(b: Any, row: Any) -> None:
                begin, end = g.inner(1, width, names["columns"])
                for ky in range(kh):
                    y = v.let(g.place(0, row, ky))
                    with T.If(T.And(y >= 0, y < height)):
                        with T.Then():
                            for low, high, inside in (
                                (T.int64(0), begin, False),
                                (begin, end, True),
                                (end, names["columns"], False),
                            ):
                                with v.span(low, high) as column:
                                    taps(b, row, column, ky, y, inside)
                        with T.Else(), v.span(T.int64(0), names["columns"]) as column:
                            clear([b, row, column, ky * kw * c], kw * c)

            def taps(b: Any, row: Any, column: Any, ky: int, y: Any, inside: bool) -> None:
                if inside and g.dilations[1] == 1:
                    copy([b, row, column, ky * kw * c], [b, y, g.place(1, column, 0)], kw * c)
                    return
                for kx in range(kw):
                    at, place = [b, row, column, (ky * kw + kx) * c], v.let(g.place(1, column, kx))
                    if inside:
                        copy(at, [b, y, place], c)
                        continue
                    with T.If(T.And(place >= 0, place < width)):
                        with T.Then():
                            copy(at, [b, y, place], c)
                        with T.Else():
                            clear(at, c)

            _lines(names, target, line)
        return builder.get()

    def reference(self, x: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """The same in numpy."""
        fill = ZERO if self.dtype == "uint8" else 0
        return windows(x, self.geometry, rows, columns, fill).reshape(x.shape[0], rows, columns, -1)


@dataclass(frozen=True)
class Depthwise:
    """Parameters: ``x (batch, height, width, channels)`` uint8 codes, ``x_scale (batch,)``, ``weight (taps, channels)`` int16,
    ``start (channels,)`` int32 (see `starts`), ``scale (channels,)``, ``bias (channels,)`` if there is one, ``limits (3,)`` if
    codes are stored; output ``out (batch, rows, columns, channels)``, float32 or uint8 codes.

    Attributes:
        channels: number of channels, each convolved by itself.
        geometry: the windows.
        bias: whether there is a bias.
        activation: what is applied to the result, a name of `vmath.ACTIVATIONS`.
        codes: store codes of a static quantizer, see `Epilogue`.

    Raises:
        TargetError: int32 sums could overflow.
    """

    channels: int
    geometry: Geometry
    bias: bool = False
    activation: str = ""
    codes: bool = False

    def __post_init__(self) -> None:
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        if taps * 255 * 256 >= 1 << 31:
            raise TargetError(f"depthwise convolution over {taps} positions: int32 sums of 8-bit products may overflow")

    @property
    def params(self) -> list[v.Param]:
        """The parameters of the PrimFunc in order."""
        kh, kw = self.geometry.kernel
        c = self.channels
        given = [
            v.Param("x", ("batch", "height", "width", c), "uint8"),
            v.Param("x_scale", ("batch",)),
            v.Param("weight", (kh * kw, c), "int16"),
            v.Param("start", (c,), "int32"),
            v.Param("scale", (c,)),
        ]
        if self.bias:
            given.append(v.Param("bias", (c,)))
        if self.codes:
            given.append(v.Param("limits", (3,)))
        dtype = "uint8" if self.codes else "float32"
        return [*given, v.Param("out", ("batch", "rows", "columns", c), dtype, output=True)]

    def build(self, target: Target, name: str = "depthwise") -> Any:
        """The PrimFunc."""
        g, lanes = self.geometry, v.lanes_of(target)
        kh, kw = g.kernel
        with v.kernel(name, self.params) as (builder, names):
            height, width, columns = names["height"], names["width"], names["columns"]

            def outputs(b: Any, row: Any, column: Any, count: int, inside: bool) -> None:
                """``count`` neighbouring outputs of all channels."""
                v.sweep(self.channels, lanes, lambda c, n, _: part(b, row, column, count, inside, c, n), unroll=1)

            def part(b: Any, row: Any, column: Any, count: int, inside: bool, c: Any, n: int) -> None:
                sums = [Register("int32", n) for _ in range(count)]
                for total in sums:
                    total.set(v.load(names["start"], [c], n))
                for ky, kx in itertools.product(range(kh), range(kw)):
                    w = v.let(v.load(names["weight"], [ky * kw + kx, c], n))
                    for i, total in enumerate(sums):
                        y, x = g.place(0, row, ky), g.place(1, column + i, kx)
                        total.set(total.get() + _product(target, self._code(names, b, y, x, c, n, inside), w, n))
                scale = v.let(v.load(names["scale"], [c], n) * v.splat(names["x_scale"][b], n))
                for i, total in enumerate(sums):
                    value = v.cast(total.get(), "float32", n) * scale
                    if self.bias:
                        value = value + v.load(names["bias"], [c], n)
                    value = vmath.ACTIVATIONS[self.activation](v.let(value))
                    if self.codes:
                        value = quantized(v.let(value), names["limits"], n)
                    v.store(names["out"], [b, row, column + i, c], value, n)

            def line(b: Any, row: Any) -> None:
                begin, end = g.inner(1, width, columns)
                top = v.let(g.place(0, row, 0))
                whole = T.And(top >= 0, top + (kh - 1) * g.dilations[0] < height)
                with T.If(whole):
                    with T.Then():
                        span(b, row, T.int64(0), begin, False)
                        blocks = v.let(T.truncdiv(end - begin, PIXELS))
                        with v.span(T.int64(0), blocks) as i:
                            outputs(b, row, v.let(begin + i * PIXELS), PIXELS, True)
                        span(b, row, begin + blocks * PIXELS, end, True)
                        span(b, row, end, columns, False)
                    with T.Else():
                        span(b, row, T.int64(0), columns, False)

            def span(b: Any, row: Any, low: Any, high: Any, inside: bool) -> None:
                with v.span(low, high) as column:
                    outputs(b, row, column, 1, inside)

            _lines(names, target, line)
        return builder.get()

    def _code(self, names: dict[str, Any], b: Any, y: Any, x: Any, c: Any, n: int, inside: bool) -> Any:
        """Codes of ``n`` channels as int16."""
        if inside:
            return v.cast(v.load(names["x"], [b, y, x, c], n), "int16", n)
        found = T.And(T.And(y >= 0, y < names["height"]), T.And(x >= 0, x < names["width"]))
        at = [b, *(T.max(T.min(i, names[d] - 1), 0) for i, d in ((y, "height"), (x, "width"))), c]
        read = v.cast(v.load(names["x"], at, n), "int16", n)
        return T.Select(v.splat(found, n), read, v.const(ZERO, n, "int16"))

    @staticmethod
    def starts(weight: np.ndarray) -> np.ndarray:
        """What the sums start from, for weights ``(taps, channels)``."""
        return (-ZERO * weight.astype(np.int64).sum(0)).astype(np.int32)

    def reference(self, x: np.ndarray, weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """The integer sums ``(batch, rows, columns, channels)`` in numpy."""
        seen = windows(x, self.geometry, rows, columns, ZERO).astype(np.int64) - ZERO
        return (seen * weight.astype(np.int64)).sum(3)


def _product(target: Target, a: Any, b: Any, lanes: int) -> Any:
    """Products of int16 as int32. LLVM widens both factors first on ARM, unless it is told to use SMULL."""
    if target.kind != "arm" or lanes % 4:
        return v.cast(a, "int32", lanes) * v.cast(b, "int32", lanes)
    a, b = v.let(a), v.let(b)
    parts = [[v.shuffle(x, range(i, i + 4)) if lanes > 4 else x for x in (a, b)] for i in range(0, lanes, 4)]
    products = [T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smull", *pair) for pair in parts]
    return T.Shuffle(products, list(range(lanes))) if lanes > 4 else products[0]


def _lines(names: dict[str, Any], target: Target, line: Callable[[Any, Any], None]) -> None:
    """Emit ``line(batch, row)`` for every line of outputs, in parallel."""
    rows = names["rows"]

    def lines(begin: Any, end: Any) -> None:
        with v.span(begin, end) as i:
            b = v.let(T.truncdiv(i, rows))
            line(b, v.let(i - b * rows))

    v.parallel_ranges(names["batch"] * rows, GRAIN, target.cores, lines)


def windows(x: np.ndarray, g: Geometry, rows: int, columns: int, fill: float) -> np.ndarray:
    """The windows of ``x (batch, height, width, channels)`` as ``(batch, rows, columns, taps, channels)``."""
    batch, height, width, channels = x.shape
    kh, kw = g.kernel
    out = np.full((batch, rows, columns, kh * kw, channels), fill, x.dtype)
    for row, column, ky, kx in itertools.product(range(rows), range(columns), range(kh), range(kw)):
        y, z = g.place(0, row, ky), g.place(1, column, kx)
        if 0 <= y < height and 0 <= z < width:
            out[:, row, column, ky * kw + kx] = x[:, y, z]
    return out
