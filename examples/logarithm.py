"""A number format and a kernel of its own: weights that are signed powers of two, and no table to look them up in.

A code is a sign and an exponent ``e`` in 0..7; it stands for ``+-2^(e - 7)`` (Miyashita, Lee and Murmann, "Convolutional
Neural Networks using Logarithmic Data Representation", 2016, section 3). Moved to the top of a 32-bit lane it nearly is
a float already: shifted down by five places, sign kept, the exponent lies where that of a float lies.

    qcompile --extension logarithm.py compile MODEL --recipe w4a16 --weight log4/g32 --calibration texts.txt -o out
"""

import re
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels import register_kernel
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.unpack import shift
from qcompile.codegen.kernels.x86 import FloatTableGemm
from qcompile.formats import Format, FormatInfo, IntFormat, register_format
from qcompile.formats.levels import LevelFormat


@dataclass(frozen=True)
class Logarithm(LevelFormat):
    group: int = 0
    bits = 4
    table = np.concatenate([s * np.exp2(np.arange(-7.0, 1)) for s in (1, -1)]).astype(np.float32)

    def __str__(self) -> str:
        return f"log4/g{self.group}" if self.group else "log4"


@register_format(info=FormatInfo("log4[/g<N>]", "signed powers of two, without a zero", Logarithm(32)))
def parse(spelling: str) -> Format | None:
    match = re.fullmatch(r"log4(?:/g([1-9]\d*))?", spelling)
    return Logarithm(int(match[1] or 0)) if match else None


@register_kernel("x86")
class LogarithmGemm(FloatTableGemm):
    name = "x86-logarithm"

    def integers(self, fmt):
        return IntFormat(4, fmt.group) if isinstance(fmt, Logarithm) else None

    def speed(self, problem, target):
        return 15.0, 4.0  # multiply-adds per cycle, cycles to unpack a register of codes

    def floats(self, e, raw, index, zeros):
        lanes, kept, lowest = e.panels.lanes, -0x7C800000, 120 << 23  # sign and three bits of exponent; that of 2^-7
        for offset in range(e.panels.depth):
            tops = [shift(words[0], 28 - 8 * offset - 4 * index, lanes) for words in raw]
            fields = [T.shift_right(x, v.const(5, lanes, "int32")) & v.const(kept, lanes, "int32") for x in tops]
            yield offset, [v.let(v.bits_of(x + v.const(lowest, lanes, "int32"), "float32", lanes)) for x in fields]
