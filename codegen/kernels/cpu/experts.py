"""Products with matrices that are picked at run time: mixtures of experts, by the family of any linear operator.

    y[s] = x[s // repeat] @ w[ids[s]]                          s: slots, ``repeat`` of them for each token

Slots are sorted by expert (counting sort, stable), so that an expert's weights are read once, by a product of as many rows as it has
slots: a single one while decoding, some hundred in a prompt.

    order, start = sort(ids)                                   slots of expert e: order[start[e] : start[e + 1]]
    rows[i] = x[order[i] // repeat]
    for e in experts:  y[order[start[e] : start[e + 1]]] = family(rows[start[e] : start[e + 1]], w[e])

The family writes its code once, for operands that begin at a place known at run time; it is the code of the linear operator, and so
are packed weights and results, bit for bit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import opaque
from qcompile.formats import Quantized
from qcompile.targets.target import Target

GRAIN = 16
"""Rows that one thread copies at least."""

SHARED = ("table",)
"""Packed arrays that are the same for all experts."""


@runtime_checkable
class ExpertFamily(Protocol):
    """A `LinearKernel` whose code can be written for operands that begin anywhere."""

    name: str

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        """See `LinearKernel.pack`."""
        ...

    def operands(self, problem: LinearProblem, config: dict[str, Any]) -> list[v.Param]:
        """The parameters of its PrimFunc."""
        ...

    def emit(self, problem: LinearProblem, config: dict[str, Any], names: dict[str, Any], m: Any) -> None:
        """Write the code for ``m`` rows, at least 1. Row ``i`` of the result goes to row ``out_row[i]``, if that is in ``names``."""
        ...


@dataclass(frozen=True)
class SortSlots:
    """``ids (S,)`` to ``order (S,)`` and ``start (experts + 1,)``, int32; an id counts from the end if it is negative.

    Ids outside ``[-experts, experts)`` raise ``IndexError`` from the call.
    """

    experts: int
    ids_dtype: str = "int64"

    def build(self, name: str = "sort_slots") -> Any:
        """The PrimFunc."""
        count = self.experts
        params = [
            v.Param("ids", ("S",), self.ids_dtype),
            v.Param("order", ("S",), "int32", output=True),
            v.Param("start", (count + 1,), "int32", output=True),
        ]
        with v.kernel(name, params) as (builder, names):
            ids, order, start = names["ids"], names["order"], names["start"]
            place = B.alloc_buffer((count + 1,), "int32")
            outside = B.alloc_buffer((1,), "int32")
            v.store(outside, [0], T.int32(0), 1)
            with T.serial(count + 1) as e:
                v.store(place, [e], T.int32(0), 1)
            slots = v.let(T.cast(names["S"], "int32"))
            with T.serial(slots) as s:
                at = v.let(T.cast(ids[s], "int64"))
                wrong = T.Or(at < T.int64(-count), at >= T.int64(count))
                v.store(outside, [0], outside[0] + T.cast(wrong, "int32"), 1)
                expert = v.let(self._expert(at))
                v.store(place, [expert + 1], place[expert + 1] + 1, 1)
            message = StringImm("experts: an id lies outside of the stack")
            B.add_to_parent(tirx.AssertStmt(outside[0] == T.int32(0), StringImm("IndexError"), [message]))
            v.store(start, [0], T.int32(0), 1)
            with T.serial(count) as e:
                v.store(place, [e + 1], place[e + 1] + place[e], 1)
                v.store(start, [e + 1], place[e + 1], 1)
            with T.serial(slots) as s:
                expert = v.let(self._expert(v.let(T.cast(ids[s], "int64"))))
                to = v.let(place[expert])
                v.store(order, [to], s, 1)
                v.store(place, [expert], to + 1, 1)
        return builder.get()

    def _expert(self, at: Any) -> Any:
        """The expert an id means; some expert, where it means none."""
        positive = T.cast(T.Select(at < T.int64(0), at + self.experts, at), "int32")
        return T.max(T.min(positive, self.experts - 1), 0)

    def reference(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same by numpy."""
        experts = ids.reshape(-1) % self.experts
        count = np.bincount(experts, minlength=self.experts)
        return np.argsort(experts, kind="stable").astype(np.int32), np.r_[0, np.cumsum(count)].astype(np.int32)


@dataclass(frozen=True)
class ExpertProduct:
    """The product of slots in order with the experts' matrices.

    Parameters of the PrimFunc: ``x`` and, for integer activations, ``x_scale``, of ``T`` tokens as `LinearKernel.build` has them;
    ``order (S,)`` and ``start``; the packed arrays, one for each expert, stacked; then its outputs ``out (S, N)`` and, to be thrown
    away, the rows in order and their scales.

    Attributes:
        family, problem, config: the linear operator of one expert; without epilogue.
        experts, repeat: see above.
    """

    family: ExpertFamily
    problem: LinearProblem
    config: dict[str, Any]
    experts: int
    repeat: int

    def pack(self, weights: list[Quantized]) -> dict[str, np.ndarray]:
        """Pack the ``(K, N)`` matrix of every expert and stack the arrays."""
        packed: dict[str, np.ndarray] = {}
        for e, weight in enumerate(weights):
            for name, array in self.family.pack(self.problem, self.config, weight).items():
                if name in SHARED:
                    assert e == 0 or np.array_equal(packed[name], array), f"experts have different arrays {name!r}"
                    packed[name] = array
                    continue
                if e == 0:
                    packed[name] = np.empty((len(weights), *array.shape), array.dtype)
                packed[name][e] = array
        return packed

    @property
    def scratch(self) -> list[tuple[tuple[Any, ...], str]]:
        """Extents behind the first and dtype of the outputs that are thrown away; the first extent is S."""
        integer = bool(self.problem.activation.bits)
        rows: list[tuple[tuple[Any, ...], str]] = [((self.problem.k,), "uint8" if integer else "float32")]
        return [*rows, ((), "float32")] if integer else rows

    def build(self, target: Target, name: str) -> Any:
        """The PrimFunc."""
        problem = self.problem
        own = [p for p in self.family.operands(problem, self.config) if p.name not in ("x", "x_scale", "out")]
        integer = bool(problem.activation.bits)
        tokens = [v.Param("x", ("T", problem.k), "uint8" if integer else "float32")]
        params = [
            *tokens,
            *([v.Param("x_scale", ("T",))] if integer else []),
            v.Param("order", ("S",), "int32"),
            v.Param("start", (self.experts + 1,), "int32"),
            *(p if p.name in SHARED else dataclasses.replace(p, shape=(self.experts, *p.shape)) for p in own),
            v.Param("out", ("S", problem.n), output=True),
            v.Param("rows", ("S", problem.k), tokens[0].dtype, output=True),
            *([v.Param("row_scale", ("S",), output=True)] if integer else []),
        ]
        with v.kernel(name, params) as (builder, names):
            self._copy(names, v.lanes_of(target) * (4 if integer else 1))
            with T.serial(self.experts) as e:
                begin = opaque(names["start"][e])
                m = opaque(names["start"][e + 1] - begin)
                with T.If(m > 0), T.Then():
                    self.family.emit(problem, self.config, self._operands(names, own, e, begin), m)
        return builder.get()

    def _copy(self, names: dict[str, Any], lanes: int) -> None:
        """Bring the rows in order."""
        x, rows = names["x"], names["rows"]

        def some(begin: Any, end: Any) -> None:
            with T.serial(begin, end) as i:
                token = v.let(T.truncdiv(names["order"][i], self.repeat))
                v.sweep(self.problem.k, lanes, lambda at, n, slot: v.store(rows, [i, at], v.load(x, [token, at], n), n))
                if "row_scale" in names:
                    v.store(names["row_scale"], [i], names["x_scale"][token], 1)

        v.parallel_ranges(names["S"], GRAIN, self.problem.threads, some)

    def _operands(self, names: dict[str, Any], own: list[v.Param], e: Any, begin: Any) -> dict[str, Any]:
        """What the family calls its parameters: those of expert ``e``, and its rows."""

        first = B.Bind(T.cast(begin, "int64"))

        def rows(name: str) -> Any:
            buffer = names[name]
            width = [int(d) for d in buffer.shape[1:]]
            return _from(buffer, (names["S"], *width), first * int(np.prod(width, dtype=np.int64)))

        found = {"x": rows("rows"), "out": names["out"], "out_row": rows("order"), "m": names["S"]}
        if "row_scale" in names:
            found["x_scale"] = rows("row_scale")
        for p in own:
            size = int(np.prod(p.shape, dtype=np.int64))
            found[p.name] = (
                names[p.name] if p.name in SHARED else _from(names[p.name], p.shape, T.cast(e, "int64") * size)
            )
        return found


def _from(buffer: Any, shape: tuple[Any, ...], offset: Any) -> Any:
    """A view on ``buffer`` from an element on."""
    dtype = str(buffer.dtype)
    align = 1 if dtype == "uint8" else 4
    return B.decl_buffer(shape, dtype, data=buffer.data, elem_offset=offset, align=align)
