"""Bit fields of packed codes, moved within vectors of 32-bit lanes.

x86 shifts 16-, 32- and 64-bit lanes but not bytes, so a code is moved by shifting whole lanes and masking.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.panels import Panels


def as_bytes(words: Any, lanes: int) -> Any:
    """Reinterpret a vector of 32-bit lanes as bytes."""
    return v.bits_of(words, "int8", 4 * lanes)


def byte_mask(mask: int, lanes: int) -> Any:
    """``mask`` in every byte, as 32-bit lanes."""
    word = (mask & 255) * 0x01010101
    return v.const(word - (1 << 32) if word >> 31 else word, lanes, "int32")


def shift(words: Any, left: int, lanes: int) -> Any:
    """Shift 32-bit lanes left, or right if negative; bits cross bytes and must be masked."""
    if left == 0:
        return words
    return T.shift_left(words, v.const(left, lanes, "int32")) if left > 0 else _shift_right(words, -left, lanes)


def repeat_byte(words: Any, lanes: int) -> Any:
    """The lowest byte of every lane in all its bytes; the others must be 0."""
    pair = v.let(T.bitwise_or(words, shift(words, 8, lanes)))
    return v.let(T.bitwise_or(pair, shift(pair, 16, lanes)))


def signed_field(words: Any, end: int, bits: int, lanes: int) -> Any:
    """Bits ``[end - bits, end)`` of every lane as a signed number."""
    top = shift(words, 32 - end, lanes)
    return T.shift_right(top, v.const(32 - bits, lanes, "int32")) if bits < 32 else top


def unsigned_field(words: Any, end: int, bits: int, lanes: int) -> Any:
    """Bits ``[end - bits, end)`` of every lane as an unsigned number, in int32."""
    moved = shift(words, bits - end, lanes)
    return moved if end == 32 else T.bitwise_and(moved, v.const((1 << bits) - 1, lanes, "int32"))


def _shift_right(words: Any, by: int, lanes: int) -> Any:
    unsigned = v.bits_of(words, "uint32", lanes)
    return v.bits_of(T.shift_right(unsigned, v.const(by, lanes, "uint32")), "int32", lanes)


def field(raw: list[Any], index: int, panels: Panels, top: int) -> Any:
    """Code ``index`` of every byte with its highest bit at bit ``top - 1``, other bits cleared."""
    lanes, bits = panels.lanes, panels.bits
    low = top - bits
    if not panels.planes:
        moved = shift(raw[0], low - index * bits, lanes)
        return moved if bits == 8 else T.bitwise_and(moved, byte_mask(((1 << bits) - 1) << low, lanes))
    value = None
    for bit in range(bits):
        moved = T.bitwise_and(shift(raw[bit], low + bit - index, lanes), byte_mask(1 << (low + bit), lanes))
        value = moved if value is None else T.bitwise_or(value, moved)
    return value
