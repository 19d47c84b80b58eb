"""Products of streams, softmax and normalisation in hardware. The last two are chains of units that go through every row twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes import MatMul, Normalize, Softmax
from qcompile.codegen.fixed.nodes.normalize import F, R, Z, root_table
from qcompile.codegen.verilog import build, macs, plumbing
from qcompile.codegen.verilog.movement import back
from qcompile.codegen.verilog.netlist import Channel, Memory, Netlist, Process, Unit, Wait
from qcompile.errors import TargetError
from qcompile.formats.fixed import IntType


@build.input_lanes.register
def _matmul_lanes(node: MatMul) -> tuple[int, ...]:
    return node.folding.simd, (node.folding.simd if node.transposed else node.folding.pe)


@build.input_lanes.register(Softmax)
@build.input_lanes.register(Normalize)
def _row_lanes(node: Softmax | Normalize) -> tuple[int, ...]:
    return (node.folding.pe,)


@build.elaborate.register
def _matmul(node: MatMul, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, simd = node.folding.pe, node.folding.simd
    rows, columns = node.rows // simd, node.columns // pe
    a, b = node.inputs
    low, high = node.product_bounds
    parameters, latency = macs.mac_array(
        pe=pe,
        simd=simd,
        rows=rows,
        style=macs.STYLES[node.products] if node.exponent is None else macs.POWERS,
        weight=b.type,
        product=IntType.covering(min(low, 0), max(high, 0)),
        accumulator=node.accumulator,
        requantize=node.requantize,
        bounds=node.accumulator_bounds,
        output=node.output.type,
    )
    out = build.stream_channel(netlist, node.output, pe)
    step = np.arange(a.tokens * node.heads * rows * columns)
    values = dict(
        TRANSPOSED=int(node.transposed),
        HEADS=node.heads,
        ROWS=rows,
        COLUMNS=columns,
        SIMD=simd,
        PE=pe,
        **build.type_parameters("X", a.type),
        **build.type_parameters("W", b.type),
        EXPONENT=node.exponent or 0,
        **parameters,
        MULTIPLIER=int(build.scale_codes(node.requantize)[0]),
        TOKENS=a.tokens,
    )
    loaded = inputs[1].beats
    netlist.add(
        Unit(
            node.name,
            "matmul",
            values,
            {"a": inputs[0], "b": inputs[1]},
            {"m": out},
            (
                Process(loaded, {1: build.every(loaded)}, {}, waits=(Wait(1, back(loaded, len(step))),)),
                Process(
                    len(step),
                    {0: step // rows % columns == 0},
                    {0: step % rows == rows - 1},
                    latency,
                    waits=(Wait(0, np.full(len(step), loaded)),),
                ),
            ),
            node=node.name,
        )
    )
    return out


def _reduce(
    node: Softmax, netlist: Netlist, source: Channel, suffix: str, maximum: bool, accumulator: int, out: IntType
) -> Channel:
    """A beat per row of ``source``: its sum or its largest element."""
    beats = node.length // node.folding.pe
    channel = netlist.channel(f"{node.name}_{suffix}", 1, out, source.beats // beats)
    step = np.arange(source.beats)
    latency = 1 + (node.folding.pe - 1).bit_length() + 1 + 1
    process = Process(len(step), {0: build.every(len(step))}, {0: step % beats == beats - 1}, latency)
    parameters = dict(
        PE=node.folding.pe,
        BEATS=beats,
        MAXIMUM=int(maximum),
        **build.type_parameters("X", source.type),
        A_BITS=accumulator,
        Y_BITS=out.bits,
    )
    netlist.add(
        Unit(
            f"{node.name}_{suffix}", "row_reduce", parameters, {"s": source}, {"m": channel}, (process,), node=node.name
        )
    )
    return channel


def _join(
    node: Softmax | Normalize,
    netlist: Netlist,
    module: str,
    suffix: str,
    parameters: dict[str, int],
    elements: Channel,
    rows: Channel,
    out: Channel,
    latency: int,
    memories: dict[str, Memory] | None = None,
) -> None:
    """A unit that takes a beat of ``rows`` with the first beat of every row of ``elements``."""
    beats = elements.beats // rows.beats
    step = np.arange(elements.beats)
    process = Process(
        len(step), {0: build.every(len(step)), 1: step % beats == 0}, {0: build.every(len(step))}, latency
    )
    ports = {"a": elements, "b": rows}
    name = f"{node.name}_{suffix}"
    netlist.add(
        Unit(
            name,
            module,
            dict(PE=node.folding.pe, BEATS=beats, **parameters),
            ports,
            {"m": out},
            (process,),
            memories or {},
            node=node.name,
        )
    )


@build.elaborate.register
def _softmax(node: Softmax, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, x = node.folding.pe, node.inputs[0].type
    table = np.resize(node.table, 1 << x.bits)  # entries that no distance reaches are never read
    table[len(node.table) :] = node.table[-1]
    e = IntType.covering(0, int(node.table.max()))

    kept, looked_at = plumbing.fork(netlist, inputs[0], 2)
    largest = _reduce(node, netlist, looked_at, "largest", True, x.bits + 1, x)
    exponentials = netlist.channel(f"{node.name}_exp", pe, e, inputs[0].beats)
    _join(node, netlist, "softmax_exp", "exp", dict(**build.type_parameters("X", x), E_BITS=e.bits), kept, largest,
          exponentials, 3, {"TABLE": Memory(f"{node.name}_table", table[:, None], e.bits)})  # fmt: skip

    kept, looked_at = plumbing.fork(netlist, exponentials, 2)
    total = _reduce(node, netlist, looked_at, "total", False, node.sum_type.bits + 1, node.sum_type)
    out = build.stream_channel(netlist, node.output, pe)
    parameters = dict(E_BITS=e.bits, S_BITS=node.sum_type.bits, BITS=node.bits)
    _join(node, netlist, "softmax_code", "code", parameters, kept, total, out, 3 + node.bits + 1)
    return out


@build.elaborate.register
def _normalize(node: Normalize, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    pe, x, channels = node.folding.pe, node.inputs[0].type, node.inputs[0].channels
    if x.bits + 1 > build.BLOCK_BITS:
        raise TargetError(
            f"{node.name}: its input has {x.bits} bits, and squares are taken of at most {build.BLOCK_BITS - 1}; "
            "quantize what it normalises to fewer bits"
        )
    beats = channels // pe
    table = root_table()
    root_bits = int(table.max()).bit_length()
    k_bits = max(1, node.largest_k.bit_length())
    sum_bits = build.signed_bits(node.sum_type) if node.centred else 1

    kept, looked_at = plumbing.fork(netlist, inputs[0], 2)
    rows = netlist.channel(
        f"{node.name}_moments", 1, IntType(k_bits + root_bits + sum_bits, False), looked_at.beats // beats
    )
    step = np.arange(looked_at.beats)
    square_bits = (channels * node.reach**2).bit_length() + 1
    multiplied = build.multiply_cycles(max(square_bits, sum_bits), channels.bit_length() + 1)
    latency = 3 + (pe - 1).bit_length() + multiplied + 6 + 1
    netlist.add(
        Unit(
            f"{node.name}_moments",
            "row_moments",
            dict(
                PE=pe,
                BEATS=beats,
                CENTRED=int(node.centred),
                **build.type_parameters("X", x),
                C=channels,
                S_BITS=sum_bits,
                Q_BITS=square_bits,
                V_BITS=node.square_bound.bit_length(),
                K_BITS=k_bits,
                LAST_K=node.largest_k,
                F=F,
                R_BITS=root_bits,
                EPSILON=node.epsilon,
                MULTIPLIED=multiplied,
            ),
            {"s": looked_at},
            {"m": rows},
            (Process(len(step), {0: build.every(len(step))}, {0: step % beats == beats - 1}, latency),),
            {"ROOTS": Memory(f"{node.name}_roots", table[:, None], root_bits)},
            node=node.name,
        )
    )
    out = build.stream_channel(netlist, node.output, pe)
    deviation_bits = node.deviation_bound.bit_length() + 1
    parameters = dict(
        **build.type_parameters("X", x),
        C=channels,
        S_BITS=sum_bits,
        D_BITS=deviation_bits,
        K_BITS=k_bits,
        LAST_K=node.largest_k,
        R_BITS=root_bits,
        SHIFT=R - Z,
        Y_BITS=node.output.type.bits,
    )
    latency = 3 + build.multiply_cycles(deviation_bits, root_bits + 1) + 1
    _join(node, netlist, "row_normalize", "apply", parameters, kept, rows, out, latency)
    return out
