"""Walsh-Hadamard blocks by butterflies, for rows that `rotation` does not take: what a thread holds is transformed in registers,
the rest in passes through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise
from qcompile.formats.hadamard import factors, hadamard_signs

RADIX = 5
"""Bits of the index one pass covers, at most."""


class Butterflies:
    """Rotation of the row a block holds; `rowwise_code` sets the names it uses."""

    k: CudaRowwise
    value: e.Registers
    tx: Any
    arena: Any
    _each: Any

    def _place(self, index: Any) -> Any:
        """Where element ``index`` of the row lies in shared memory; a word is left out after 32 against bank conflicts."""
        return self.k.row_at + index + index // 32

    def _rotate(self) -> None:
        k = self.k
        core, power = factors(k.hadamard)
        held = self._held(power)
        self._rotate_held(held)

        def put(c: int, at: Any) -> None:
            place = e.let(self._place(at))
            for i in range(k.vector):  # a vector does not cross a multiple of 32
                B.buffer_store(self.arena, T.reinterpret("uint32", self.value[c, i]), [place + i])

        def get(c: int, at: Any) -> None:
            scale = T.float32(1 / np.sqrt(k.hadamard))
            place = e.let(self._place(at))
            for i in range(k.vector):
                self.value[c, i] = T.reinterpret("float32", self.arena[place + i]) * scale

        self._each(put)
        T.evaluate(T.cuda.cta_sync())
        rest = [bit for bit in range(power) if bit not in held]
        while rest:
            # Neighbouring bits; five from the third on leave no bank conflicts.
            bits = next(n for n in range(min(RADIX, len(rest)), 0, -1) if rest[n - 1] == rest[0] + n - 1)
            self._pass(1 << rest[0], 1 << bits, None)
            rest = rest[bits:]
        if core > 1:
            self._pass(1 << power, core, hadamard_signs(core))
        self._each(get)

    def _held(self, power: int) -> dict[int, tuple[str, int]]:
        """Bits of the index within a block that tell apart what one thread holds: of its vectors, of their elements."""
        k = self.k
        if k.vector == 1:
            return {}
        held = {bit: ("i", 1 << bit) for bit in range(min(2, power))}
        stride = k.threads * k.vector
        if k.chunks & (k.chunks - 1) == 0 and k.chunks * stride == k.width and stride & (stride - 1) == 0:
            for level in range(int(log2(k.chunks))):
                bit = int(log2(stride)) + level
                if bit < power:
                    held[bit] = ("c", 1 << level)
        return held

    def _rotate_held(self, held: dict[int, tuple[str, int]]) -> None:
        """Butterflies in registers."""
        k = self.k
        for axis, step in held.values():
            for c in range(k.chunks):
                for i in range(k.vector):
                    if (i if axis == "i" else c) & step:
                        continue
                    other = (c, i | step) if axis == "i" else (c | step, i)
                    self._butterfly(self.value, (c, i), other)

    def _butterfly(self, values: e.Registers, a: Any, b: Any) -> None:
        difference = e.Registers((1,), "float32")
        difference[0] = values[a] - values[b]
        values[a] = values[a] + values[b]
        values[b] = difference[0]

    def _pass(self, stride: int, radix: int, signs: np.ndarray | None) -> None:
        """Transform ``radix`` points ``stride`` apart, all over the row: butterflies, or the matrix of ``signs``."""
        k = self.k
        groups = k.width // radix
        # Offsets of the points are constants where all of them keep their distance from multiples of 32.
        fixed = stride & (stride - 1) == 0 and (stride * radix) % 32 == 0
        with T.serial(-(-groups // k.threads)) as p:
            g = e.let(p * k.threads + self.tx)
            with T.If(g < groups), T.Then():
                first = e.let(g // stride * (stride * radix) + g % stride)
                base = e.let(self._place(first))
                place = [
                    base + (i * stride + i * stride // 32) if fixed else self._place(first + i * stride)
                    for i in range(radix)
                ]
                points = e.Registers((radix,), "float32")
                for i in range(radix):
                    points[i] = T.reinterpret("float32", self.arena[place[i]])
                if signs is None:
                    for level in range(int(log2(radix))):
                        for i in range(radix):
                            if i >> level & 1 == 0:
                                self._butterfly(points, i, i | 1 << level)
                else:
                    multiply_signs(points, lambda r: r, signs)
                for i in range(radix):
                    B.buffer_store(self.arena, T.reinterpret("uint32", points[i]), [place[i]])
        T.evaluate(T.cuda.cta_sync())


def multiply_signs(points: e.Registers, index: Callable[[int], Any], signs: np.ndarray) -> None:
    """``points @ signs`` in place, point r at ``index(r)``. Of every four points a, b, c, d the sums a +- b +- c +- d by the signs of b, c and d: every
    column of the matrix is a quarter of them added up (Arlazarov et al., 1970)."""
    radix = len(signs)
    sums, pair = e.Registers((radix // 4, 8), "float32"), e.Registers((4,), "float32")
    for q in range(radix // 4):
        for k in range(2):
            first, second = (index(4 * q + 2 * k + i) for i in range(2))
            pair[2 * k] = points[first] + points[second]
            pair[2 * k + 1] = points[first] - points[second]
        for b in range(2):
            for c in range(2):
                for d in range(2):
                    other = pair[2 + (c ^ d)]
                    sums[q, 4 * b + 2 * c + d] = pair[b] - other if c else pair[b] + other
    for r in range(radix):
        points[index(r)] = _signed_sum(sums, signs[:, r])


def _signed_sum(sums: e.Registers, signs: np.ndarray) -> Any:
    """Points times a column of signs."""
    total = None
    for q in range(len(signs) // 4):
        first, *rest = (int(s) for s in signs[4 * q : 4 * q + 4])
        b, c, d = (int(s != first) for s in rest)
        part = sums[q, 4 * b + 2 * c + d]
        if total is None:
            total = part if first > 0 else T.float32(0) - part
        else:
            total = total + part if first > 0 else total - part
    return total
