"""C99: integers of the standard widths, no library but ``stdint.h``."""

from __future__ import annotations

from qcompile.codegen.fixed.emit.printer import Dialect
from qcompile.formats.fixed import IntType


class C99(Dialect):
    """ISO C99."""

    def type(self, dtype: str, narrow: IntType | None = None) -> str:
        return "int" if dtype == "bool" else f"{dtype}_t"

    def literal(self, value: int, dtype: str) -> str:
        if dtype == "int64" or not -(2**31) < value < 2**31:
            return f"INT64_C({value})" if value >= 0 else f"(-INT64_C({-value}))"
        return str(value) if value >= 0 else f"({value})"

    def extreme(self, name: str, dtype: str, a: str, b: str) -> str:
        return f"{name}_{dtype}({a}, {b})"


HELPERS = "".join(
    f"static inline {kind}_t {name}_{kind}({kind}_t a, {kind}_t b) {{ return a {sign} b ? a : b; }}\n"
    for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
    for name, sign in (("min", "<"), ("max", ">"))
)
"""Functions that `C99.extreme` calls."""
