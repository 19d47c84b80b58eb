"""How packed codes become bytes that a dot product takes, 16 at a time.

A code may leave its byte multiplied by a power of two, if the products with it get an accumulator of their own that is
shifted back once per group. So a two-bit field costs one instruction: ``x & 3``, ``x & 12`` (times 4), ``x & 48`` (times
16), ``x >> 6``. A single bit becomes -1 or 0 (CMTST). More registers of codes than accumulators are worth this only for one row of
activations: with several, codes are brought to the bottom of their bytes once and used by all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.arm.products import BYTES, LANES
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.panels import Panels


@dataclass(frozen=True)
class Part:
    """One of the accumulators a sum is split into: ``sum += (accumulator >> shift) * factor``.

    ``mask`` says that its codes are -1 or 0.
    """

    shift: int = 0
    factor: int = 1
    mask: bool = False


PLAIN = Part()


def partial_sums(panels: Panels, rows: int, wide: bool) -> list[Part]:
    """The accumulators of one column vector; ``wide`` if they have room for codes multiplied by powers of two."""
    if panels.bits == 1:
        return [Part(0, -1, True)]
    if panels.bits == 3 and rows == 1:  # more planes leave too few registers for their sums
        return [Part(0, -(1 << bit), True) for bit in range(panels.bits)]
    if panels.bits == 2 and rows == 1 and wide:
        return [PLAIN, Part(2), Part(4)]
    return [PLAIN]


def unpack(panels: Panels, raw: list[Any], index: int, parts: list[Part]) -> Iterator[tuple[int, Any]]:
    """The codes at position ``index`` of every byte: (number of the accumulator in ``parts``, int8 vector)."""
    for part, codes in _unpack(panels, raw, index, parts):
        yield part, v.bits_of(codes, "int8", BYTES)


def _unpack(panels: Panels, raw: list[Any], index: int, parts: list[Part]) -> Iterator[tuple[int, Any]]:
    bits = panels.bits
    if bits == 8 and panels.fmt.symmetric:
        yield 0, raw[0]
    elif bits == 8:
        yield 0, T.bitwise_xor(raw[0], v.const(128, BYTES, "uint8"))
    elif panels.twos_complement:  # 16 times a code of 4 bits
        yield 0, T.bitwise_and(raw[0], v.const(0xF0, BYTES, "uint8")) if index else _shift(raw[0], 4)
    elif bits == 1:
        yield 0, _mask(raw[0], index)
    elif panels.planes and len(parts) > 1:
        for bit in range(bits):
            yield bit, _mask(raw[bit], index)
    elif panels.planes:
        # From the top of a byte downwards: SRI puts the next plane below the bits that are there already.
        value = _shift(raw[bits - 1], 7 - index)
        for below, plane in enumerate(reversed(raw[: bits - 1]), 1):
            moved = v.let(_shift(plane, 7 - index))
            value = T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.vsri", value, moved, T.int32(below))
        yield 0, _shift(value, bits - 8)
    elif bits == 2 and len(parts) > 1:
        if index == 3:
            yield 0, _shift(raw[0], -6)
        else:
            yield index, T.bitwise_and(raw[0], v.const(3 << (2 * index), BYTES, "uint8"))
    else:
        moved = _shift(raw[0], -index * bits)
        top = (index + 1) * bits == 8
        yield 0, moved if top else T.bitwise_and(moved, v.const((1 << bits) - 1, BYTES, "uint8"))


def code(panels: Panels, raw: list[Any], index: int) -> Any:
    """The codes at position ``index`` of every byte as unsigned bytes, nothing multiplied or masked."""
    if panels.bits == 1:
        moved = _shift(raw[0], -index)
        return moved if index == 7 else T.bitwise_and(moved, v.const(1, BYTES, "uint8"))
    return next(value for _, value in _unpack(panels, raw, index, [PLAIN]))


def plane(panels: Panels, raw: list[Any], index: int, bit: int) -> Any:
    """One bit of the codes at position ``index`` of every byte, as -1 or 0, int8."""
    mask = _mask(raw[bit], index) if panels.planes else _mask(raw[0], index * panels.bits + bit)
    return v.bits_of(mask, "int8", BYTES)


def combine(parts: list[Part], sums: list[Any], start: Any) -> Any:
    """``start`` plus the sum the accumulators stand for."""
    total = start
    for part, value in zip(parts, sums, strict=True):
        if part.shift:
            value = T.shift_right(value, v.const(part.shift, LANES, "int32"))
        if part.factor < 0:
            total = total - _times(value, -part.factor)
        else:
            total = total + _times(value, part.factor)
    return total


def _times(value: Any, factor: int) -> Any:
    """``value`` times a power of two."""
    return value if factor == 1 else T.shift_left(value, v.const(factor.bit_length() - 1, LANES, "int32"))


def _mask(x: Any, bit: int) -> Any:
    """255 where ``bit`` is set in the byte, else 0."""
    chosen = T.bitwise_and(x, v.const(1 << bit, BYTES, "uint8"))
    return T.Select(chosen != v.const(0, BYTES, "uint8"), v.const(255, BYTES, "uint8"), v.const(0, BYTES, "uint8"))


def _shift(x: Any, left: int) -> Any:
    """Shift every byte left, or right if negative."""
    if left == 0:
        return x
    amount = v.const(abs(left), BYTES, "uint8")
    return T.shift_left(x, amount) if left > 0 else T.shift_right(x, amount)
