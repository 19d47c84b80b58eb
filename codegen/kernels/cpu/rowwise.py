"""Kernels over the rows of a matrix: residual add, normalisation, activation, and the per-token quantizer, in one pass.

    s = x + residual                                       if `residual`
    n = (s - mean(s)) / sqrt(var(s) + epsilon) * gamma + beta  if `norm` is "layer"
        s / sqrt(mean(s^2) + epsilon) * gamma                  if `norm` is "rms"
    a = activation(n), or activation(n[:D]) * n[D:]        the latter if `gated`
    r = a, a * factor if `factor`, and then @ blockdiag(H, ..., H) with orthonormal Walsh-Hadamard blocks if `hadamard`,
        or with Kronecker products ``left (x) right`` if `kronecker`
    codes, scale = quantize(r)                             if `quantize`

Every row is read from memory once and its intermediate values stay in the first-level cache.

The quantizer returns what ``QuantizePerToken`` and ``QuantizeLinear`` return bit for bit, that is
``round_half_even(y / scale)`` with a division rounded to float32, without dividing: with ``t = y * (1 / scale)`` both
``t`` and the quotient differ from the real number by less than ``2 * 2^-24 |t| < 2e-5``, so wherever ``t`` is farther
than that from a half-integer they round to the same code. The pass over a row keeps the largest ``|t - round(t)|``, and
the rare row that comes too close to 1/2 is divided after all. Rounding is an addition of ``1.5 * 2^23``, which leaves
the integer in the low bits of the sum.

Sources: Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019);
Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import ACTIVATIONS
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath
from qcompile.errors import TargetError
from qcompile.formats.hadamard import hadamard_matrix
from qcompile.targets.target import Target

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it to |t| < 2^22 rounds t to an integer, half to even
_NEAR_TIE = 0.4999
_TINY = 1e-30  # below this 1 / scale, or the products with it, may leave the range of float32

Load = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Rowwise:
    """A kernel over the rows of ``x``; see the module docstring for what it computes.

    Parameters of the PrimFunc, in this order, float32 unless said: ``x (M, D)`` (``(M, 2 D)`` = gate and up side by
    side if `gated`); ``residual (M, D)``; ``gamma (D,)``; ``beta (D,)``; ``factor (D,)``; ``left (a, a)`` and
    ``right (b, b)`` if `kronecker`; ``static_scale (1,)`` if `quantize` is "tensor"; then the outputs ``sum (M, D)``; ``y (M, D)``; ``codes (M, D)`` uint8 = signed code + 128 and
    ``scale (M,)``. Parameters whose option is off are absent; `params` lists those present. ``M`` is known at run time.

    Attributes:
        width: ``D``, any positive integer.
        residual: add a second matrix first.
        norm: ``""``, ``"layer"`` or ``"rms"``; `gamma` and `beta` say whether it has a gain and an offset.
        activation: a key of `ACTIVATIONS`.
        gated: a gated linear unit over the two halves of ``x``; excludes `residual` and `norm`.
        factor: multiply the row by a vector before it is rotated and quantized; ``y`` is stored without it.
        hadamard: order of the Walsh-Hadamard blocks that rotate the row before it is quantized; a divisor of `width`, or 0.
        kronecker: ``(a, b)``, orders of the two matrices whose product mixes blocks of ``a b`` channels; (0, 0) for none.
        sum_output: store ``x + residual`` too; needs `norm` (without it the sum is ``y``).
        f32_output: store ``y``.
        quantize: ``""``, ``"token"`` (scale = max|y| / (2^(bits-1) - 1), or 1 for a zero row) or ``"tensor"``.
        bits: 2 to 8.
        clip: share of a token's largest magnitude that "token" represents, in (0, 1].
        zero_point: of the static quantizer, in signed codes.
    """

    width: int
    residual: bool = False
    norm: str = ""
    gamma: bool = True
    beta: bool = True
    epsilon: float = 1e-5
    activation: str = ""
    gated: bool = False
    factor: bool = False
    hadamard: int = 0
    kronecker: tuple[int, int] = (0, 0)
    sum_output: bool = False
    f32_output: bool = False
    quantize: str = "token"
    bits: int = 8
    clip: float = 1.0
    zero_point: int = 0

    def __post_init__(self) -> None:
        problem = (
            "width is not positive"
            if self.width < 1
            else f"unknown norm {self.norm!r}"
            if self.norm not in ("", "layer", "rms")
            else f"unknown activation {self.activation!r}"
            if self.activation not in ACTIVATIONS
            else f"unknown quantizer {self.quantize!r}"
            if self.quantize not in ("", "token", "tensor")
            else f"blocks of {self.hadamard} do not divide it"
            if self.hadamard and (self.hadamard < 1 or self.width % self.hadamard)
            else f"Kronecker blocks of {self.kronecker} do not divide it, or a rotation does the same"
            if any(self.kronecker) and (self.hadamard or min(self.kronecker) < 1 or self.width % prod(self.kronecker))
            else "bits must be 2 to 8"
            if not 2 <= self.bits <= 8
            else "the clipped share must lie in (0, 1]"
            if not 0 < self.clip <= 1
            else "a gated activation takes neither residual nor norm"
            if self.gated and (self.residual or self.norm)
            else "sum_output needs residual and norm; without norm the sum is the f32 output"
            if self.sum_output and not (self.residual and self.norm)
            else "a factor serves the quantizer, and there is none"
            if self.factor and not self.quantize
            else "no output asked for"
            if not (self.f32_output or self.quantize)
            else ""
        )
        if problem:
            raise TargetError(f"row kernel of width {self.width}: {problem}")

    @property
    def params(self) -> tuple[v.Param, ...]:
        """The buffers of the PrimFunc in order."""
        d = self.width
        found = [
            *((True, param) for param in self._sources),
            (self.residual, v.Param("residual", ("M", d))),
            (bool(self.norm) and self.gamma, v.Param("gamma", (d,))),
            (self.norm == "layer" and self.beta, v.Param("beta", (d,))),
            (self.factor, v.Param("factor", (d,))),
            (any(self.kronecker), v.Param("left", (self.kronecker[0],) * 2)),
            (any(self.kronecker), v.Param("right", (self.kronecker[1],) * 2)),
            (self.quantize == "tensor", v.Param("static_scale", (1,))),
            (self.sum_output, v.Param("sum", ("M", d), output=True)),
            (self.f32_output, v.Param("y", ("M", d), output=True)),
            (bool(self.quantize), v.Param("codes", ("M", d), "uint8", output=True)),
            (bool(self.quantize), v.Param("scale", ("M",), output=True)),
        ]
        return tuple(param for present, param in found if present)

    @property
    def _sources(self) -> tuple[v.Param, ...]:
        """The parameters that `_source` reads."""
        return (v.Param("x", ("M", 2 * self.width if self.gated else self.width)),)

    def _source(self, i: Any, names: dict[str, Any]) -> Load:
        """Row ``i`` of the input."""
        return lambda s, n: v.load(names["x"], [i, s], n)

    def _check(self, names: dict[str, Any]) -> None:
        """Emit checks of the arguments."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest signed code; the per-token grid is symmetric."""
        top = (1 << (self.bits - 1)) - 1
        return -top - (self.quantize == "tensor"), top

    def build(self, target: Target, name: str = "rowwise") -> Any:
        """Return the ``tirx.PrimFunc`` with global symbol ``name``."""
        with v.kernel(name, self.params) as (builder, names):
            self._check(names)
            # One piece of parallel work is about 20000 elements, some ten microseconds.
            grain = max(1, 20000 // self.width)
            v.parallel_ranges(
                names["M"], grain, target.cores, lambda begin, end: self._rows(begin, end, names, v.lanes_of(target))
            )
        return builder.get()

    def _rows(self, begin: Any, end: Any, names: dict[str, Any], lanes: int) -> None:
        d = self.width
        mixed = self.hadamard or any(self.kronecker)
        changed = self.factor or mixed  # what is quantized is not ``y``
        derived = self.residual or self.norm or self.activation or self.gated or changed or "x" not in names
        own = self.quantize and derived and (not self.f32_output or changed)
        scratch = B.alloc_buffer((d,), "float32") if own else None
        total = B.alloc_buffer((d,), "float32") if self.residual and self.norm and not self.sum_output else None
        with v.span(begin, end) as i:

            def row(buffer: Any) -> Any:
                return lambda s: [s] if buffer is scratch or buffer is total else [i, s]

            y = names.get("y") if scratch is None else scratch
            copy = names.get("y") if changed else None
            value = self._input(i, names, total if total is not None else names.get("sum"), lanes)
            value = self._normalised(value, names, lanes)
            value = self._activated(value, i, names)
            absmax = None
            if y is not None:
                at_y = row(y)

                def keep(s: Any, n: int) -> Any:
                    a = v.let(value(s, n))
                    if copy is not None:
                        v.store(copy, [i, s], a, n)
                    if self.factor:
                        a = v.let(a * v.load(names["factor"], [s], n))
                    v.store(y, at_y(s), a, n)
                    return _magnitude(a, n)

                if self.quantize == "token" and not mixed:
                    absmax = v.sweep_reduce(d, lanes, keep, T.max, dtype="uint32")
                else:
                    v.sweep(d, lanes, lambda s, n, _: keep(s, n))
                if self.hadamard:
                    from qcompile.codegen.kernels.cpu.hadamard import transform_row

                    transform_row(y, at_y, d, lanes, self.hadamard)
                if any(self.kronecker):
                    from qcompile.codegen.kernels.cpu.kronecker import mix_row

                    mix_row(y, at_y, d, lanes, names["left"], names["right"], self.kronecker)
                value = lambda s, n: v.load(y, at_y(s), n)  # noqa: E731
            if self.quantize == "token":
                if absmax is None:
                    absmax = v.sweep_reduce(d, lanes, lambda s, n: _magnitude(value(s, n), n), T.max, dtype="uint32")
                largest = T.reinterpret(absmax, dtype="float32") * T.float32(self.clip)
                step = v.let(largest / T.float32((1 << (self.bits - 1)) - 1))
                step = v.let(T.Select(step == T.float32(0), T.float32(1), step))
            elif self.quantize == "tensor":
                step = v.let(v.load(names["static_scale"], [0], 1))
            if self.quantize:
                v.store(names["scale"], [i], step, 1)
                self._quantize(value, step, names["codes"], i, lanes)

    def _input(self, i: Any, names: dict[str, Any], total: Any, lanes: int) -> Load:
        """``x``, or ``x + residual``; the sum is stored for later passes if there are any."""
        x = self._source(i, names)
        if not self.residual:
            return x
        res = names["residual"]

        def added(s: Any, n: int) -> Any:
            return x(s, n) + v.load(res, [i, s], n)

        if total is None:
            return added
        at = (lambda s: [i, s]) if self.sum_output else (lambda s: [s])

        def first(s: Any, n: int) -> Any:
            a = v.let(added(s, n))
            v.store(total, at(s), a, n)
            return a

        # The first pass of a norm both sums and stores; `_normalised` takes it from here.
        first.then = lambda s, n: v.load(total, at(s), n)  # type: ignore[attr-defined]
        return first

    def _normalised(self, value: Load, names: dict[str, Any], lanes: int) -> Load:
        d = self.width
        if not self.norm:
            return value
        again = getattr(value, "then", value)
        inverse = T.float32(1.0 / d)

        def squared(a: Any) -> Any:
            a = v.let(a)
            return a * a

        if self.norm == "layer":
            mean = v.let(v.sweep_reduce(d, lanes, value, v.add) * inverse)
            square = v.sweep_reduce(d, lanes, lambda s, n: squared(again(s, n) - v.splat(mean, n)), v.add)
        else:
            square = v.sweep_reduce(d, lanes, lambda s, n: squared(value(s, n)), v.add)
        factor = v.let(T.float32(1) / T.sqrt(square * inverse + T.float32(self.epsilon)))

        def normalised(s: Any, n: int) -> Any:
            a = again(s, n)
            if self.norm == "layer":
                a = a - v.splat(mean, n)
            a = a * v.splat(factor, n)
            if "gamma" in names:
                a = a * v.load(names["gamma"], [s], n)
            if "beta" in names:
                a = a + v.load(names["beta"], [s], n)
            return a

        return normalised

    def _activated(self, value: Load, i: Any, names: dict[str, Any]) -> Load:
        if not (self.activation or self.gated):
            return value
        act = vmath.ACTIVATIONS[self.activation]
        if not self.gated:
            return lambda s, n: act(value(s, n))
        return lambda s, n: act(value(s, n)) * v.load(names["x"], [i, s + self.width], n)

    def _quantize(self, value: Load, step: Any, codes: Any, i: Any, lanes: int) -> None:
        static = self.quantize == "tensor"
        clamp = static or self.clip < 1
        low, high = (bound - (self.zero_point if static else 0) for bound in self.code_range)
        inverse = v.let(T.float32(1) / step)
        # The sum of a code and 128 + zero point, modulo 256, as the stored byte.
        offset = (128 + (self.zero_point if static else 0)) % 256

        def clip(t: Any, n: int) -> Any:
            return T.min(T.max(t, v.const(low, n)), v.const(high, n))

        def fast(s: Any, n: int) -> Any:
            magic = v.const(_MAGIC, n)
            a = v.let(value(s, n))
            if clamp:
                t = v.let(clip(a * v.splat(inverse, n), n))
                rounded = v.let(v.add_exactly(t, magic, n))
                error = v.let(t - (rounded - magic))
            else:
                rounded = v.let(T.fma(a, v.splat(inverse, n), magic))
                error = v.let(T.fma(a, v.splat(inverse, n), magic - rounded))
            byte = v.cast(v.bits_of(rounded, "int32", n), "uint8", n) + v.const(offset, n, "uint8")
            v.store(codes, [i, s], byte, n)
            return _magnitude(error, n)

        def exact(s: Any, n: int, _: int) -> None:
            quotient = T.nearbyint(clip(value(s, n) / v.splat(step, n), n))
            byte = v.cast(v.cast(quotient, "int32", n), "uint8", n) + v.const(offset, n, "uint8")
            v.store(codes, [i, s], byte, n)

        worst = T.reinterpret(v.sweep_reduce(self.width, lanes, fast, T.max, dtype="uint32"), dtype="float32")
        # Written so that a NaN takes the exact path.
        with T.If(T.Not(T.And(worst < T.float32(_NEAR_TIE), step > T.float32(_TINY)))), T.Then():
            v.sweep(self.width, lanes, exact)

    def reference(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """``sum``, ``y``, ``codes`` and ``scale`` in numpy, whether they are outputs or not.

        Sums and norms are computed in float64, the quantizer in float32 as the kernel does it.
        """
        given = dict(zip([p.name for p in self.params if not p.output], inputs, strict=True))
        return self._reference(given["x"], given)

    def _reference(self, x: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        d = self.width
        out: dict[str, np.ndarray] = {}
        a = x
        if self.residual:
            a = out["sum"] = a + given["residual"]
        a = a.astype(np.float64)
        if self.norm == "layer":
            a = a - a.mean(1, keepdims=True)
        if self.norm:
            a = a / np.sqrt((a * a).mean(1, keepdims=True) + self.epsilon)
            a = a * given.get("gamma", 1.0) + given.get("beta", 0.0)
        with np.errstate(over="ignore"):
            a = ACTIVATIONS[self.activation](a[:, :d]) * (a[:, d:] if self.gated else 1.0)
        out["y"] = a.astype(np.float32)
        if self.quantize:
            rotated = out["y"]
            if self.factor:
                rotated = rotated * given["factor"]
                a = a * given["factor"]
            if self.hadamard:
                blocks = a.reshape(len(a), -1, self.hadamard) @ hadamard_matrix(self.hadamard)
                rotated = blocks.reshape(a.shape).astype(np.float32)
            if any(self.kronecker):
                blocks = np.einsum(
                    "mxij,ip,jq->mxpq", a.reshape(len(a), -1, *self.kronecker), given["left"], given["right"]
                )
                rotated = blocks.reshape(a.shape).astype(np.float32)
            out["codes"], out["scale"] = self.quantized(rotated, given.get("static_scale"))
        return out

    def quantized(self, y: np.ndarray, static_scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (uint8, signed code + 128) and scale ``(M,)`` of float32 rows ``y``, exactly as the kernel returns them."""
        if self.quantize == "tensor":
            assert static_scale is not None
            scale = np.full(len(y), static_scale[0], np.float32)
            codes = np.clip(np.rint(y / scale[:, None]) + self.zero_point, *self.code_range)
        else:
            scale = np.abs(y).max(1) * np.float32(self.clip) / np.float32((1 << (self.bits - 1)) - 1)
            scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
            # With `clip` 1 this matters only where the scale is so small that it was rounded to a subnormal number.
            codes = np.clip(np.rint(y / scale[:, None]), *self.code_range)
        return (codes + 128).astype(np.uint8), scale


def _magnitude(value: Any, lanes: int) -> Any:
    """The bits of ``|value|`` as uint32. They order like the numbers, and a NaN comes out as the largest of all."""
    return T.bitwise_and(v.bits_of(value, "uint32", lanes), v.const(0x7FFFFFFF, lanes, "uint32"))
