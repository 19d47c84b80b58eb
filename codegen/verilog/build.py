"""From a node to its units. A module registers `elaborate` for its class of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import numpy as np

from qcompile.codegen.fixed.nodes.base import Node
from qcompile.codegen.fixed.stream import Stream
from qcompile.codegen.verilog.netlist import Channel, Netlist
from qcompile.formats.fixed import IntType, Requantize

BLOCK_BITS = 18
"""Bits of a signed operand that one multiplier of every family takes."""

ROUNDED_AT_ONCE = 5
"""Bits shifted out whose rounding is decided and added in one cycle."""


@singledispatch
def elaborate(node: Node, netlist: Netlist, inputs: Sequence[Channel]) -> Channel:
    """Add the units of ``node`` to ``netlist`` and return the channel of its output."""
    raise NotImplementedError(type(node))


@singledispatch
def input_lanes(node: Node) -> tuple[int, ...]:
    """Lanes that every input of ``node`` must have."""
    raise NotImplementedError(type(node))


def output_lanes(node: Node) -> int:
    """Lanes of the output of ``node``."""
    return node.folding.pe


def stream_channel(netlist: Netlist, stream: Stream, lanes: int) -> Channel:
    """A new channel for a whole stream."""
    return netlist.channel(stream.name, lanes, stream.type, stream.tokens * stream.channels // lanes)


def signed_bits(kind: IntType) -> int:
    """Bits of ``kind`` as two's complement."""
    return kind.bits + (not kind.signed)


def multiply_cycles(a_bits: int, b_bits: int) -> int:
    """Cycles of ``rtl/multiply.v`` with signed operands of so many bits."""
    return 4 if max(a_bits, b_bits) > BLOCK_BITS else 3


def requantize_parameters(
    step: Requantize | None, bounds: tuple[np.ndarray, np.ndarray], out: IntType, a_bits: int = 1
) -> tuple[dict[str, int], int]:
    """Parameters of ``rtl/requantize.v``, and the cycles it takes (``SCALED`` among the parameters).

    Args:
        step: None where nothing is to be done.
        bounds: exact range per channel of what is requantized.
        out: type of the result.
        a_bits: of what is requantized, signed.
    """
    if step is None:
        return dict(MULTIPLY=0, SCALED=0, M_BITS=1, Q_BITS=signed_bits(out), SHIFT=0, ROUND=0, Y_BITS=out.bits, CLAMP_LOW=0, CLAMP_HIGH=0,
                    LOW=0, HIGH=0), 0  # fmt: skip
    least, most = step.unclamped(*bounds)
    low, high = int(least.min() < step.low), int(most.max() > step.high)
    multiply = 0 if step.is_shift else 2 if is_powers(step) else 1
    rounding = 0 if not step.shift else 1 if step.shift <= ROUNDED_AT_ONCE else 2
    codes = scale_codes(step)
    m_bits = max(1, int(codes.max()).bit_length()) if multiply == 2 else signed_bits(step.multiplier_type)
    cycles = (0, multiply_cycles(a_bits, m_bits), 2)[multiply] + rounding + (low or high)
    # The product, and room for what the shift leaves.
    product = max(signed_bits(step.product_type(*bounds)), step.shift + 2)
    parameters = dict(
        MULTIPLY=multiply,
        SCALED=cycles,
        M_BITS=m_bits,
        Q_BITS=product,
        SHIFT=step.shift,
        ROUND=rounding,
        Y_BITS=out.bits,
        CLAMP_LOW=low,
        CLAMP_HIGH=high,
        LOW=step.low,
        HIGH=step.high,
    )
    return parameters, cycles


def is_powers(step: Requantize) -> bool:
    """Whether all multipliers are powers of two."""
    return bool((step.multiplier > 0).all() and (step.multiplier & (step.multiplier - 1) == 0).all())


def scale_codes(step: Requantize) -> np.ndarray:
    """What ``rtl/requantize.v`` takes for the multipliers: themselves, or places to shift if all are powers of two."""
    return np.rint(np.log2(step.multiplier)).astype(np.int64) if is_powers(step) else step.multiplier


def rounding_parameters(
    step: Requantize, bounds: tuple[np.ndarray, np.ndarray], out: IntType
) -> tuple[dict[str, int], int]:
    """Like `requantize_parameters` for units that multiply on their own."""
    parameters, cycles = requantize_parameters(step, bounds, out)
    for name in ("MULTIPLY", "M_BITS"):
        del parameters[name]
    return parameters, cycles


def every(steps: int) -> np.ndarray:
    """All steps move a beat."""
    return np.ones(steps, bool)


def type_parameters(prefix: str, kind: IntType) -> dict[str, int]:
    """``PREFIX_BITS`` and ``PREFIX_SIGNED``."""
    return {f"{prefix}_BITS": kind.bits, f"{prefix}_SIGNED": int(kind.signed)}
