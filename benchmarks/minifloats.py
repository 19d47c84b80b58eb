"""Integers beside minifloats: the error of a format, and what a product and its exact sum cost in hardware.

    python benchmarks/minifloats.py [--bits 3 4 5 6 8] [--no-synthesis]

Both operands have the format. The error is that of 64 columns of 1,024 numbers, normal or with the heavier tails of Laplace's
distribution, with a scale per column that makes it least, as signal to noise in decibels. Tables are those of one product and an
accumulator for 64 of them, estimated and found by Yosys for xc7 (without multipliers); integers are ``rtl/mac_array.v`` with
``products=lut``, minifloats ``rtl/minifloat_mac.v``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from qcompile.codegen.verilog import area, build, macs, minifloat, synthesize, top
from qcompile.formats import Format, parse_format
from qcompile.formats.fixed import IntType
from qcompile.formats.floats import Minifloat
from qcompile.targets.fpga import TARGETS

LENGTH = 64
"""Products of a sum."""

DEVICE = TARGETS["xc7"]


def decibels(fmt: Format, values: np.ndarray) -> float:
    """Signal to noise of ``values`` in a format."""
    grid = fmt.fit_grid(values)
    error = values - fmt.decode(fmt.quantize(values, grid))
    return float(10 * np.log10(np.square(values).sum() / np.square(error).sum()))


def spellings(bits: int) -> list[str]:
    """The formats of so many bits; sums of those with 5 exponent bits need more than 64."""
    return [f"int{bits}", *(f"e{e}m{bits - 1 - e}" for e in range(1, min(bits - 1, 4) + 1))]


def module(fmt: Format) -> tuple[str, dict[str, int], area.Area]:
    """The Verilog module of one product and its sum, its parameters and the estimate."""
    family = area.FAMILIES[DEVICE.lut_inputs]
    if isinstance(fmt, Minifloat):
        kind = minifloat.accumulator(fmt, fmt, LENGTH)
        return "minifloat_mac", minifloat.mac_parameters(fmt, fmt, kind), minifloat.estimate(fmt, fmt, kind, family)
    operand = IntType(fmt.bits, True)
    product = IntType.covering(operand.low * operand.high, operand.low**2)
    total = IntType.covering(LENGTH * operand.low * operand.high, LENGTH * operand.low**2)
    bounds = np.array([total.low]), np.array([total.high])
    values, _ = macs.mac_array(
        pe=1, simd=1, rows=LENGTH, style=macs.STYLES["lut"], weight=operand, product=product, accumulator=total,
        requantize=None, bounds=bounds, output=total,
    )  # fmt: skip
    values = dict(SIMD=1, PE=1, **build.type_parameters("X", operand), **build.type_parameters("W", operand), **values)
    return "mac_array", values, area.mac_array(values, family)


def found(name: str, parameters: dict[str, int]) -> int:
    """Look-up tables after synthesis."""
    with tempfile.TemporaryDirectory() as temporary:
        files = [str(file) for file in top.RTL.glob("*.v")]
        return synthesize.synthesize(Path(temporary), name, files, DEVICE, options="-nodsp", parameters=parameters).luts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4, 5, 6, 8])
    parser.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    samples = [draw(size=(1024, 64)).astype(np.float32) for draw in (rng.standard_normal, rng.laplace)]
    print("| format | normal, dB | Laplace, dB | accumulator bits | tables estimated | Yosys | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for bits in given.bits:
        for spelling in spellings(bits):
            fmt = parse_format(spelling)
            name, parameters, guess = module(fmt)
            errors = [f"{decibels(fmt, values):.1f}" for values in samples]
            luts = found(name, parameters) if given.synthesis else 0
            measured = [str(luts), f"{guess.luts / luts:.2f}"] if luts else ["", ""]
            print(
                "| "
                + " | ".join([f"`{spelling}`", *errors, str(parameters["A_BITS"]), f"{guess.luts:.0f}", *measured])
                + " |",
                flush=True,
            )
