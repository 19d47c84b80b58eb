"""Minifloats multiplied as they are, and what that costs beside integers: ``rtl/minifloat_mac.v``, ``rtl/minifloat_dot.v``.

A program holds minifloat weights as integers (every level is a whole number of smallest steps), which widens them. Hardware that
takes sign, exponent and mantissa apart multiplies significands of ``1 + M`` bits only, but shifts products and adds in
as many bits as products span: exact sums, as Kulisch's. The cost per product and the error of a format together tell which is
the better use of tables (Aggarwal et al., "Shedding the Bits: Pushing the Boundaries of Quantization with Minifloats on FPGAs" (2024)).

    tables = decoding + significands + exponents + shifter + adder
"""

from __future__ import annotations

import numpy as np

from qcompile.codegen.verilog import build
from qcompile.codegen.verilog.area import Area, Family
from qcompile.codegen.verilog.netlist import Channel, Netlist, Process, Unit
from qcompile.formats.fixed import IntType
from qcompile.formats.floats import Minifloat


def integers(fmt: Minifloat) -> np.ndarray:
    """Every code of ``fmt`` as a whole number of its smallest steps, int64.

    Codes that stand for no number in some formats are taken as the numbers that they would be.
    """
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    codes = np.arange(1 << fmt.bits)
    exponent, fraction = codes >> m & ((1 << e) - 1), codes & ((1 << m) - 1)
    value = np.where(exponent > 0, ((1 << m) + fraction) << np.maximum(exponent - 1, 0), fraction)
    return np.where(codes >> (e + m), -value, value)


def accumulator(x: Minifloat, w: Minifloat, length: int) -> IntType:
    """A type that holds every sum of ``length`` products."""
    most = length * int(integers(x).max()) * int(integers(w).max())
    return IntType.covering(-most, most)


def dot(netlist: Netlist, x: Minifloat, w: Minifloat, length: int, inputs: tuple[Channel, Channel]) -> Channel:
    """Add a unit that makes dot products of codes; the inputs carry one code per beat."""
    kind = accumulator(x, w, length)
    out = netlist.channel("dot", 1, kind, inputs[0].beats // length)
    step = np.arange(inputs[0].beats)
    process = Process(
        len(step), {0: build.every(len(step)), 1: build.every(len(step))}, {0: step % length == length - 1}, 4
    )
    parameters = dict(LENGTH=length, **mac_parameters(x, w, kind))
    netlist.add(
        Unit("minifloat_dot", "minifloat_dot", parameters, {"a": inputs[0], "b": inputs[1]}, {"m": out}, (process,))
    )
    return out


def mac_parameters(x: Minifloat, w: Minifloat, kind: IntType) -> dict[str, int]:
    """Of ``rtl/minifloat_mac.v`` with sums of ``kind``."""
    return dict(
        X_EXPONENT=x.exponent_bits,
        X_MANTISSA=x.mantissa_bits,
        W_EXPONENT=w.exponent_bits,
        W_MANTISSA=w.mantissa_bits,
        A_BITS=kind.bits,
    )


def estimate(x: Minifloat, w: Minifloat, kind: IntType, family: Family) -> Area:
    """Tables and registers of one ``rtl/minifloat_mac.v`` with sums of ``kind``."""
    xm, wm = x.mantissa_bits + 1, w.mantissa_bits + 1
    widest = sum((1 << f.exponent_bits) - 2 for f in (x, w))
    product, places = xm + wm, widest.bit_length()
    decoding = sum(-(-(f.exponent_bits - 1) // (family.inputs - 1)) for f in (x, w))
    # A row of the product's array per bit of the shorter significand, with its carries.
    significands = min(xm, wm) * (max(xm, wm) + 2) if min(xm, wm) > 1 else max(xm, wm)
    exponents = places + max(x.exponent_bits, w.exponent_bits) if widest else 0
    # A bit of the result is one of the product's bits, or of as many as there are shifts.
    span = product + widest
    sources = np.minimum.reduce(
        [np.arange(1, span + 1), np.full(span, product), np.arange(span, 0, -1), np.full(span, widest + 1)]
    )
    shifter = sum(family.select(int(n) + 1) for n in sources) if widest else 0
    # The adder, and tables in front of it: a sum begins at 0, a term may be subtracted.
    adder = family.adder(kind.bits) + kind.bits
    registers = product + places + span + kind.bits + 6
    return Area(decoding + significands + exponents + shifter + adder, registers)
