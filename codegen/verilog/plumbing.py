"""What joins the nodes: copies of a channel for several readers, and changes of the number of lanes."""

from __future__ import annotations

from math import gcd

import numpy as np

from qcompile.codegen.verilog.netlist import Channel, Netlist, Process, Unit


def adapt(netlist: Netlist, channel: Channel, lanes: int) -> Channel:
    """``channel`` with another number of lanes, through the greatest common divisor where neither divides the other."""
    middle = gcd(channel.lanes, lanes)
    if channel.lanes != middle:
        channel = _narrow(netlist, channel, middle)
    if channel.lanes != lanes:
        channel = _widen(netlist, channel, lanes)
    return channel


def _narrow(netlist: Netlist, channel: Channel, lanes: int) -> Channel:
    ratio = channel.lanes // lanes
    out = netlist.channel(f"{channel.name}_narrow", lanes, channel.type, channel.beats * ratio)
    steps = np.arange(out.beats)
    process = Process(len(steps), {0: steps % ratio == 0}, {0: np.ones(len(steps), bool)})
    parameters = dict(WIDTH=lanes * channel.type.bits, RATIO=ratio)
    netlist.add(Unit(f"{out.name}_unit", "narrow", parameters, {"s": channel}, {"m": out}, (process,)))
    return out


def _widen(netlist: Netlist, channel: Channel, lanes: int) -> Channel:
    ratio = lanes // channel.lanes
    out = netlist.channel(f"{channel.name}_wide", lanes, channel.type, channel.beats // ratio)
    steps = np.arange(channel.beats)
    process = Process(len(steps), {0: np.ones(len(steps), bool)}, {0: steps % ratio == ratio - 1})
    parameters = dict(WIDTH=channel.width, RATIO=ratio)
    netlist.add(Unit(f"{out.name}_unit", "widen", parameters, {"s": channel}, {"m": out}, (process,)))
    return out


def fork(netlist: Netlist, channel: Channel, copies: int) -> list[Channel]:
    """``copies`` channels with the same beats."""
    if copies == 1:
        return [channel]
    outs = [netlist.channel(f"{channel.name}_copy", channel.lanes, channel.type, channel.beats) for _ in range(2)]
    every = np.ones(channel.beats, bool)
    process = Process(channel.beats, {0: every}, {0: every, 1: every})
    ports = {"m0": outs[0], "m1": outs[1]}
    netlist.add(Unit(f"{outs[0].name}_fork", "fork2", dict(WIDTH=channel.width), {"s": channel}, ports, (process,)))
    return [outs[0], *fork(netlist, outs[1], copies - 1)]
