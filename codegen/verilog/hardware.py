"""From a program to its netlist."""

from __future__ import annotations

from qcompile.codegen.fixed.program import Program
from qcompile.codegen.verilog import attention, build, elementwise, matvec, movement, plumbing, timing, window
from qcompile.codegen.verilog.netlist import Channel, Netlist
from qcompile.targets.fpga import DEFAULT, TARGETS, FpgaTarget

__all__ = ["make_netlist"]

_REGISTERED = (attention, elementwise, matvec, movement, window)


def make_netlist(program: Program, target: FpgaTarget = TARGETS[DEFAULT], *, input_lanes: int | None = None) -> Netlist:
    """The hardware of a program, with FIFO depths.

    Args:
        program: folded.
        target: the device.
        input_lanes: elements per beat of the inputs; by default what their first reader takes.
    """
    netlist = Netlist(program.name, target)
    waiting: dict[str, list[Channel]] = {}
    for stream in program.inputs:
        readers = [n for n in program.nodes for s in n.inputs if s.name == stream.name]
        first = readers[0] if readers else None
        lanes = input_lanes or 1
        if first is not None and not input_lanes:  # it may read the stream in another shape
            lanes = build.input_lanes(first)[[s.name for s in first.inputs].index(stream.name)]
        channel = netlist.input(stream.name, lanes, stream.type, stream.tokens * stream.channels // lanes)
        waiting[stream.name] = plumbing.fork(netlist, channel, program.readers(stream.name))
    for node in program.nodes:
        lanes_of = build.input_lanes(node)
        inputs = [plumbing.adapt(netlist, waiting[s.name].pop(0), n) for s, n in zip(node.inputs, lanes_of)]
        out = build.elaborate(node, netlist, inputs)
        waiting[node.name] = plumbing.fork(netlist, out, program.readers(node.name))
    for name in program.outputs:
        netlist.output(waiting[name].pop(0))
    timing.size_fifos(netlist)
    return netlist
