"""Elementwise nodes in hardware."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes import Add, Affine, Lookup, Multiply, Node
from qcompile.codegen.verilog import build
from qcompile.codegen.verilog.netlist import Channel, Memory, Netlist, Process, Unit
from qcompile.formats.fixed import IntType


@build.input_lanes.register(Affine)
@build.input_lanes.register(Lookup)
def _one(node: Affine | Lookup) -> tuple[int, ...]:
    return (node.folding.pe,)


@build.input_lanes.register(Add)
@build.input_lanes.register(Multiply)
def _two(node: Add | Multiply) -> tuple[int, ...]:
    return (node.folding.pe,) * 2


def _put(
    node: Node,
    netlist: Netlist,
    module: str,
    parameters: dict[str, int],
    ports: dict[str, Channel],
    latency: int,
    memories: dict[str, Memory] | None = None,
) -> Channel:
    """A unit that takes a beat of every input and makes one at every step."""
    out = build.stream_channel(netlist, node.output, node.folding.pe)
    process = Process(
        out.beats, {i: build.every(out.beats) for i in range(len(ports))}, {0: build.every(out.beats)}, latency
    )
    netlist.add(Unit(node.name, module, parameters, ports, {"m": out}, (process,), memories or {}, node=node.name))
    return out


@build.elaborate.register
def _affine(node: Affine, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe = node.folding.pe
    rounding, cycles = build.rounding_parameters(node.rounding, node.total_bounds, node.output.type)
    scale, add = int(not node.step.is_shift), int(node.offset.any())
    memories = {}
    # The product alone may be wider than the sum.
    ends = np.stack([v * node.step.multiplier for v in (node.inputs[0].low, node.inputs[0].high)])
    rounding["Q_BITS"] = max(rounding["Q_BITS"], *(build.signed_bits(_covering(e)) for e in (ends, node.offset)))
    if scale:
        memories["MULTIPLIERS"] = Memory(
            f"{node.name}_multipliers",
            node.constants["multiplier"].reshape(-1, pe),
            build.signed_bits(node.step.multiplier_type),
        )
    if add:
        memories["OFFSET"] = Memory(f"{node.name}_offset", node.offset.reshape(-1, pe), rounding["Q_BITS"])
    m_bits = build.signed_bits(node.step.multiplier_type)
    multiplied = build.multiply_cycles(node.inputs[0].type.bits + 1, m_bits)
    parameters = dict(
        PE=pe,
        **build.type_parameters("X", node.inputs[0].type),
        SCALE=scale,
        MULTIPLIED=multiplied,
        SCALES=node.inputs[0].channels // pe,
        M_BITS=m_bits,
        ADD=add,
        OFFSETS=node.offset.size // pe,
        **rounding,
    )
    latency = 1 + scale * multiplied + add + cycles + 1
    return _put(node, netlist, "affine", parameters, {"s": inputs[0]}, latency, memories)


@build.elaborate.register
def _lookup(node: Lookup, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    x = node.inputs[0].type
    patterns = np.arange(1 << x.bits)
    values = np.where(patterns > x.high, patterns - (1 << x.bits), patterns)  # of the bit patterns, in order
    table = np.clip(node.table[values - x.low], node.output.type.low, node.output.type.high)
    memories = {"TABLE": Memory(f"{node.name}_table", table[:, None], node.output.type.bits)}
    parameters = dict(PE=node.folding.pe, X_BITS=x.bits, Y_BITS=node.output.type.bits)
    return _put(node, netlist, "lookup", parameters, {"s": inputs[0]}, 2, memories)


@build.elaborate.register
def _add(node: Add, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    rounding, cycles = build.rounding_parameters(node.rounding, node.total_bounds, node.output.type)
    ends = [np.stack([s.low * m, s.high * m]) for s, m in zip(node.inputs, node.multipliers)]
    rounding["Q_BITS"] = max(rounding["Q_BITS"], *(build.signed_bits(_covering(e)) for e in ends))
    scales = _scales(*node.multipliers)
    widest = max(x.type.bits for x in node.inputs) + 1
    first = 1 + (build.multiply_cycles(widest, scales["M_BITS"]) if scales["SCALING"] else 1) + 1
    parameters = dict(
        PE=node.folding.pe,
        PRODUCT=0,
        **build.type_parameters("A", node.inputs[0].type),
        **build.type_parameters("B", node.inputs[1].type),
        A_SCALE=node.multipliers[0],
        B_SCALE=node.multipliers[1],
        **scales,
        FIRST=first,
        **rounding,
    )
    return _put(node, netlist, "combine", parameters, {"a": inputs[0], "b": inputs[1]}, first + cycles + 1)


@build.elaborate.register
def _multiply(node: Multiply, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    bounds = node.step.multiplier[0] * node.total_bounds[0], node.step.multiplier[0] * node.total_bounds[1]
    ordered = np.minimum(*bounds), np.maximum(*bounds)
    shift = type(node.step)(np.ones(1, np.int64), node.step.shift, node.step.low, node.step.high)
    rounding, cycles = build.rounding_parameters(shift, ordered, node.output.type)
    scales = _scales(int(node.step.multiplier[0]))
    a, b = (x.type.bits for x in node.inputs)
    scaled = build.multiply_cycles(a + b + 2, scales["M_BITS"]) if scales["SCALING"] else 1
    first = 1 + build.multiply_cycles(a + 1, b + 1) + scaled
    parameters = dict(
        PE=node.folding.pe,
        PRODUCT=1,
        **build.type_parameters("A", node.inputs[0].type),
        **build.type_parameters("B", node.inputs[1].type),
        A_SCALE=int(node.step.multiplier[0]),
        **scales,
        FIRST=first,
        **rounding,
    )
    return _put(node, netlist, "combine", parameters, {"a": inputs[0], "b": inputs[1]}, first + cycles + 1)


def _scales(*scales: int) -> dict[str, int]:
    """Parameters of ``rtl/scale_by.v`` for constants; powers of two need no multiplier."""
    powers = all(s > 0 and s & (s - 1) == 0 for s in scales)
    return dict(SCALING=int(not powers), M_BITS=build.signed_bits(IntType.covering(min(scales), max(scales))))


def _covering(values: np.ndarray) -> IntType:
    return IntType.covering(int(values.min()), int(values.max()))
