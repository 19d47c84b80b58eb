"""HLS C++: ``ap_int`` of the exact widths, loops with the pragmas of Vitis HLS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qcompile.codegen.fixed.emit.printer import Dialect
from qcompile.formats.fixed import IntType


class Hls(Dialect):
    """C++ for Vitis HLS."""

    def type(self, dtype: str, narrow: IntType | None = None) -> str:
        if dtype == "bool":
            return "bool"
        kind = narrow or _int_type(dtype)
        return f"ap_int<{kind.bits}>" if kind.signed else f"ap_uint<{kind.bits}>"

    def literal(self, value: int, dtype: str) -> str:
        if dtype == "int64" or not -(2**31) < value < 2**31:
            return f"ap_int<64>({value}LL)"
        return str(value) if value >= 0 else f"({value})"

    def cast(self, dtype: str, value: str) -> str:
        return f"{self.type(dtype)}({value})"

    def extreme(self, name: str, dtype: str, a: str, b: str) -> str:
        return f"hls_{name}<{self.type(dtype)} >({a}, {b})"

    def loop_pragmas(self, annotations: Mapping[str, int]) -> Iterator[str]:
        if "hls.pipeline" in annotations:
            yield f"#pragma HLS PIPELINE II={annotations['hls.pipeline']}"
        if "hls.unroll" in annotations:
            yield "#pragma HLS UNROLL"

    def buffer_pragmas(self, name: str) -> Iterator[str]:
        yield f"#pragma HLS ARRAY_PARTITION variable={name} complete dim=0"


HELPERS = """\
template <class T> static inline T hls_min(T a, T b) { return a < b ? a : b; }
template <class T> static inline T hls_max(T a, T b) { return a > b ? a : b; }
"""


def _int_type(dtype: str) -> IntType:
    signed = not dtype.startswith("u")
    return IntType(int(dtype.lstrip("uint")), signed)
