"""Embedding lookup: sums of table rows, with the norm and the quantizer of `Rowwise` after it.

    x[m] = sum_t table_t[ids_t[m]],   table_t[r] = codes_t[r] * scale_t[r] for quantized tables

An id counts from the end if it is negative, as in ONNX ``Gather``. Ids outside ``[-size, size)`` are found before any
row is read and raise ``IndexError`` from the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.rowwise import Load, Rowwise
from qcompile.errors import TargetError


@dataclass(frozen=True)
class Table:
    """One table of an embedding.

    Attributes:
        size: number of rows.
        quantized: int8 codes with one float32 scale per row, else float32 rows.
    """

    size: int
    quantized: bool = True


@dataclass(frozen=True)
class Embedding(Rowwise):
    """Parameters of the PrimFunc: for each table ``t`` its ``table{t} (size, D)`` (int8 or float32), ``scale{t} (size,
    1)`` if it is quantized, and ``ids{t} (M,)``; then what `Rowwise` takes after ``x``, and its outputs.

    Attributes:
        tables: at least one.
        ids_dtype: ``int64`` or ``int32``.
    """

    f32_output: bool = True
    quantize: str = ""
    tables: tuple[Table, ...] = ()
    ids_dtype: str = "int64"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tables or min(table.size for table in self.tables) < 1 or self.gated:
            raise TargetError(f"embedding of width {self.width}: needs tables with rows, and takes no gate")

    @property
    def _sources(self) -> tuple[v.Param, ...]:
        found = []
        for t, table in enumerate(self.tables):
            found.append(v.Param(f"table{t}", (table.size, self.width), "int8" if table.quantized else "float32"))
            if table.quantized:
                found.append(v.Param(f"scale{t}", (table.size, 1)))
            found.append(v.Param(f"ids{t}", ("M",), self.ids_dtype))
        return tuple(found)

    def _check(self, names: dict[str, Any]) -> None:
        # In front of the parallel part: a failure inside of it could not be reported.
        outside = B.alloc_buffer((1,), "int64")
        v.store(outside, [0], T.int64(0), 1)
        for t, table in enumerate(self.tables):
            with T.serial(names["M"]) as i:
                at = T.Cast("int64", names[f"ids{t}"][i])
                wrong = T.Or(at < T.int64(-table.size), at >= T.int64(table.size))
                v.store(outside, [0], outside[0] + T.Cast("int64", wrong), 1)
        message = StringImm("embedding: an id lies outside of the table")
        B.add_to_parent(tirx.AssertStmt(outside[0] == T.int64(0), StringImm("IndexError"), [message]))

    def _source(self, i: Any, names: dict[str, Any]) -> Load:
        rows, scales = [], []
        for t, table in enumerate(self.tables):
            at = T.Cast("int64", names[f"ids{t}"][i])
            rows.append(v.let(T.Select(at < T.int64(0), at + table.size, at)))
            scales.append(v.let(names[f"scale{t}"][rows[-1], 0]) if table.quantized else None)

        def source(s: Any, n: int) -> Any:
            total = None
            for t, (row, scale) in enumerate(zip(rows, scales)):
                value = v.load(names[f"table{t}"], [row, s], n)
                if scale is not None:
                    value = v.cast(value, "float32", n) * v.splat(scale, n)
                total = value if total is None else total + value
            return total

        return source

    def reference(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, as `Rowwise.reference` gives them.

        Raises:
            IndexError: an id lies outside of its table.
        """
        given = dict(zip([p.name for p in self.params if not p.output], inputs, strict=True))
        x = np.float32(0)
        for t, table in enumerate(self.tables):
            rows = given[f"table{t}"][given[f"ids{t}"]].astype(np.float32)
            x = x + (rows * given[f"scale{t}"][given[f"ids{t}"]] if table.quantized else rows)
        return self._reference(x, given)
