"""Moving nodes and sums over tokens in hardware."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes import Concat, Prepend, Select, TokenSum, Transpose
from qcompile.codegen.verilog import build
from qcompile.codegen.verilog.netlist import Channel, Memory, Netlist, Process, Unit, Wait


@build.input_lanes.register(Concat)
def _two(node: Concat) -> tuple[int, ...]:
    return (node.folding.pe,) * 2


@build.input_lanes.register(Prepend)
@build.input_lanes.register(Select)
@build.input_lanes.register(TokenSum)
def _one(node: Prepend | Select | TokenSum) -> tuple[int, ...]:
    return (node.folding.pe,)


@build.input_lanes.register
def _simd(node: Transpose) -> tuple[int, ...]:
    return (node.folding.simd,)


@build.elaborate.register
def _concat(node: Concat, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    a, b = node.inputs
    pe = node.folding.pe
    beats = a.channels // pe, b.channels // pe
    out = build.stream_channel(netlist, node.output, pe)
    parameters = dict(
        PE=pe,
        **build.type_parameters("A", a.type),
        A_BEATS=beats[0],
        **build.type_parameters("B", b.type),
        B_BEATS=beats[1],
        Y_BITS=node.output.type.bits,
    )
    from_a = np.arange(out.beats) % sum(beats) < beats[0]
    process = Process(out.beats, {0: from_a, 1: ~from_a}, {0: build.every(out.beats)})
    ports = {"a": inputs[0], "b": inputs[1]}
    netlist.add(Unit(node.name, "concat", parameters, ports, {"m": out}, (process,), node=node.name))
    return out


@build.elaborate.register
def _prepend(node: Prepend, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe = node.folding.pe
    first, rest = node.rows.size // pe, inputs[0].beats
    out = build.stream_channel(netlist, node.output, pe)
    parameters = dict(
        PE=pe, FIRST=first, REST=rest, **build.type_parameters("X", node.inputs[0].type), Y_BITS=node.output.type.bits
    )
    step = np.arange(out.beats)
    process = Process(len(step), {0: step >= first}, {0: build.every(len(step))}, looks={0: step == 0})
    memories = {"ROWS": Memory(f"{node.name}_rows", node.rows.reshape(first, pe), node.output.type.bits)}
    netlist.add(
        Unit(node.name, "prepend", parameters, {"s": inputs[0]}, {"m": out}, (process,), memories, node=node.name)
    )
    return out


@build.elaborate.register
def _select(node: Select, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, x = node.folding.pe, node.inputs[0]
    groups = x.channels // pe
    out = build.stream_channel(netlist, node.output, pe)
    parameters = dict(
        PE=pe,
        TOKENS=x.tokens,
        FIRST_TOKEN=node.tokens[0],
        LAST_TOKEN=node.tokens[1] - 1,
        GROUPS=groups,
        FIRST_GROUP=node.channels[0] // pe,
        LAST_GROUP=node.channels[1] // pe - 1,
        X_BITS=x.type.bits,
        Y_BITS=node.output.type.bits,
    )
    token, group = np.divmod(np.arange(inputs[0].beats), groups)
    wanted = (token >= node.tokens[0]) & (token < node.tokens[1])
    wanted &= (group >= node.channels[0] // pe) & (group < node.channels[1] // pe)
    process = Process(inputs[0].beats, {0: build.every(inputs[0].beats)}, {0: wanted})
    netlist.add(Unit(node.name, "select", parameters, {"s": inputs[0]}, {"m": out}, (process,), node=node.name))
    return out


@build.elaborate.register
def _transpose(node: Transpose, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    x = node.inputs[0]
    out = build.stream_channel(netlist, node.output, node.folding.pe)
    parameters = dict(
        TOKENS=x.tokens, CHANNELS=x.channels, SIMD=node.folding.simd, PE=node.folding.pe, BITS=x.type.bits
    )
    netlist.add(
        Unit(
            node.name,
            "transpose",
            parameters,
            {"s": inputs[0]},
            {"m": out},
            (
                # Two buffers: a frame is written when the one before the last has been read.
                Process(
                    inputs[0].beats,
                    {0: build.every(inputs[0].beats)},
                    {},
                    waits=(Wait(1, back(inputs[0].beats, out.beats)),),
                ),
                Process(
                    out.beats, {}, {0: build.every(out.beats)}, 2, waits=(Wait(0, np.full(out.beats, inputs[0].beats)),)
                ),
            ),
            node=node.name,
        )
    )
    return out


def back(steps: int, other: int) -> np.ndarray:
    """Counts for a `Wait` on the whole frame before the last, of a process with ``other`` steps."""
    return np.full(steps, -other)


@build.elaborate.register
def _token_sum(node: TokenSum, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, x = node.folding.pe, node.inputs[0]
    groups = x.channels // pe
    a_bits = build.signed_bits(node.accumulator)
    parameters, cycles = build.requantize_parameters(node.requantize, node.accumulator_bounds, node.output.type, a_bits)
    out = build.stream_channel(netlist, node.output, pe)
    steps = inputs[0].beats
    process = Process(steps, {0: build.every(steps)}, {0: np.arange(steps) >= steps - groups}, 1 + cycles + 1)
    values = dict(
        PE=pe,
        TOKENS=x.tokens,
        GROUPS=groups,
        **build.type_parameters("X", x.type),
        A_BITS=a_bits,
        **parameters,
        MULTIPLIER=int(build.scale_codes(node.requantize)[0]),
    )
    netlist.add(Unit(node.name, "token_sum", values, {"s": inputs[0]}, {"m": out}, (process,), node=node.name))
    return out
