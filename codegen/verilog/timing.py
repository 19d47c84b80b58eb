"""When everything happens: the steps of every process of a netlist, in cycles, without simulating a single bit.

The step ``i`` of a process begins at

    t_i = max(t_{i-1} + 1,  time its input beat is offered,  1 + time its FIFO entry became free,  its waits)

which is the evaluation of a timed marked graph (Baccelli et al., "Synchronization and Linearity" (1992), section 2.5). It is exact
for a source that always offers and a sink that always accepts, and finds deadlocks: a step that waits for one that waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.codegen.verilog.netlist import BLOCK_DEPTH, Netlist, Process, Unit
from qcompile.errors import TargetError

UNBOUNDED = 1 << 40

MOST_FRAMES = 100
"""Evaluated to find FIFO depths, at most."""


@dataclass
class Timeline:
    """Cycles of one evaluation.

    Attributes:
        frames: how many were fed.
        offered, taken: by channel name, the cycle every beat is first offered, and the one it moves in.
    """

    frames: int
    offered: dict[str, list[int]] = field(default_factory=dict)
    taken: dict[str, list[int]] = field(default_factory=dict)

    def cycles(self, netlist: Netlist) -> int:
        """From the cycle the first beat enters to the one the last beat leaves, both counted."""
        first = min(self.taken[c.name][0] for c in netlist.inputs)
        return max(self.taken[c.name][-1] for c in netlist.outputs) - first + 1

    def interval(self, netlist: Netlist) -> int:
        """The most cycles between the last beats of two frames, in the second half of the frames."""
        found = 0
        for c in netlist.outputs:
            ends = np.array(self.taken[c.name][c.beats - 1 :: c.beats])
            gaps = np.diff(ends)[-max(1, self.frames // 2) :] if self.frames > 1 else ends
            found = max(found, int(gaps.max()))  # a FIFO that is too short may delay every other frame only
        return found

    def latency(self, netlist: Netlist) -> int:
        """From the cycle the first beat enters to the one the first frame is complete, both counted."""
        first = min(self.taken[c.name][0] for c in netlist.inputs)
        return max(self.taken[c.name][c.beats - 1] for c in netlist.outputs) - first + 1

    def occupancy(self, channel: str, latency: int) -> int:
        """Entries of the FIFO behind ``channel`` with which nothing would have moved later.

        Args:
            channel: its name.
            latency: of the process that writes it: an entry is reserved that long before a beat is offered.
        """
        reserved = np.array(self.offered[channel]) - latency
        free = np.array(self.taken[channel]) + 1  # an entry can be reserved again from this cycle on
        return int((np.arange(1, len(reserved) + 1) - np.searchsorted(free, reserved, side="right")).max())


class _Running:
    """One process under way."""

    def __init__(self, unit: Unit, process: Process, frames: int, line: Timeline) -> None:
        self.unit, self.process = unit, process
        self.total = process.steps * frames
        self.begun: list[int] = []
        self.peers: list[_Running] = []
        inputs, outputs = list(unit.inputs.values()), list(unit.outputs.items())
        self.takes, self.looks = (
            [(flags.tolist(), line.offered[inputs[i].name], line.taken[inputs[i].name]) for i, flags in which.items()]
            for which in (process.takes, process.looks)
        )
        self.makes = [
            (
                flags.tolist(),
                line.offered[outputs[o][1].name],
                line.taken[outputs[o][1].name],
                unit.depths[outputs[o][0]],
                process.latency + unit.late(outputs[o][0]),
            )
            for o, flags in process.makes.items()
        ]

    def advance(self, sinks: set[int]) -> bool:
        """Begin as many steps as the known times allow; whether any did."""
        process, begun = self.process, self.begun
        start = len(begun)
        steps = process.steps
        waits = [
            (self.peers[w.process].begun, w.count.tolist(), w.delay, self.peers[w.process].process.steps)
            for w in process.waits
        ]
        now = begun[-1] + 1 if begun else 0
        for i in range(start, self.total):
            frame, step = divmod(i, steps)
            blocked = False
            for flags, offered, taken in self.takes + self.looks:
                if flags[step]:
                    if len(taken) >= len(offered):
                        blocked = True
                        break
                    now = max(now, offered[len(taken)])
            if blocked:
                break
            for flags, offered, taken, depth, _ in self.makes:
                if flags[step] and len(offered) >= depth:
                    if len(taken) <= len(offered) - depth:
                        blocked = True
                        break
                    now = max(now, taken[len(offered) - depth] + 1)
            if blocked:
                break
            for other, count, delay, period in waits:
                needed = frame * period + count[step] - 1
                if needed >= 0:
                    if len(other) <= needed:
                        blocked = True
                        break
                    now = max(now, other[needed] + delay)
            if blocked:
                break
            begun.append(now)
            for flags, _, taken in self.takes:
                if flags[step]:
                    taken.append(now)
            for flags, offered, taken, _, latency in self.makes:
                if flags[step]:
                    offered.append(now + latency)
                    if id(offered) in sinks:
                        taken.append(now + latency)
            now += 1
        return len(begun) > start


def evaluate(netlist: Netlist, frames: int = 3, period: int = 0) -> Timeline:
    """Begin every step of ``frames`` frames as early as it can.

    Args:
        netlist: any.
        frames: how many.
        period: cycles between frames, over which the source spreads its beats; 0 for a source that always offers.

    Raises:
        TargetError: the netlist deadlocks; names the units that wait.
    """
    line = Timeline(frames)
    for channel in netlist.inputs:
        offers = np.arange(channel.beats * frames) * period // channel.beats
        line.offered[channel.name], line.taken[channel.name] = offers.tolist(), []
    for unit in netlist.units:
        for channel in unit.outputs.values():
            line.offered[channel.name], line.taken[channel.name] = [], []
    sinks = {id(line.offered[c.name]) for c in netlist.outputs}
    running = []
    for unit in netlist.units:
        group = [_Running(unit, process, frames, line) for process in unit.processes]
        for one in group:
            one.peers = group
        running += group
    while any([one.advance(sinks) for one in running]):
        pass
    if waiting := [one.unit.name for one in running if len(one.begun) < one.total]:
        raise TargetError(f"the hardware deadlocks: {', '.join(dict.fromkeys(waiting))} wait for each other")
    return line


def size_fifos(netlist: Netlist, frames: int = 4, trials: int = 80) -> Timeline:
    """Give every FIFO few entries, and enough that a frame leaves as often as the slowest unit allows.

    With endless FIFOs, and a source that offers frames no faster than that, what the FIFOs hold is a depth with which nothing
    moves later: a unit that takes a frame in one burst needs it ready, and where a path forks and meets again, the short one
    holds what the long one is working on. From there the largest FIFOs are made smaller, as far as that costs no cycle per frame.

    Args:
        netlist: its depths are replaced.
        frames: evaluated, at least; the second half is in the steady state, so where frames follow one another faster than
            they pass through, more are.
        trials: evaluations spent on making FIFOs smaller.
    """
    period = max(u.interval for u in netlist.units)
    passage = sum(u.latency for u in netlist.units)
    frames = max(frames, min(3 + passage // period, MOST_FRAMES))
    fifos = [(u, prefix) for u in netlist.units for prefix in u.depths]
    for unit in netlist.units:
        unit.deep = set()
    while True:
        _size(netlist, fifos, frames, period, trials)
        found = [(u, p) for u, p in fifos if u.depths[p] > BLOCK_DEPTH and p not in u.deep]
        if not found:
            return _steady(netlist, frames, period)
        for unit, prefix in found:  # offers later, so others may have to hold more
            unit.deep.add(prefix)


def _steady(netlist: Netlist, frames: int, period: int) -> Timeline:
    """Enough frames for the FIFOs to fill, after which one leaves every ``period`` cycles."""
    while (line := evaluate(netlist, frames)).interval(netlist) > period and 2 * frames <= MOST_FRAMES:
        frames *= 2
    return line


def _size(netlist: Netlist, fifos: list[tuple[Unit, str]], frames: int, period: int, trials: int) -> None:
    """`size_fifos` where it is known which FIFOs are in block memory."""
    for unit, prefix in fifos:
        unit.depths[prefix] = UNBOUNDED
    line = evaluate(netlist, frames, period)
    for unit, prefix in fifos:
        latency = max(p.latency for p in unit.processes if p.makes) + unit.late(prefix)
        held = line.occupancy(unit.outputs[prefix].name, latency)
        unit.depths[prefix] = max(unit.least_depth(prefix), held)
    for unit, prefix in sorted(fifos, key=lambda f: -f[0].depths[f[1]] * f[0].outputs[f[1]].width):
        enough, least = unit.depths[prefix], unit.least_depth(prefix)
        for depth in sorted({least, enough // 4, enough // 2}):
            if not least <= depth < enough or trials <= 0:
                continue
            trials -= 1
            unit.depths[prefix] = depth
            if _keeps(netlist, frames, period):
                break
            unit.depths[prefix] = enough


def _keeps(netlist: Netlist, frames: int, period: int) -> bool:
    try:
        return evaluate(netlist, frames).interval(netlist) <= period
    except TargetError:
        return False
