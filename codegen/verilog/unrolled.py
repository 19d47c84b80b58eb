"""`MatVec` unrolled: a token per cycle through a pipeline of adders made for one matrix, bias and requantization included.

A layer is ``clamp(round((x @ W + b) * m / 2^s))``. Where the ``m`` of a column is a power of two it is a part of ``W``, else the sum
is multiplied by the signed digits of ``m``. Rounding half to even equals adding ``2^(s-1)`` and dropping bits if no tie can occur,
which is so where all weights of the column are even and the remainder of the bias is not that of a tie; then the
constant joins the bias.

Layers that follow one another without a second reader become one pipeline, with one FIFO at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompile.codegen.fixed.nodes.matvec import MatVec
from qcompile.codegen.verilog import build, ternary
from qcompile.codegen.verilog.adder_graph import AdderGraph, Term, constant_matrix, signed_digits
from qcompile.codegen.verilog.dataflow import Dataflow
from qcompile.codegen.verilog.netlist import Channel, Netlist, Process, Unit
from qcompile.codegen.verilog.top import render

LEVELS_PER_STAGE = 1
"""Levels of adders between two registers."""


@dataclass
class UnrolledUnit(Unit):
    """A unit whose module is written for it.

    Attributes:
        flow: its arithmetic.
        every: levels between registers.
    """

    flow: Dataflow = field(default_factory=Dataflow)
    every: int = LEVELS_PER_STAGE

    @property
    def source(self) -> str:
        """The Verilog of its module."""
        (taken,), (made,) = self.inputs.values(), self.outputs.values()
        return render(
            "unrolled.v.j2",
            module=self.module,
            x_bits=taken.type.bits,
            y_bits=made.type.bits,
            x_lanes=taken.lanes,
            y_lanes=made.lanes,
            latency=self.flow.stages(self.every),
            **self.flow.verilog(self.every, made.type.bits),
        )

    def area(self) -> tuple[float, float]:
        """Look-up tables and flip-flops without the FIFO."""
        luts, flipflops = self.flow.area(self.every)
        return luts, flipflops + self.flow.stages(self.every)


def elaborate(node: MatVec, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    """Add the pipeline of ``node``, or append it to the one in front of it."""
    out = build.stream_channel(netlist, node.output, node.n)
    before = netlist.units[-1] if netlist.units else None
    if isinstance(before, UnrolledUnit) and list(before.outputs.values()) == [inputs[0]]:
        netlist.units.pop()
        flow, source = before.flow, next(iter(before.inputs.values()))
    else:
        flow, source = Dataflow(), inputs[0]
        x = node.inputs[0]
        flow.outputs = [flow.input(int(low), int(high)) for low, high in zip(x.low, x.high)]
    layer(flow, node)
    if netlist.target.addends == 3:
        ternary.fuse(flow)
    every = np.ones(source.beats, bool)
    process = Process(source.beats, {0: every}, {0: every}, flow.stages(LEVELS_PER_STAGE) + 1)
    netlist.add(
        UnrolledUnit(
            node.name, f"unrolled_{node.name}", {}, {"s": source}, {"m": out}, (process,), node=node.name, flow=flow
        )
    )
    return out


def layer(flow: Dataflow, node: MatVec) -> None:
    """Append a layer to ``flow``, between its outputs and new ones."""
    x, step = node.inputs[0], node.requantize
    multiplier = node.constants["multiplier"]
    shift = 0 if step is None else step.shift
    single = np.array([len(list(signed_digits(int(m)))) <= 1 for m in multiplier])
    inside = np.where(single, multiplier, 1)  # the part of the multiplier that the matrix takes
    weight, bias = node.weight * inside, np.where(single, node.bias * inside, 0)
    places = np.zeros(node.n, np.int64)  # lowest bits of a column that cannot matter any more
    exact = np.zeros(node.n, bool)
    for n in np.flatnonzero(single):
        ties, bias[n], places[n] = _without_ties(weight[:, n], int(bias[n]), shift)
        exact[n] = not ties
    graph = constant_matrix(weight >> places, bias, x.low, x.high)
    for n in np.flatnonzero(~single):
        exact[n] = not _multiply(graph, int(n), int(multiplier[n]), int(node.bias[n]) * int(multiplier[n]), shift)
    words = []
    low, high = (-(1 << 62), 1 << 62) if step is None else (step.low, step.high)
    for column, term in enumerate(flow.sums(graph, flow.outputs)):
        rounded = flow.shifted(term, shift - int(places[column]), exact=bool(exact[column]))
        words.append(flow.clamped(rounded, low, high))
    flow.outputs = words


def _without_ties(weight: np.ndarray, bias: int, shift: int) -> tuple[bool, int, int]:
    """Whether ``x @ weight + bias`` can be a tie, the bias with the rounding in it if not, and bits to leave out of both."""
    if not shift:
        return False, bias, 0
    common = int(np.bitwise_or.reduce(weight)) if weight.any() else 0
    even = min((common & -common).bit_length() - 1, shift) if common else shift
    half = 1 << (shift - 1)
    if even == 0 or (bias - half) % (1 << even) == 0:
        return True, bias, 0
    return False, (bias + half) >> even, even


def _multiply(graph: AdderGraph, n: int, factor: int, bias: int, shift: int) -> bool:
    """Multiply output ``n`` by a constant and add ``bias``; whether the result can be a tie."""
    term = graph.outputs[n]
    row, _ = (np.zeros(1, np.int64), 0) if term is None else graph.row(term)
    ties, offset, _ = _without_ties(row * factor, bias, shift)
    if not ties and shift:
        offset = bias + (1 << (shift - 1))
    digits = [] if term is None else [Term(term.value, term.shift + p, term.sign * d) for p, d in signed_digits(factor)]
    terms = [*digits, *([graph.constant(offset)] if offset else [])]
    levels = sum(1 << graph.values[t.value].level for t in terms)
    graph.outputs[n] = graph.total(terms, max(levels - 1, 0).bit_length())
    return ties
