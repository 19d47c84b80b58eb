"""Activations as signed numbers at the positions of the packed weights: what the code families do once per item.

A row is copied from uint8 (signed code + 128) to int8 or int16, each group of K padded with zeros to whole panel rows, and
summed up by group. The products then need no correction of their own: with unsigned codes ``c = q + z``

    sum_k q a  =  sum_k c a  -  z sum_k a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission
from qcompile.codegen.kernels.cpu.panels import PaddedPanels

PAD = 64
"""Elements between the end of a row and the next: rows a power of two apart would fall on the same lines of the cache."""


@dataclass
class SignedRows:
    """Rows of one item: ``values`` ``(mr, length)`` of ``dtype``, and int32 ``total`` ``(mr, groups)``."""

    values: Any
    total: Any
    dtype: str

    def word(self, row: Any, position: Any) -> Any:
        """Four consecutive activations as one integer."""
        four = v.load(self.values, [row, position], 4)
        return v.bits_of(four, "int32" if self.dtype == "int8" else "int64", 1)


def signed_rows(
    e: Emission, panels: PaddedPanels, first: Any, rows: Any, lanes: int, dtype: str = "int8"
) -> SignedRows:
    """Emit the copy of ``rows`` rows from ``first`` on, ``lanes`` elements at a time."""
    p, mr = panels, e.config["mr"]
    made = SignedRows(B.alloc_buffer((mr, p.length + PAD), dtype), B.alloc_buffer((mr, p.groups), "int32"), dtype)
    span = p.rows_per_group * p.step
    last = p.k - (p.groups - 1) * p.group

    def group(row: Any, index: Any, width: int) -> None:
        def part(s: Any, n: int) -> Any:
            raw = v.load(e.names["x"], [first + row, index * p.group + s], n)
            signed = v.let(T.bitwise_xor(v.bits_of(raw, "int8", n), v.const(-128, n, "int8")))
            v.store(made.values, [row, index * span + s], v.cast(signed, dtype, n) if dtype != "int8" else signed, n)
            return v.cast(signed, "int32", n)

        total = v.sweep_reduce(width, lanes, part, v.add, dtype="int32")
        v.store(made.total, [row, index], total, 1)
        if width < span:
            zero = lambda s, n, _: v.store(made.values, [row, index * span + width + s], v.const(0, n, dtype), n)  # noqa: E731
            v.sweep(span - width, lanes, zero)

    with T.serial(rows) as row:
        if p.groups > 1:
            with T.serial(p.groups - 1) as index:
                group(row, index, p.group)
        group(row, p.groups - 1, last)
    return made
