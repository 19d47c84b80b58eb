"""Fast Walsh-Hadamard transform of a row in place, block by block, for every order with a known matrix.

A block of order n = m 2^k is transformed by ``H_m (x) H_2^k / sqrt(n)``: k butterfly stages over contiguous runs of 2^k
(those below a vector's length inside the register), then ``H_m`` across the m runs. Costs k + m operations per element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.formats.hadamard import factors, hadamard_signs

_UNROLLED = 20
"""Largest core whose sums are written out."""
_COLUMNS, _BITS = 2, 48
"""Sums of a large core that run side by side, and terms whose signs fit into one constant."""


def transform_row(buffer: Any, at: Callable[[Any], list[Any]], width: int, lanes: int, block: int = 0) -> None:
    """Emit ``row = row @ blockdiag(H, H, ...)``.

    Args:
        buffer: float32, holds the row.
        at: index of element ``s`` of the row.
        width: elements of the row.
        lanes: float32 elements of a register.
        block: order of the transform, a divisor of ``width``; the whole row if 0.
    """
    block = block or width
    core, power = factors(block)
    run = 1 << power
    n = min(lanes, run)
    scale = 1 / block**0.5
    in_register = n.bit_length() - 1
    stages = [1 << i for i in range(in_register, power)]

    def load(s: Any) -> Any:
        return v.let(v.load(buffer, at(s), n))

    def keep(s: Any, value: Any) -> None:
        v.store(buffer, at(s), value, n)

    last_is_butterfly = core == 1 and bool(stages)

    def within(s: Any) -> None:
        x = load(s)
        for i in range(in_register):
            x = _lane_butterfly(x, 1 << i, n)
        if core == 1 and not stages:
            x = x * v.const(scale, n)
        keep(s, x)

    if in_register or (core == 1 and not stages):
        _loop(width // n, lambda i: within(i * n))
    for stage, h in enumerate(stages):
        scaled = last_is_butterfly and stage == len(stages) - 1

        def butterfly(s: Any, h: int = h, scaled: bool = scaled) -> None:
            a, b = load(s), load(s + h)
            total, difference = a + b, a - b
            if scaled:
                total, difference = total * v.const(scale, n), difference * v.const(scale, n)
            keep(s, v.let(total))
            keep(s + h, v.let(difference))

        def pairs(i: Any, h: int = h, butterfly: Any = butterfly) -> None:
            _loop(h // n, lambda j: butterfly(i * (2 * h) + j * n))

        _loop(width // (2 * h), pairs)
    if core > 1:
        signs = hadamard_signs(core)

        def across(b: Any, j: Any) -> None:
            base = b * block + j * n
            x = [load(base + a * run) for a in range(core)]
            # x @ H_m: output c sums column c.
            for c in range(core):
                total = x[0] if signs[0, c] > 0 else v.const(0, n) - x[0]
                for a in range(1, core):
                    total = v.let(total + x[a] if signs[a, c] > 0 else total - x[a])
                keep(base + c * run, total * v.const(scale, n))

        # Registers side by side that share a sign.
        side = next(k for k in (4, 2, 1) if run // n % k == 0)

        def columns(b: Any, j: Any) -> None:
            """The same for a large core, whose code would be too long written out: signs are bits of constants."""
            base, wide = b * block + j * (side * n), side * n
            held = B.alloc_buffer((core * wide,), "float32")
            sums = B.alloc_buffer((_COLUMNS * wide,), "float32")
            with T.serial(core) as a:
                for q in range(side):
                    v.store(held, [a * wide + q * n], load(base + a * run + q * n), n)
            for first in range(0, core, _COLUMNS):
                group = range(first, min(first + _COLUMNS, core))
                for k in range(len(group) * side):
                    v.store(sums, [k * n], v.const(0, n), n)
                for part in range(0, core, _BITS):
                    with T.serial(min(_BITS, core - part)) as a:
                        x = [v.let(v.load(held, [(part + a) * wide + q * n], n)) for q in range(side)]
                        for k, c in enumerate(group):
                            minus = sum(1 << r for r, sign in enumerate(signs[part : part + _BITS, c]) if sign < 0)
                            bit = T.bitwise_and(T.shift_right(T.int64(minus), T.cast(a, "int64")), T.int64(1))
                            sign = v.let(v.splat(T.float32(1) - T.float32(2) * T.cast(bit, "float32"), n))
                            for q in range(side):
                                at = [k * wide + q * n]
                                v.store(sums, at, T.fma(sign, x[q], v.load(sums, at, n)), n)
                for k, c in enumerate(group):
                    for q in range(side):
                        keep(base + c * run + q * n, v.load(sums, [k * wide + q * n], n) * v.const(scale, n))

        if core <= _UNROLLED:
            _loop(width // block, lambda b: _loop(run // n, lambda j: across(b, j)))
        else:
            _loop(width // block, lambda b: _loop(run // (n * side), lambda j: columns(b, j)))


def _loop(count: int, body: Callable[[Any], None]) -> None:
    """A loop that disappears when it runs once."""
    if count == 1:
        body(0)
        return
    with T.serial(count) as i:
        body(i)


def _lane_butterfly(x: Any, h: int, lanes: int) -> Any:
    """Sums and differences of lanes ``h`` apart."""
    partner = v.shuffle(x, [i ^ h for i in range(lanes)])
    signs = [1.0 if not i & h else -1.0 for i in range(lanes)]
    return v.let(T.fma(x, _vector(signs), partner))


def _vector(values: list[float]) -> Any:
    """A constant vector of +-1 with period: built from bits, as TIR has no vector literals."""
    lanes = len(values)
    index = T.ramp(T.int32(0), T.int32(1), lanes)
    h = values.index(-1.0)
    bit = T.bitwise_and(T.shift_right(index, v.const(h.bit_length() - 1, lanes, "int32")), v.const(1, lanes, "int32"))
    return v.const(1, lanes) - v.cast(bit, "float32", lanes) * v.const(2, lanes)
