"""`MatVec` with weights a bit at a time: ``rtl/bitserial.v``.

    y = requantize(sum_g scale[g] * (sum_b 2^b * (sum_k bit_b(code[k]) * x[k])) + bias)

A token takes as many passes over its channels as weights have bits. Groups are dequantized after their sums, so scales of groups
cost an adder per output, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.codegen.fixed.nodes.matvec import MatVec, dot_bounds
from qcompile.codegen.verilog import build, macs
from qcompile.codegen.verilog.netlist import Channel, Memory, Netlist, Process, Unit
from qcompile.formats.fixed import IntType


def elaborate(
    node: MatVec,
    netlist: Netlist,
    inputs: Sequence[Channel],
    search: dict[str, int] | None,
    literals: dict[str, str],
) -> Channel:
    """Add the unit of ``node``.

    Args:
        node: with ``products="serial"``.
        netlist, inputs: as everywhere.
        search, literals: of ``rtl/thresholds.v``, where sums are requantized by thresholds.
    """
    pe, simd = node.folding.pe, node.folding.simd
    x, kind, scales = node.inputs[0], node.code_type, node.group_scale
    groups, columns = node.groups, node.n // pe
    rows = node.group_rows
    scale_type = None if scales is None else IntType.covering(min(-1, int(scales.min())), int(scales.max()))
    per_group = kind.bits * rows
    a_bits = build.signed_bits(node.accumulator)
    parameters, cycles = macs.scale_array(
        pe, per_group * groups, node.requantize, node.accumulator_bounds, node.output.type, a_bits, search
    )
    summed = 2 + ((simd + 1) // 2 - 1).bit_length() + 1
    dequantized = 1 + (0 if scale_type is None else scale_type.bits)
    out = build.stream_channel(netlist, node.output, pe)
    step = np.arange(columns * groups * per_group)
    first_plane = step // rows % kind.bits == 0
    row_of_x = step // per_group % groups * rows + step % rows
    process = Process(
        x.tokens * len(step),
        {0: np.tile(first_plane & (step < groups * per_group) & (row_of_x < node.k // simd), x.tokens)},
        {0: np.tile(step % (groups * per_group) == groups * per_group - 1, x.tokens)},
        summed + dequantized + cycles + 1,
    )
    values = dict(
        ROWS=rows,
        PLANES=kind.bits,
        GROUPS=groups,
        WORDS=node.k // simd,
        COLUMNS=columns,
        SIMD=simd,
        PE=pe,
        **build.type_parameters("X", x.type),
        W_SIGNED=int(kind.signed),
        P_BITS=build.signed_bits(group_type(node)),
        SCALES=int(scale_type is not None),
        S_BITS=1 if scale_type is None else scale_type.bits,
        A_BITS=a_bits,
        **parameters,
    )
    unit = Unit(
        node.name,
        "bitserial",
        values,
        {"s": inputs[0]},
        {"m": out},
        (process,),
        _memories(node, rows, values),
        literals=literals,
        node=node.name,
    )
    netlist.add(unit)
    return out


def group_type(node: MatVec) -> IntType:
    """The narrowest type of the sum of every group."""
    x, length = node.inputs[0], node.group_length or node.k
    ends = []
    for start in range(0, node.k, length):
        part = slice(start, start + length)
        ends += dot_bounds(x.low[part], x.high[part], node.codes[part])
    return IntType.covering(min(0, int(np.min(ends))), max(0, int(np.max(ends))))


def _memories(node: MatVec, rows: int, parameters: dict[str, int]) -> dict[str, Memory]:
    pe, simd, groups = node.folding.pe, node.folding.simd, node.groups
    columns, bits = node.n // pe, node.code_type.bits
    codes = np.zeros((groups * rows * simd, node.n), np.int64)
    codes[: node.k] = node.codes
    planes = (codes[None] >> np.arange(bits)[::-1, None, None]) & 1  # (plane, K, N), the highest first
    # (plane, K, N) -> (columns, groups, planes, rows, pe, simd)
    words = planes.reshape(bits, groups, rows, simd, columns, pe).transpose(4, 1, 0, 2, 5, 3)
    memories = {
        "WEIGHTS": Memory(f"{node.name}_weights", words.reshape(-1, pe * simd), 1),
        "BIASES": Memory(f"{node.name}_biases", node.bias.reshape(columns, pe), parameters["A_BITS"]),
    }
    if node.group_scale is not None:
        scales = node.group_scale.reshape(groups, columns, pe).transpose(1, 0, 2).reshape(-1, pe)
        memories["GROUP_SCALES"] = Memory(f"{node.name}_scales", scales, parameters["S_BITS"])
    if parameters["MULTIPLY"]:
        multipliers = macs.scale_words(node.requantize, node.n, pe // parameters["TURNS"])
        memories["MULTIPLIERS"] = Memory(f"{node.name}_multipliers", multipliers, parameters["M_BITS"])
    return memories
