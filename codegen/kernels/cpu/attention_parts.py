"""What the attention kernels share: addresses of heads, terms of masks, and an exponential for softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.targets.target import Target

if TYPE_CHECKING:
    from qcompile.codegen.kernels.cpu.attention import Attention

LOWEST = -3.0e38
"""Stands for a masked score; low enough to absorb any real one, far enough from -inf to leave room for sums."""

_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
"""``2^f`` for ``|f| <= 1/2``, least maximum relative error (9e-8) with the constant term fixed."""
_EXP2_UNIT = (
    0.9999999403953552,
    0.6931530833244324,
    0.24015361070632935,
    0.05582631751894951,
    0.00898933969438076,
    0.0018775766948238015,
)
"""``2^f`` for ``0 <= f < 1``, likewise with a free constant term."""
_ROUND = 12582912.0


def exp2(x: Any, n: int) -> Any:
    """``2^x`` for ``x <= 0``: relative error below 3e-7; below -126 it may be any number from 0 to ``2^-126``."""
    if n == 16:
        # AVX-512 has both halves of the job: x - floor(x), and p * 2^floor(x) without over- or underflow.
        zero, every, current = v.const(0, n), T.int16(-1), T.int32(4)
        f = v.let(_intrinsic("reduce.ps.512", x, T.int32(1), zero, every, current))
        return v.let(_intrinsic("scalef.ps.512", _polynomial(_EXP2_UNIT, f, n), x, zero, every, current))
    x = v.let(T.max(x, v.const(-126.0, n)))
    shifted = v.let(v.add_exactly(x, v.const(_ROUND, n), n))
    f = v.let(x - (shifted - v.const(_ROUND, n)))
    p = _polynomial(_EXP2, f, n)
    bits = v.bits_of(p, "int32", n) + T.shift_left(v.bits_of(shifted, "int32", n), v.const(23, n, "int32"))
    return v.let(v.bits_of(bits, "float32", n))


def _polynomial(coefficients: tuple[float, ...], x: Any, n: int) -> Any:
    p = v.const(coefficients[-1], n)
    for c in reversed(coefficients[:-1]):
        p = v.let(v.fma(p, x, v.const(c, n)))
    return p


def _intrinsic(name: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin("float32x16", f"llvm.x86.avx512.mask.{name}", *args)


class Parts:
    """Accesses to the tensors of one attention kernel. ``names`` are its buffers and extents."""

    def __init__(self, spec: Attention, target: Target, names: dict[str, Any]) -> None:
        self.spec, self.names = spec, names
        self.cores = target.cores
        self.lanes = v.lanes_of(target)
        self.batch, self.s = names["B"], names["S"]
        self.t = names["S"] if spec.layout == "merged" else names["T"]
        self.group = spec.heads // spec.kh

    def element(self, which: str, b: Any, head: Any, row: Any, d: Any) -> tuple[Any, list[Any]]:
        """Buffer and index of element ``d`` of a query, key or value."""
        spec = self.spec
        width = spec.dv if which == "v" else spec.head_dim
        if spec.layout in ("heads", "cache"):
            return self.names[which], [b, head, row, d]
        if spec.layout == "rows":
            return self.names[which], [b, row, head * width + d]
        start = {"q": 0, "k": spec.heads * spec.head_dim, "v": (spec.heads + spec.kh) * spec.head_dim}[which]
        return self.names["qkv"], [b, row, head * width + (start + d)]

    def load(self, which: str, b: Any, head: Any, row: Any, d: Any, n: int) -> Any:
        buffer, index = self.element(which, b, head, row, d)
        return v.load(buffer, index, n)

    def mask_terms(self, b: Any, h: Any, query: Any, start: Any, n: int) -> Any:
        """``n`` elements of the mask as terms added to scores in base 2."""
        spec = self.spec
        mask = self.names["mask"]
        if spec.mask == "keys":
            index = [b, start]
        else:
            index = [i if full else 0 for i, full in zip((b, h, query), spec.mask_axes)] + [start]
        m = v.load(mask, index, n)
        if spec.mask == "float":
            return T.max(m * v.const(math.log2(math.e), n), v.const(LOWEST, n))
        visible = m if mask.dtype == "bool" else m != v.const(0, n, spec.keys_dtype)
        return T.Select(visible, v.const(0, n), v.const(LOWEST, n))

    def fill_bias(self, buffer: Any, at: Any, b: Any, h: Any, query: Any, start: Any, count: Any) -> None:
        """Mask terms of keys ``start .. start + count``; -inf from there to the end of the last vector."""
        n = self.lanes
        full = T.floordiv(count, T.int64(n))
        with T.serial(full) as i:
            value = self.mask_terms(b, h, query, start + i * n, n) if self.spec.mask else v.const(0, n)
            v.store(buffer, [at + i * n], value, n)
        with T.If(full * n < count), T.Then():
            v.store(buffer, [at + full * n], v.const(-math.inf, n), n)
            with T.serial(count - full * n) as i:
                key = full * n + i
                value = self.mask_terms(b, h, query, start + key, 1) if self.spec.mask else T.float32(0)
                v.store(buffer, [at + key], value, 1)
