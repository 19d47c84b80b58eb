"""Rotary position embedding of the leading heads in rows of merged projections.

    half-split    y[i] = x[i] cos[i] - x[i + r/2] sin[i],   y[i + r/2] = x[i + r/2] cos[i] + x[i] sin[i],   i < r/2
    interleaved   the same for the pairs (x[2i], x[2i + 1])

``r`` is the rotary width, at most the head width; what lies behind it in a head, and behind the rotated heads in a row
(the values of merged projections), is copied, or left where it is by the in-place form.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.errors import TargetError
from qcompile.targets.target import Target


@dataclass(frozen=True)
class Rope:
    """Parameters of the PrimFunc, float32 unless said: ``x (B, S, W)``; ``cos`` and ``sin``; ``positions (B or 1, S)``
    int64 if `positions`; and ``y (B, S, W)`` unless `in_place`.

    ``cos`` and ``sin`` are ``(B or 1, S, rotary / 2)``, one row per token; with `positions` they are tables ``(P, rotary
    / 2)``, and a position outside of ``[0, P)`` raises ``IndexError``.

    Attributes:
        width: ``W``, at least ``heads * head_dim``.
        heads: number of heads, from the start of a row, that are rotated.
        head_dim: width of a head.
        rotary: even, at most `head_dim`; the whole head if 0.
        interleaved: rotate neighbours instead of halves.
        shared: the tokens of all batch entries have the same angles (the batch axis of ``cos``, ``sin``, or of the
            positions, is 1).
        positions: look the angles up in tables.
        in_place: overwrite ``x``.
    """

    width: int
    heads: int
    head_dim: int
    rotary: int = 0
    interleaved: bool = False
    shared: bool = True
    positions: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        fits = 0 < self.heads * self.head_dim <= self.width and self.heads > 0
        if not fits or self.r % 2 or not 0 < self.r <= self.head_dim:
            raise TargetError(
                f"rotary embedding: {self.heads} heads of {self.head_dim}, {self.r} of them rotated, in rows of {self.width}"
            )

    @property
    def r(self) -> int:
        """Rotary width."""
        return self.rotary or self.head_dim

    @property
    def params(self) -> tuple[v.Param, ...]:
        """The buffers of the PrimFunc in order; of the in-place form, ``x`` is both input and output."""
        batch, half = 1 if self.shared else "B", self.r // 2
        angles: tuple[int | str, ...] = ("P", half) if self.positions else (batch, "S", half)
        found = [v.Param("x", ("B", "S", self.width)), v.Param("cos", angles), v.Param("sin", angles)]
        if self.positions:
            found.append(v.Param("positions", (batch, "S"), "int64"))
        if not self.in_place:
            found.append(v.Param("y", ("B", "S", self.width), output=True))
        return tuple(found)

    def build(self, target: Target, name: str = "rope") -> Any:
        """Return the ``tirx.PrimFunc`` with global symbol ``name``."""
        with v.kernel(name, self.params) as (builder, names):
            if self.positions:
                self._check(names)
            rows = names["B"] * names["S"]
            grain = max(1, 20000 // self.width)
            v.parallel_ranges(
                rows, grain, target.cores, lambda begin, end: self._rows(begin, end, names, v.lanes_of(target))
            )
        return builder.get()

    def _check(self, names: dict[str, Any]) -> None:
        outside = B.alloc_buffer((1,), "int64")
        v.store(outside, [0], T.int64(0), 1)
        with T.serial(1 if self.shared else names["B"]) as b, T.serial(names["S"]) as s:
            at = names["positions"][b, s]
            v.store(outside, [0], outside[0] + T.Cast("int64", T.Or(at < T.int64(0), at >= names["P"])), 1)
        message = StringImm("rotary embedding: a position lies outside of the table")
        B.add_to_parent(tirx.AssertStmt(outside[0] == T.int64(0), StringImm("IndexError"), [message]))

    def _rows(self, begin: Any, end: Any, names: dict[str, Any], lanes: int) -> None:
        x, y = names["x"], names.get("y", names["x"])
        half, d = self.r // 2, self.head_dim
        with v.span(begin, end) as row:
            b, s = v.let(T.floordiv(row, names["S"])), v.let(T.floormod(row, names["S"]))
            angle_batch = T.int64(0) if self.shared else b
            at = [v.let(names["positions"][angle_batch, s])] if self.positions else [angle_batch, s]

            def copy(start: Any, count: int) -> None:
                if count and not self.in_place:
                    v.sweep(
                        count, lanes, lambda i, n, _: v.store(y, [b, s, start + i], v.load(x, [b, s, start + i], n), n)
                    )

            with T.serial(self.heads) as head:
                first = head * d

                def rotate(i: Any, n: int, _: int) -> None:
                    cos, sin = v.let(v.load(names["cos"], [*at, i], n)), v.let(v.load(names["sin"], [*at, i], n))
                    if self.interleaved:
                        pairs = v.let(v.load(x, [b, s, first + i * 2], 2 * n))
                        even = v.let(v.shuffle(pairs, range(0, 2 * n, 2)))
                        odd = v.let(v.shuffle(pairs, range(1, 2 * n, 2)))
                    else:
                        even = v.let(v.load(x, [b, s, first + i], n))
                        odd = v.let(v.load(x, [b, s, first + half + i], n))
                    # Explicit, so that every compiler fuses the same product.
                    real = v.let(v.fma(even, cos, v.const(0, n) - odd * sin))
                    imaginary = v.let(v.fma(odd, cos, even * sin))
                    if self.interleaved:
                        order = [lane + part * n for lane in range(n) for part in (0, 1)]
                        v.store(y, [b, s, first + i * 2], T.Shuffle([real, imaginary], order), 2 * n)
                    else:
                        v.store(y, [b, s, first + i], real, n)
                        v.store(y, [b, s, first + half + i], imaginary, n)

                v.sweep(half, lanes, rotate, unroll=1)
                copy(first + self.r, d - self.r)
            copy(T.int64(self.heads * d), self.width - self.heads * d)

    def reference(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """``{"y": ...}`` in numpy, float32 as the kernel; also for the in-place form."""
        x, cos, sin = inputs[:3]
        if self.positions:
            cos, sin = cos[inputs[3]], sin[inputs[3]]
        y = x.copy()
        heads = x[..., : self.heads * self.head_dim].reshape(*x.shape[:2], self.heads, self.head_dim)
        out = y[..., : self.heads * self.head_dim].reshape(heads.shape).copy()
        half = self.r // 2
        first = slice(0, self.r, 2) if self.interleaved else slice(0, half)
        second = slice(1, self.r, 2) if self.interleaved else slice(half, self.r)
        c, s = cos[:, :, None], sin[:, :, None]
        out[..., first] = heads[..., first] * c - heads[..., second] * s
        out[..., second] = heads[..., second] * c + heads[..., first] * s
        y[..., : self.heads * self.head_dim] = out.reshape(*x.shape[:2], -1)
        return {"y": y}
