"""The few words the row and attention kernels are written in: typed vectors, sweeps over a row, parallel rows.

Kernels here are built with TVM's IR builder instead of parsed TVMScript: a kernel is then an ordinary Python function,
and its variants are ordinary Python ``if``s. Every helper below emits statements into the builder frame that is open.

A row of ``width`` elements is swept in vectors of the target's natural length; the last ``width % lanes`` elements are
one shorter vector (LLVM legalises any length), so that no kernel has a scalar tail or reads past the end of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from qcompile.targets.target import Target

SCHEDULED = "qcompile.scheduled"
"""Attribute of a PrimFunc that is already written for the machine; automatic schedulers must leave it alone."""

UNROLL = 4
"""Vectors in flight per loop iteration: enough independent accumulators to hide the latency of an add."""


@dataclass(frozen=True)
class Param:
    """One buffer parameter of a PrimFunc. A string in ``shape`` is an extent that is known at run time."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    output: bool = False


def lanes_of(target: Target) -> int:
    """Float32 elements per vector register."""
    return 16 if target.has("avx512") else 8


def typed(dtype: str, lanes: int) -> str:
    """``float32`` and 8 -> ``float32x8``; a single lane is a scalar."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def splat(value: Any, lanes: int) -> Any:
    """Repeat a scalar expression in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def const(value: float, lanes: int, dtype: str = "float32") -> Any:
    """A constant of ``dtype`` in every lane."""
    return splat(getattr(T, dtype)(value), lanes)


def cast(value: Any, dtype: str, lanes: int) -> Any:
    """Convert every lane to ``dtype``."""
    return T.cast(value, typed(dtype, lanes))


def bits_of(value: Any, dtype: str, lanes: int) -> Any:
    """Read the bits of a value as another type of the same width."""
    return T.reinterpret(value, dtype=typed(dtype, lanes))


def let(value: Any) -> Any:
    """Evaluate once and give it a name.

    TVM's simplifier substitutes integer bindings back into their uses, which makes a chain of reductions grow
    exponentially and bounds made of minima slow to analyse. Integers are therefore kept as `held` does.
    """
    return held(value) if str(value.ty.dtype).startswith(("int", "uint")) else B.Bind(value)


def held(value: Any) -> Any:
    """Evaluate once and keep in a small buffer, which LLVM turns back into a register.

    For values whose bindings TVM's passes would substitute into all of their uses: integers, and conditions on floats.
    """
    dtype = value.ty.dtype
    home = B.alloc_buffer((dtype.lanes,), str(dtype).partition("x")[0])
    store(home, [0], value, dtype.lanes)
    return load(home, [0], dtype.lanes)


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, fused where that is one instruction."""
    return T.fma(a, b, c)


def add_exactly(a: Any, b: Any, lanes: int) -> Any:
    """``a + b`` rounded to float32. TVM's simplifier takes ``(a + b) - b`` for ``a``; it does not look into this one."""
    return T.fma(a, const(1, lanes), b)


def load(buffer: Any, index: Sequence[Any], lanes: int) -> Any:
    """``lanes`` consecutive elements from ``index`` on, along the last axis."""
    return buffer.vload(list(index), typed(buffer.dtype, lanes))


def store(buffer: Any, index: Sequence[Any], value: Any, lanes: int) -> None:
    """Write ``lanes`` consecutive elements from ``index`` on, along the last axis."""
    *outer, last = index
    B.buffer_store(buffer, value, [*outer, T.ramp(last, 1, lanes) if lanes > 1 else last])


def shuffle(value: Any, pattern: Sequence[int]) -> Any:
    """The lanes of ``value`` named by ``pattern``; one lane gives a scalar."""
    return T.Shuffle([value], list(pattern))


def transpose(rows: Sequence[Any], lanes: int) -> list[Any]:
    """The transpose of ``lanes`` vectors of ``lanes`` elements (a power of two), by interleaving halves."""
    rows = list(rows)
    half = lanes // 2
    low = [x for j in range(half) for x in (j, lanes + j)]
    high = [x + half for x in low]
    for _ in range(lanes.bit_length() - 1):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [let(T.Shuffle([a, b], pattern)) for a, b in pairs for pattern in (low, high)]
    return rows


def reduce_lanes(value: Any, lanes: int, combine: Callable[[Any, Any], Any], name: Callable[[Any], Any] = let) -> Any:
    """Combine all lanes into one scalar by halving; ``lanes`` need not be a power of two. ``name`` is `let` or `held`."""
    odd = None
    while lanes > 1:
        half = lanes // 2
        if lanes % 2:
            last = shuffle(value, [lanes - 1])
            odd = last if odd is None else combine(odd, last)
        value = name(combine(shuffle(value, range(half)), shuffle(value, range(half, 2 * half))))
        lanes = half
    return name(value if odd is None else combine(value, odd))


def sweep(width: int, lanes: int, body: Callable[[Any, int, int], None], unroll: int = UNROLL) -> None:
    """Emit ``body(start, lanes, slot)`` so that the calls cover ``[0, width)``; ``slot`` counts up to ``unroll``."""
    step = lanes * unroll
    blocks = width // step
    if blocks > 1:
        with T.serial(blocks) as block:
            for slot in range(unroll):
                body(block * step + slot * lanes, lanes, slot)
    start = blocks * step if blocks > 1 else 0
    slot = 0
    while start + lanes <= width:
        body(start, lanes, slot % unroll)
        start, slot = start + lanes, slot + 1
    if start < width:
        body(start, width - start, slot % unroll)


def sweep_reduce(
    width: int,
    lanes: int,
    term: Callable[[Any, int], Any],
    combine: Callable[[Any, Any], Any],
    unroll: int = UNROLL,
    dtype: str = "float32",
) -> Any:
    """Combine ``term(start, lanes)`` over a row into one scalar. ``combine`` must have 0 as its identity."""
    step = lanes * unroll
    blocks = width // step
    partial = []
    if blocks > 1:
        acc = B.alloc_buffer((step,), dtype)
        for slot in range(unroll):
            store(acc, [slot * lanes], const(0, lanes, dtype), lanes)
        with T.serial(blocks) as block:
            for slot in range(unroll):
                value = term(block * step + slot * lanes, lanes)
                store(acc, [slot * lanes], combine(load(acc, [slot * lanes], lanes), value), lanes)
        partial = [let(load(acc, [slot * lanes], lanes)) for slot in range(unroll)]
    start = blocks * step if blocks > 1 else 0
    while start + lanes <= width:
        partial.append(let(term(start, lanes)))
        start += lanes
    while len(partial) > 1:
        partial = [
            let(combine(*partial[i : i + 2])) if i + 1 < len(partial) else partial[i] for i in range(0, len(partial), 2)
        ]
    scalars = [reduce_lanes(partial[0], lanes, combine)] if partial else []
    if start < width:
        rest = width - start
        scalars.append(reduce_lanes(let(term(start, rest)), rest, combine))
    return scalars[0] if len(scalars) == 1 else let(combine(*scalars))


def add(a: Any, b: Any) -> Any:
    """The combiner of a sum."""
    return a + b


def parallel_ranges(extent: Any, grain: int, cores: int, body: Callable[[Any, Any], None]) -> None:
    """Emit ``body(begin, end)`` over ``[0, extent)``, in parallel pieces of ``grain``, or once if there is one piece.

    Waking the thread pool costs microseconds, so ``grain`` should stand for some ten thousand cycles of work.
    """
    zero = T.int64(0)
    if cores <= 1:
        body(zero, extent)
        return
    with T.If(extent <= grain):
        with T.Then():
            body(zero, extent)
        with T.Else():
            pieces = (extent + (grain - 1)) // grain
            with T.parallel(pieces) as piece:
                body(piece * grain, T.min(extent, (piece + 1) * grain))


def span(begin: Any, end: Any) -> Any:
    """A serial loop over ``[begin, end)`` with run-time bounds (a context manager giving the loop variable)."""
    return T.serial(begin, end)


@contextmanager
def kernel(name: str, params: Sequence[Param], **attrs: Any) -> Iterator[tuple[IRBuilder, dict[str, Any]]]:
    """Open a PrimFunc. Yields the builder (``.get()`` after the block) and its buffers and run-time extents by name.

    Arguments may have any alignment: the buffers promise no more than that of one element.
    """
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name(name)
        B.func_attr({"tirx.noalias": True, SCHEDULED: True, **attrs})
        names: dict[str, Any] = {}
        for param in params:
            shape = []
            for extent in param.shape:
                if isinstance(extent, str) and extent not in names:
                    names[extent] = IRBuilder.name(extent, B.int64())
                shape.append(names[extent] if isinstance(extent, str) else extent)
            align = {"uint8": 1, "int8": 1, "bool": 1, "int64": 8}.get(param.dtype, 4)
            names[param.name] = B.arg(param.name, B.buffer(tuple(shape), param.dtype, align=align))
        yield builder, names
