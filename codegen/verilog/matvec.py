"""`MatVec` in hardware: ``rtl/matvec.v``, a pipeline of its own (`unrolled`), or weights a bit at a time (`bitserial`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes.matvec import MatVec
from qcompile.codegen.verilog import bitserial, build, macs, unrolled
from qcompile.codegen.verilog.netlist import Channel, Memory, Netlist, Process, Unit, pack_word
from qcompile.formats.fixed import IntType


@build.input_lanes.register
def _lanes(node: MatVec) -> tuple[int, ...]:
    return (node.folding.simd,)


@build.elaborate.register
def _elaborate(node: MatVec, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    if node.products == "constant":
        return unrolled.elaborate(node, netlist, inputs)
    thresholds = node.thresholds
    search, literals = None, {}
    if thresholds is not None:
        search, literals["TABLE"] = _search(node, thresholds)
    if node.products == "serial":
        return bitserial.elaborate(node, netlist, inputs, search, literals)
    pe, simd = node.folding.pe, node.folding.simd
    rows, columns = node.k // simd, node.n // pe
    x, w = node.inputs[0], node.weight_type
    parameters, latency = macs.mac_array(
        pe=pe,
        simd=simd,
        rows=rows,
        style=macs.STYLES[node.products],
        weight=w,
        product=product_type(node),
        accumulator=node.accumulator,
        requantize=node.requantize,
        bounds=node.accumulator_bounds,
        output=node.output.type,
        search=search,
    )
    out = build.stream_channel(netlist, node.output, pe)

    step = np.arange(rows * columns)
    tokens = x.tokens
    unit = Unit(
        node.name,
        "matvec",
        dict(
            ROWS=rows,
            COLUMNS=columns,
            SIMD=simd,
            PE=pe,
            **build.type_parameters("X", x.type),
            **build.type_parameters("W", w),
            **parameters,
        ),
        {"s": inputs[0]},
        {"m": out},
        (
            Process(
                tokens * rows * columns,
                {0: np.tile(step < rows, tokens)},
                {0: np.tile(step % rows == rows - 1, tokens)},
                latency,
            ),
        ),
        _memories(node, parameters),
        literals=literals,
        node=node.name,
    )
    netlist.add(unit)
    return out


def _search(node: MatVec, thresholds: np.ndarray) -> tuple[dict[str, int], str]:
    """Parameters of ``rtl/thresholds.v`` and its table: by column, PE and threshold, the first in the lowest bits."""
    assert node.requantize is not None
    kind = IntType.covering(min(int(thresholds.min()), -1), int(thresholds.max()))
    word = pack_word(thresholds.T.reshape(-1), kind.bits)
    bits = len(thresholds).bit_length()
    parameters = dict(THRESHOLDS=bits, T_BITS=kind.bits, LOW=node.requantize.low)
    return parameters, f"{thresholds.size * kind.bits}'h{word:x}"


def product_type(node: MatVec) -> IntType:
    """The narrowest type of every product of the node."""
    x = node.inputs[0]
    ends = np.stack([x.low[:, None] * node.weight, x.high[:, None] * node.weight])
    return IntType.covering(min(0, int(ends.min())), max(0, int(ends.max())))


def _memories(node: MatVec, parameters: dict[str, int]) -> dict[str, Memory]:
    pe, simd = node.folding.pe, node.folding.simd
    rows, columns = node.k // simd, node.n // pe
    # (K, N) -> (columns, rows, pe, simd)
    words = node.weight.reshape(rows, simd, columns, pe).transpose(2, 0, 3, 1).reshape(rows * columns, pe * simd)
    memories = {
        "WEIGHTS": Memory(f"{node.name}_weights", words, node.weight_type.bits),
        "BIASES": Memory(f"{node.name}_biases", node.bias.reshape(columns, pe), parameters["A_BITS"]),
    }
    if parameters["MULTIPLY"]:
        multipliers = macs.scale_words(node.requantize, node.n, pe // parameters["TURNS"])
        memories["MULTIPLIERS"] = Memory(f"{node.name}_multipliers", multipliers, parameters["M_BITS"])
    return memories
