"""The few PTX instructions dequantizers are written in, on numpy arrays: one element per lane."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np


class Word:
    """32-bit registers of all lanes."""

    def __init__(self, bits: Any) -> None:
        self.bits = np.asarray(bits, np.uint32)

    def __rshift__(self, other: Word) -> Word:
        return Word(self.bits >> other.bits)

    def __lshift__(self, other: Word) -> Word:
        return Word(self.bits << other.bits)

    def __and__(self, other: Word) -> Word:
        return Word(self.bits & other.bits)

    def __mul__(self, other: Word) -> Word:
        return Word(self.bits * other.bits)

    def __add__(self, other: Word) -> Word:
        return Word(self.bits + other.bits)

    def __sub__(self, other: Word) -> Word:
        return Word(self.bits - other.bits)

    def __eq__(self, other: object) -> Any:
        assert isinstance(other, Word)
        return self.bits == other.bits

    __hash__ = None  # type: ignore[assignment]


class Registers:
    """An array of registers; an element read is a place that `ptx` can write to."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "uint32") -> None:
        self.values: dict[Any, Word] = {}

    def __getitem__(self, index: Any) -> Word:
        return self.values.setdefault(index, Word(np.zeros(1, np.uint32)))

    def __setitem__(self, index: Any, value: Word) -> None:
        self.values[index] = Word(value.bits)


def _halves(word: Word, kind: str) -> np.ndarray:
    raw = np.stack([word.bits & 0xFFFF, word.bits >> 16], -1).astype(np.uint16)
    return raw.view(ml_dtypes.bfloat16 if kind == "bf16x2" else np.float16).astype(np.float64)


def _word(values: np.ndarray, kind: str) -> np.ndarray:
    dtype = ml_dtypes.bfloat16 if kind == "bf16x2" else np.float16
    raw = values.astype(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
    return raw[..., 0] | raw[..., 1] << 16


def _permute(a: Word, b: Word, select: Word) -> np.ndarray:
    lanes = np.broadcast(a.bits, b.bits, select.bits).shape
    both = np.stack([np.broadcast_to(w.bits >> np.uint32(8 * i) & 255, lanes) for w in (a, b) for i in range(4)])
    out = np.zeros(lanes, np.uint32)
    for i in range(4):
        nibble = np.broadcast_to(select.bits >> np.uint32(4 * i) & 15, lanes)
        byte = np.take_along_axis(both, (nibble & 7)[None].astype(np.intp), 0)[0]
        sign = np.where(byte >> 7, 255, 0)  # what a selector with its top bit set asks for
        out |= np.where(nibble >> 3, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def ptx(instruction: str, out: Word, *operands: Any) -> None:
    """Execute one instruction."""
    name, *_, kind = instruction.split(".")
    if instruction == "lop3.b32":
        a, b, c, table = operands
        assert table == 0xEA
        out.bits = a.bits & b.bits | c.bits
    elif instruction == "prmt.b32":
        a, b, select = operands
        out.bits = _permute(a, b, select)
    elif instruction == "cvt.rni.s32.f32":
        out.bits = np.rint(operands[0]).astype(np.int64).astype(np.uint32)
    elif instruction == "cvt.rn.bf16x2.f32":
        high, low = operands
        out.bits = _word(np.stack(np.broadcast_arrays(low, high), -1), "bf16x2")
    else:
        values = [_halves(w, kind) for w in operands]
        result = {
            "fma": lambda a, b, c: a * b + c,
            "mul": lambda a, b: a * b,
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
        }[name](*values)
        out.bits = _word(result, kind)


def _reinterpret(dtype: str, word: Any) -> np.ndarray:
    bits = word.bits if isinstance(word, Word) else word
    return bits.view(np.float32 if dtype == "float32" else np.float16).astype(np.float32)


def _cast(value: Any, dtype: str) -> np.ndarray:
    bits = value.bits if isinstance(value, Word) else value
    return bits.astype(dtype)


T = SimpleNamespace(
    reinterpret=_reinterpret,
    cast=_cast,
    float32=np.float32,
    bitwise_xor=lambda a, b: Word(a.bits ^ b.bits),
    max=lambda a, b: Word(np.maximum(a.bits, b.bits)),
    Select=lambda c, a, b: Word(np.where(c, a.bits, b.bits)),
    bitwise_or=lambda a, b: Word(a.bits | b.bits),
)
"""What stands for TIR."""


def u32(value: int) -> Word:
    """An immediate."""
    return Word(np.uint32(value))
