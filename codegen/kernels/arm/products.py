"""Sums of products of bytes on ARM: SDOT, or 8-bit multiply-adds; and the activations they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Register

LANES = 4
"""32-bit lanes of a register."""

BYTES = 16
"""Bytes of a register."""


class Accumulator(Protocol):
    """A sum of products of bytes, one int32 lane per column."""

    def add(self, codes: Any, activations: Any) -> None:
        """Emit the addition of 4 products to each lane."""
        ...

    def flush(self) -> None:
        """Emit what must happen before a narrow sum overflows."""
        ...

    def total(self) -> Any:
        """The sum, int32x4."""
        ...


@dataclass(frozen=True)
class Word:
    """Consecutive activations of a row: lane ``lane`` of ``value``, which has ``lanes`` integers of ``depth`` bytes."""

    value: Any
    lanes: int
    lane: int
    depth: int

    def scalar(self) -> Any:
        """The integer."""
        return v.shuffle(self.value, [self.lane]) if self.lanes > 1 else self.value


def repeated(word: Word) -> Any:
    """A register of bytes that holds the word in every lane of its width."""
    count = BYTES // word.depth
    wide = v.shuffle(word.value, [word.lane] * count) if word.lanes > 1 else v.splat(word.value, count)
    return v.bits_of(wide, "int8", BYTES)


def signed(codes: Any) -> Any:
    """Bytes that are signed codes + 128 as those codes, int8."""
    lanes = int(codes.ty.dtype.lanes)
    return v.let(v.bits_of(T.bitwise_xor(codes, v.const(128, lanes, "uint8")), "int8", lanes))


def dot(acc: Any, a: Any, b: Any) -> Any:
    """``acc`` plus products of signed bytes, four into each int32 lane (SDOT)."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", acc, a, b)


class DotSum:
    """SDOT into one register."""

    def __init__(self, start: Any) -> None:
        self.sum = Register("int32", LANES)
        self.sum.set(start)

    def add(self, codes: Any, activations: Any) -> None:
        self.sum.set(dot(self.sum.get(), codes, activations))

    def flush(self) -> None:
        pass

    def total(self) -> Any:
        return self.sum.get()


class ProductSum:
    """SMULL and SMLAL into 16-bit lanes, flushed into 32-bit ones: two per column until the end."""

    def __init__(self, narrow: bool, start: Any) -> None:
        self.start = start
        zero = v.const(0, LANES, "int32")
        self.wide = [Register("int32", LANES) for _ in range(2)]
        self.narrow = [Register("int16", 2 * LANES) for _ in range(2)] if narrow else []
        for register in self.wide:
            register.set(zero)
        for register in self.narrow:
            register.set(v.const(0, 2 * LANES, "int16"))

    def add(self, codes: Any, activations: Any) -> None:
        for half in range(2):
            part = range(8 * half, 8 * half + 8)
            u, a = (v.cast(v.shuffle(value, part), "int16", 8) for value in (codes, activations))
            if self.narrow:
                self.narrow[half].set(self.narrow[half].get() + u * a)
            else:
                self.wide[half].set(self.wide[half].get() + pairs(u * a))

    def flush(self) -> None:
        for wide, narrow in zip(self.wide, self.narrow):
            wide.set(wide.get() + pairs(narrow.get()))
            narrow.set(v.const(0, 2 * LANES, "int16"))

    def total(self) -> Any:
        pairs = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", *(w.get() for w in self.wide))
        return self.start + pairs


class MaskedSum:
    """Activations where a mask is -1, added in pairs into 16-bit lanes; the sum is taken negative, as of products."""

    def __init__(self) -> None:
        self.wide, self.narrow = Register("int32", LANES), Register("int16", 2 * LANES)
        self.wide.set(v.const(0, LANES, "int32"))
        self.narrow.set(v.const(0, 2 * LANES, "int16"))

    def add(self, codes: Any, activations: Any) -> None:
        chosen = T.bitwise_and(codes, activations)
        self.narrow.set(self.narrow.get() + T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.saddlp", chosen))

    def flush(self) -> None:
        self.wide.set(self.wide.get() + pairs(self.narrow.get()))
        self.narrow.set(v.const(0, 2 * LANES, "int16"))

    def total(self) -> Any:
        return v.const(0, LANES, "int32") - self.wide.get()


def pairs(value: Any) -> Any:
    """Sums of neighbouring 16-bit lanes (SADALP when added to a register)."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", value)


def schedule_barrier(value: Any) -> None:
    """Keep LLVM's scheduler from moving instructions across; costs none. ``value`` is any that is alive."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.fake.use", value))
