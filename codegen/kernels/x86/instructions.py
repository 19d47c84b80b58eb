"""Names of the instructions LLVM does not find by itself, by lanes of 32 bits, and prefetching."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

MADDUBS = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
"""Unsigned times signed bytes, added in pairs to int16 with saturation."""

MADDWD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
"""Products of int16, added in pairs to int32."""

PSHUFB = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}
"""Bytes of a table of 16, within every 128 bits, at the indices in the low four bits of bytes below 128."""


def prefetch(buffer: Any, at: list[Any]) -> None:
    """Ask for a line of the first cache; the address may lie past the end of the buffer."""
    address = T.address_of(buffer[tuple(at)])
    T.evaluate(T.call_intrin("void", "tirx.prefetch", address, T.int32(0), T.int32(3), T.int32(1)))
