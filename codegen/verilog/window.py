"""Windowed nodes in hardware: ``rtl/window.v``, and behind it ``rtl/matvec.v`` or ``rtl/channel_max.v``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes import Depthwise, Geometry, MaxPool, Window
from qcompile.codegen.verilog import build, macs
from qcompile.codegen.verilog.netlist import NEVER, Channel, Memory, Netlist, Process, Unit, Wait, pack_word
from qcompile.formats.fixed import IntType

READ_LATENCY = 3
"""Cycles from a step of ``rtl/window.v`` to the beat it makes: memory, the register behind it, FIFO."""

NOTICED = 2
"""Cycles until its reader can use a word that was written, and its writer the place of a word that was released."""


@build.input_lanes.register(Window)
@build.input_lanes.register(Depthwise)
@build.input_lanes.register(MaxPool)
def _lanes(node: Window | Depthwise | MaxPool) -> tuple[int, ...]:
    return (node.folding.pe,)


@build.elaborate.register
def _window(node: Window, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    out = build.stream_channel(netlist, node.output, node.folding.pe)
    netlist.add(_window_unit(node, inputs[0], out, by_channel=False, pad=0))
    return out


@build.elaborate.register
def _depthwise(node: Depthwise, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, taps = node.folding.pe, node.geometry.taps
    groups, windows = node.channels // pe, node.geometry.windows
    x, w = node.inputs[0].type, node.weight_type
    seen = IntType.covering(min(x.low, 0), max(x.high, 0)) if node.geometry.padded else x
    middle = netlist.channel(f"{node.name}_taps", pe, x, windows * groups * taps)
    netlist.add(_window_unit(node, inputs[0], middle, by_channel=True, pad=0))

    ends = np.stack([seen.low * node.weight, seen.high * node.weight])
    parameters, latency = macs.mac_array(
        pe=pe,
        simd=1,
        rows=taps,
        style=macs.STYLES[node.products],
        weight=w,
        product=IntType.covering(min(0, int(ends.min())), max(0, int(ends.max()))),
        accumulator=node.accumulator,
        requantize=node.requantize,
        bounds=node.accumulator_bounds,
        output=node.output.type,
    )
    step = np.arange(windows * groups * taps)
    memories = {
        # (taps, C) -> (groups, taps, pe)
        "WEIGHTS": Memory(
            f"{node.name}_weights", node.weight.reshape(taps, groups, pe).transpose(1, 0, 2).reshape(-1, pe), w.bits
        ),
        "BIASES": Memory(f"{node.name}_biases", node.bias.reshape(groups, pe), parameters["A_BITS"]),
    }
    if parameters["MULTIPLY"]:
        multipliers = macs.scale_words(node.requantize, node.channels, pe // parameters["TURNS"])
        memories["MULTIPLIERS"] = Memory(f"{node.name}_multipliers", multipliers, parameters["M_BITS"])
    out = build.stream_channel(netlist, node.output, pe)
    netlist.add(
        Unit(
            node.name,
            "matvec",
            dict(
                ROWS=taps,
                COLUMNS=groups,
                PE=pe,
                EACH=1,
                **build.type_parameters("X", x),
                **build.type_parameters("W", w),
                **parameters,
            ),
            {"s": middle},
            {"m": out},
            (Process(len(step), {0: build.every(len(step))}, {0: step % taps == taps - 1}, latency),),
            memories,
            node=node.name,
        )
    )
    return out


@build.elaborate.register
def _maxpool(node: MaxPool, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, taps = node.folding.pe, node.geometry.taps
    groups, windows, x = node.channels // pe, node.geometry.windows, node.inputs[0].type
    middle = netlist.channel(f"{node.name}_taps", pe, x, windows * groups * taps)
    netlist.add(_window_unit(node, inputs[0], middle, by_channel=True, pad=x.low))
    out = build.stream_channel(netlist, node.output, pe)
    step = np.arange(middle.beats)
    parameters = dict(PE=pe, ROWS=taps, BITS=x.bits, SIGNED=int(x.signed))
    process = Process(len(step), {0: build.every(len(step))}, {0: step % taps == taps - 1}, 2)
    netlist.add(Unit(node.name, "channel_max", parameters, {"s": middle}, {"m": out}, (process,), node=node.name))
    return out


def _window_unit(
    node: Window | Depthwise | MaxPool, source: Channel, out: Channel, *, by_channel: bool, pad: int
) -> Unit:
    """``rtl/window.v`` with loops over (row, column, channel) of a window, or over (channel, row, column)."""
    g, groups = node.geometry, node.channels // node.folding.pe
    line, words = g.width * groups, g.height * g.width * groups
    (kh, kw), (dh, dw), (sh, sw) = g.kernel, g.dilation, g.stride
    rows, columns = g.out_shape
    top, left = g.pads[:2]
    place = np.array([line, groups, 1])
    # What one iteration of each loop moves by: (row, column, channel group). The innermost first.
    over_channel, over_row, over_column = (groups, (0, 0, 1)), (kh, (dh, 0, 0)), (kw, (0, dw, 0))
    inner = [over_column, over_row, over_channel] if by_channel else [over_channel, over_column, over_row]
    loops = [*inner, (columns, (0, sw, 0)), (rows, (sh, 0, 0))]
    parameters: dict[str, int] = {}
    back = np.zeros(3, np.int64)  # undoes all iterations of the loops inside
    for level, (count, move) in enumerate(loops):
        delta = np.array(move) - back
        parameters |= {
            f"N{level}": count,
            f"R{level}": int(delta @ place),
            f"Y{level}": int(delta[0]),
            f"X{level}": int(delta[1]),
        }
        back = back + np.array(move) * (count - 1)

    kept_rows = min((kh - 1) * dh + 1 + sh, g.height)
    size = max(2, 1 << (kept_rows * line - 1).bit_length())
    order = _order(g, groups, by_channel)  # (steps, 3): row, column, group of every step
    first_rows = np.arange(rows) * sh - top
    bases = np.clip(first_rows, 0, g.height)
    position = order @ place
    ahead = position - np.repeat(bases, len(order) // rows) * line
    position[0] = 0  # where the first step of a frame begins, see rtl/window.v
    skip = max(int((first_rows < 0).sum()) - 1, 0)
    released = np.diff(bases, append=g.height) * line
    final = int(np.flatnonzero(released).max(initial=skip))
    parameters |= dict(
        WIDTH=source.width,
        SIZE=size,
        HEIGHT=g.height,
        COLUMNS=g.width,
        R5=words - int(position[-1]),
        RF=int(position[1]) if len(position) > 1 else 0,
        Y5=-int(back[0]),
        P=max(int(np.abs(ahead).max()), size, words).bit_length() + 2,
        Y=int(np.abs(order[:, 0]).max() + sh).bit_length() + 2,
        X=max(int(np.abs(order[:, 1]).max()), g.width).bit_length() + 2,
        TOP=top,
        LEFT=left,
        SKIP=skip,
        FINAL=final,
        RELEASE_FIRST=int(released[skip]),
        RELEASE=sh * line,
        RELEASE_LAST=int(released[final]),
    )
    unit = Unit(
        f"{node.name}_window",
        "window",
        parameters,
        {"s": source},
        {"m": out},
        _window_processes(g, order, bases, line, words, size),
        node=node.name,
    )
    word = pack_word(np.full(node.folding.pe, pad), source.type.bits)
    unit.literals["PAD"] = f"{source.width}'h{word:x}"
    return unit


def _order(g: Geometry, groups: int, by_channel: bool) -> np.ndarray:
    """Row, column and channel group that every step reads, int64 ``(steps, 3)``; they may lie outside the image."""
    (kh, kw), (dh, dw) = g.kernel, g.dilation
    rows, columns = g.out_shape
    oy, ox, ky, kx, c = np.ix_(np.arange(rows), np.arange(columns), np.arange(kh), np.arange(kw), np.arange(groups))
    y = oy * g.stride[0] - g.pads[0] + ky * dh
    x = ox * g.stride[1] - g.pads[1] + kx * dw
    order = np.stack(np.broadcast_arrays(y, x, c))
    if by_channel:
        order = order.transpose(0, 1, 2, 5, 3, 4)
    return order.reshape(3, -1).T


def _window_processes(
    g: Geometry, order: np.ndarray, bases: np.ndarray, line: int, words: int, size: int
) -> tuple[Process, Process]:
    """The writer and the reader, which wait for each other: for words, and for room in the ring.

    Args:
        g: of the windows.
        order: what every step reads.
        bases: first row of the image that each row of windows keeps.
        line, words: of a row and of the image.
        size: of the ring.
    """
    steps = len(order)
    inside = (order[:, 0] >= 0) & (order[:, 0] < g.height) & (order[:, 1] >= 0) & (order[:, 1] < g.width)
    needs = np.where(inside, order @ (line, words // (g.height * g.width), 1) + 1, NEVER)
    needs[0] = max(needs[0], 1)

    # The step of the reader after which a total of so many words of this frame has been released.
    per_row = steps // g.out_shape[0]
    released = np.append(bases[1:], g.height) * line  # after each row of windows
    wanted = np.arange(1, words + 1) - size
    frames, part = np.divmod(wanted - 1, words)
    row = np.searchsorted(released, part + 1)
    room = frames * steps + (row + 1) * per_row
    return (
        Process(words, {0: build.every(words)}, {}, waits=(Wait(1, room, NOTICED),)),
        Process(steps, {}, {0: build.every(steps)}, READ_LATENCY, waits=(Wait(0, needs, NOTICED),)),
    )
