"""How much hardware every node gets: PE and SIMD for the fewest cycles within an area, or the least area within cycles.

One binary variable per node and folding, of which one is chosen; one per stream and pair of lane counts that need a converter:

    minimise    cycles T,  then  area A                     given A <= budget      (`fastest`)
    minimise    area A                                      given T <= cycles      (`smallest`)

    T >= interval of every chosen folding,   A = sum of their areas and of the converters between them

solved exactly as a mixed integer program (Huangfu and Hall, "Parallelizing the dual revised simplex method" (2018); HiGHS through
`scipy.optimize.milp`). Foldings that another one beats in cycles, area and by the same lanes are left out before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from qcompile.codegen.fixed.nodes import Folding, Node
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.verilog import area, build
from qcompile.codegen.verilog.netlist import Netlist
from qcompile.errors import TargetError
from qcompile.targets.fpga import DEFAULT, TARGETS, FpgaTarget

CONVERTER_LUTS = 2.5
"""Per bit of the wider side of a converter."""


@dataclass(frozen=True)
class Option:
    """One folding of one node."""

    folding: Folding
    interval: int
    luts: float
    products: int
    inputs: tuple[int, ...]
    output: int


def options(node: Node, target: FpgaTarget = TARGETS[DEFAULT]) -> list[Option]:
    """The foldings of ``node`` that are worth a choice."""
    found = []
    for pe in node.pe_choices:
        for simd in node.simd_choices:
            folded = node.folded(pe, simd)
            luts = node_area(folded, target).luts
            folds = node.kind in ("matvec", "matmul", "depthwise") and getattr(node, "products", "") != "constant"
            products = pe * simd if folds else 0
            lanes = build.input_lanes(folded)
            found.append(Option(folded.folding, folded.interval, luts, products, lanes, build.output_lanes(folded)))
    return [o for o in found if not any(_beats(p, o) for p in found)]


def _beats(a: Option, b: Option) -> bool:
    """Whether ``a`` is at least as good as ``b`` at the same lanes, and better in something."""
    if a.inputs != b.inputs or a.output != b.output:
        return False
    return (a.interval, a.luts, a.products) != (b.interval, b.luts, b.products) and (
        a.interval <= b.interval and a.luts <= b.luts and a.products <= b.products
    )


def node_area(node: Node, target: FpgaTarget = TARGETS[DEFAULT]) -> area.Area:
    """The estimate for one node alone."""
    netlist = Netlist("probe", target)
    channels = [
        netlist.input(f"in{i}", lanes, s.type, s.tokens * s.channels // lanes)
        for i, (s, lanes) in enumerate(zip(node.inputs, build.input_lanes(node)))
    ]
    build.elaborate(node, netlist, channels)
    return sum((area.estimate(u, target) for u in netlist.units), start=area.Area())


def search(
    program: Program,
    target: FpgaTarget = TARGETS[DEFAULT],
    *,
    pe_budget: int | None = None,
    luts: float | None = None,
    cycles: int | None = None,
) -> Program:
    """Choose foldings.

    Args:
        program: any folding.
        target: the device whose look-up tables are counted.
        pe_budget: products formed per cycle by all nodes together, at most.
        luts: look-up tables, at most.
        cycles: per frame, at most; then the area is minimised. Otherwise the cycles are.

    Raises:
        TargetError: nothing satisfies the limits; says how near one can come, and which nodes are in the way.
    """
    problem = _Problem(program, target)
    limits = {"products": pe_budget, "luts": luts}
    if cycles is not None:
        chosen = problem.solve("luts", limits, cycles)
        if chosen is None:
            fastest = problem.fastest(limits)
            raise TargetError(
                f"{cycles} cycles per frame are not possible"
                + (f"; the fewest are {fastest}" if fastest is not None else " within these limits")
                + problem.too_slow(cycles)
            )
        return program.folded(chosen)
    fastest = problem.fastest(limits)
    if fastest is None:
        raise TargetError(f"no folding stays within {_describe(limits)}; the least is {_describe(problem.least())}")
    chosen = problem.solve("luts", limits, fastest)
    assert chosen is not None
    return program.folded(chosen)


def _describe(limits: Mapping[str, float | None]) -> str:
    words = {"products": "products per cycle", "luts": "look-up tables"}
    return " and ".join(f"{value:.0f} {words[name]}" for name, value in limits.items() if value is not None)


class _Problem:
    def __init__(self, program: Program, target: FpgaTarget) -> None:
        self.nodes = list(program.nodes)
        self.options = {n.name: options(n, target) for n in self.nodes}
        self.offset: dict[str, int] = {}
        count = 0
        for node in self.nodes:
            self.offset[node.name] = count
            count += len(self.options[node.name])
        self.choices = count
        # Converters: (source, reader, port) and the lanes at both ends, if they differ.
        self.converters: list[tuple[str, str, int, int, int, float]] = []
        by_name = {n.name: n for n in self.nodes}
        for node in self.nodes:
            for port, stream in enumerate(node.inputs):
                if stream.name not in by_name:
                    continue  # the outside delivers what is asked for
                for p in sorted({o.output for o in self.options[stream.name]}):
                    for q in sorted({o.inputs[port] for o in self.options[node.name]}):
                        if p != q:
                            cost = CONVERTER_LUTS * stream.type.bits * max(p, q) + 15
                            self.converters.append((stream.name, node.name, port, p, q, cost))
        self.size = count + len(self.converters)

    def least(self) -> dict[str, float]:
        """What the smallest foldings need."""
        return {
            name: sum(min(getattr(o, name) for o in choices) for choices in self.options.values())
            for name in ("products", "luts")
        }

    def too_slow(self, cycles: int) -> str:
        """Words on the nodes that take more than ``cycles`` however they are folded; empty if there are none."""
        least = {name: min(o.interval for o in choices) for name, choices in self.options.items()}
        slow = [f"'{name}' takes {interval}" for name, interval in least.items() if interval > cycles]
        return f" ({', '.join(slow)} in any folding)" if slow else ""

    def fastest(self, limits: Mapping[str, float | None]) -> int | None:
        """The fewest cycles within the limits: bisection over the intervals there are."""
        intervals = sorted({o.interval for choices in self.options.values() for o in choices})
        low, high = 0, len(intervals) - 1
        if self.solve("products", limits, intervals[high]) is None:
            return None
        while low < high:
            middle = (low + high) // 2
            if self.solve("products", limits, intervals[middle]) is None:
                low = middle + 1
            else:
                high = middle
        return intervals[low]

    def solve(self, goal: str, limits: Mapping[str, float | None], cycles: int) -> dict[str, Folding] | None:
        """The choice with the least ``goal`` within limits and cycles; None if there is none."""
        cost = {name: np.zeros(self.size) for name in ("products", "luts")}
        upper = np.ones(self.size)
        for node in self.nodes:
            for i, option in enumerate(self.options[node.name]):
                column = self.offset[node.name] + i
                cost["products"][column], cost["luts"][column] = option.products, option.luts
                if option.interval > cycles:
                    upper[column] = 0
        for i, converter in enumerate(self.converters):
            cost["luts"][self.choices + i] = converter[-1]
        rows = lil_matrix((len(self.nodes) + len(self.converters) + len(limits), self.size))
        low, high = np.full(rows.shape[0], -np.inf), np.full(rows.shape[0], np.inf)
        for r, node in enumerate(self.nodes):
            start = self.offset[node.name]
            rows[r, start : start + len(self.options[node.name])] = 1
            low[r] = high[r] = 1
        for i, (source, reader, port, p, q, _) in enumerate(self.converters):
            r = len(self.nodes) + i
            for name, matches in (
                (source, lambda o, p=p: o.output == p),
                (reader, lambda o, q=q, port=port: o.inputs[port] == q),
            ):
                for j, option in enumerate(self.options[name]):
                    if matches(option):
                        rows[r, self.offset[name] + j] = 1
            rows[r, self.choices + i] = -1
            high[r] = 1
        for i, (name, limit) in enumerate(limits.items()):
            r = len(self.nodes) + len(self.converters) + i
            rows[r, :] = cost[name]
            high[r] = np.inf if limit is None else limit
        integrality = np.concatenate([np.ones(self.choices), np.zeros(len(self.converters))])
        # A little of the area in every goal, so that ties are broken the same way.
        result = milp(
            cost[goal] + 1e-6 * cost["luts"],
            constraints=LinearConstraint(rows.tocsr(), low, high),
            bounds=Bounds(0, upper),
            integrality=integrality,
            options={"mip_rel_gap": 1e-4, "time_limit": 20},
        )
        if result.x is None:
            return None
        chosen = {}
        for node in self.nodes:
            start, choices = self.offset[node.name], self.options[node.name]
            chosen[node.name] = choices[int(np.argmax(result.x[start : start + len(choices)]))].folding
        return chosen
