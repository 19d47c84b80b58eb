"""The hardware of a program: instances of the units in ``rtl/``, joined by channels.

A channel carries the elements of a stream in order, ``lanes`` of them per beat, by a valid/ready handshake. Every unit ends in a
FIFO with credits (``rtl/credit_fifo.v``), so no combinational path leads from one unit to the next, and pipelines
never stop.

A unit's timing is that of its `Process`es: each works through a fixed list of steps per frame, one step per cycle. A step
that takes a beat waits until one is offered, a step that makes one waits until the FIFO has room for it; the beat is offered
``latency`` cycles later. `qcompile.codegen.verilog.timing` turns that into cycles and FIFO depths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.errors import TargetError
from qcompile.formats.fixed import IntType
from qcompile.targets.fpga import DEFAULT, TARGETS, FpgaTarget


@dataclass(frozen=True)
class Channel:
    """A valid/ready wire bundle.

    Attributes:
        name: prefix of its wires.
        lanes: elements per beat, the first in the lowest bits.
        type: of an element.
        beats: per frame.
    """

    name: str
    lanes: int
    type: IntType
    beats: int

    @property
    def width(self) -> int:
        """Bits of a beat."""
        return self.lanes * self.type.bits


@dataclass(frozen=True)
class Wait:
    """Step ``i`` of a frame waits for ``process`` of the same unit to have begun ``count[i]`` steps of this frame.

    Attributes:
        process: index of the other process.
        count: int64 per step; 0 and less reach back into frames before, `NEVER` does not wait.
        delay: cycles from that step to the earliest one that may follow.
    """

    process: int
    count: np.ndarray
    delay: int = 1


NEVER = -(1 << 40)

BLOCK_DEPTH = 64
"""Entries above which a FIFO is in block memory (``rtl/deep_fifo.v``)."""

BLOCK_CYCLES = 2
"""Cycles by which it offers a beat later."""


@dataclass(frozen=True)
class Process:
    """A fixed sequence of steps per frame.

    Attributes:
        steps: how many.
        takes: for each input, whether a step takes a beat, bool ``(steps,)``.
        makes: for each output, whether a step makes one.
        latency: cycles from a step to the beat it makes.
        waits: on other processes of the unit.
        looks: for some inputs, whether a step waits until a beat is offered and leaves it there.
    """

    steps: int
    takes: dict[int, np.ndarray]
    makes: dict[int, np.ndarray]
    latency: int = 1
    waits: tuple[Wait, ...] = ()
    looks: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Initial contents of a memory.

    Attributes:
        name: of the file, without suffix.
        words: int64 ``(depth, elements)``; the first element in the lowest bits.
        bits: of an element, two's complement.
    """

    name: str
    words: np.ndarray
    bits: int

    @property
    def file(self) -> str:
        """Name of the file that ``$readmemh`` reads."""
        return f"{self.name}.hex"

    def hex(self) -> str:
        """The file's content."""
        return "\n".join(f"{pack_word(word, self.bits):x}" for word in self.words) + "\n"


def pack_word(elements: np.ndarray, bits: int) -> int:
    """One word of elements, the first in the lowest bits."""
    mask, word = (1 << bits) - 1, 0
    for element in reversed(elements.tolist()):
        word = (word << bits) | (int(element) & mask)
    return word


@dataclass
class Unit:
    """One instance.

    Attributes:
        name: of the instance.
        module: the Verilog module.
        parameters: of the module; memories add theirs.
        inputs, outputs: channels by port prefix (``s``, ``m``, ``a`` ...).
        processes: its timing.
        memories: by parameter name.
        depths: entries of the FIFO behind each output, by port prefix.
        deep: the outputs whose FIFOs are in block memory.
        literals: parameters that are not plain integers, as Verilog.
        node: the program's node it belongs to.
    """

    name: str
    module: str
    parameters: dict[str, int]
    inputs: dict[str, Channel]
    outputs: dict[str, Channel]
    processes: tuple[Process, ...]
    memories: dict[str, Memory] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    literals: dict[str, str] = field(default_factory=dict)
    node: str = ""
    deep: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for prefix in self.outputs:
            self.depths.setdefault(prefix, self.least_depth(prefix))

    def late(self, prefix: str) -> int:
        """Cycles by which beats of an output are offered later than its process says."""
        return BLOCK_CYCLES if prefix in self.deep else 0

    @property
    def latency(self) -> int:
        """Cycles from a step to the beat it makes, at most."""
        return max(p.latency for p in self.processes) + (BLOCK_CYCLES if self.deep else 0)

    def least_depth(self, prefix: str) -> int:
        """Entries with which the FIFO of an output never holds up its own pipeline."""
        index = list(self.outputs).index(prefix)
        worst = BLOCK_DEPTH + 1 if prefix in self.deep else 2
        for process in self.processes:
            if index in process.makes:
                made = np.flatnonzero(process.makes[index])
                # What is reserved between a step and the cycle in which its entry is free again.
                frames, rest = divmod(process.latency + self.late(prefix) + 1, process.steps)
                steps = np.concatenate([made, made + process.steps])
                held = np.searchsorted(steps, made + rest) - np.arange(len(made))
                worst = max(worst, frames * len(made) + int(held.max()))
        return worst

    @property
    def source(self) -> str | None:
        """The Verilog of its module; None if that is in ``rtl/``."""
        return None

    @property
    def interval(self) -> int:
        """Cycles per frame when nothing holds it up."""
        return max(p.steps for p in self.processes)


class Netlist:
    """Units and the channels between them, for a device."""

    def __init__(self, name: str, target: FpgaTarget = TARGETS[DEFAULT]) -> None:
        self.name, self.target = name, target
        self.units: list[Unit] = []
        self.inputs: list[Channel] = []
        self.outputs: list[Channel] = []
        self._names: set[str] = set()

    def unique(self, name: str) -> str:
        """A name not yet taken."""
        free, i = name, 1
        while free in self._names:
            i += 1
            free = f"{name}_{i}"
        self._names.add(free)
        return free

    def input(self, name: str, lanes: int, kind: IntType, beats: int) -> Channel:
        """A channel from outside."""
        channel = Channel(self.unique(name), lanes, kind, beats)
        self.inputs.append(channel)
        return channel

    def output(self, channel: Channel) -> None:
        """Lead a channel outside."""
        self.outputs.append(channel)

    def channel(self, name: str, lanes: int, kind: IntType, beats: int) -> Channel:
        """A new channel."""
        return Channel(self.unique(name), lanes, kind, beats)

    def add(self, unit: Unit) -> Unit:
        """Add an instance, and check that its steps carry what its channels do.

        Raises:
            TargetError: they do not; a fault of the unit's description.
        """
        for index, (prefix, channel) in enumerate(unit.inputs.items()):
            moved = sum(int(p.takes[index].sum()) for p in unit.processes if index in p.takes)
            if moved != channel.beats:
                raise TargetError(
                    f"{unit.name}.{prefix}: takes {moved} beats per frame, the channel has {channel.beats}"
                )
        for index, (prefix, channel) in enumerate(unit.outputs.items()):
            moved = sum(int(p.makes[index].sum()) for p in unit.processes if index in p.makes)
            if moved != channel.beats:
                raise TargetError(
                    f"{unit.name}.{prefix}: makes {moved} beats per frame, the channel has {channel.beats}"
                )
        self.units.append(unit)
        return unit


def pack_beats(values: np.ndarray, channel: Channel) -> np.ndarray:
    """Elements ``(..., n)`` of whole beats as bytes, uint8 ``(beats, ceil(width / 8))``."""
    flat = np.ascontiguousarray(values, np.int64).reshape(-1, channel.lanes, 1)
    bits = (flat >> np.arange(channel.type.bits)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(flat), -1), axis=1, bitorder="little")


def unpack_beats(data: np.ndarray, channel: Channel) -> np.ndarray:
    """Inverse of `pack_beats`: int64, flat."""
    bits = np.unpackbits(data, axis=1, bitorder="little")[:, : channel.width]
    bits = bits.reshape(-1, channel.type.bits).astype(np.int64)
    weights = 1 << np.arange(channel.type.bits, dtype=np.int64)
    if channel.type.signed:
        weights[-1] = -weights[-1]
    return bits @ weights
