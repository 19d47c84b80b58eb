"""A number format written from scratch: quantiles of Student's t-distribution, whose long tails weights often have.

Codes ascend with the levels; 0 is a level, and both ends are at 1, as in NF4 (Dotzel et al., "Learning from Students:
Applying t-Distributions to Explore Accurate and Efficient Formats for LLMs", 2024). Use it by naming this file:

    qcompile --extension student_float.py compile MODEL --weight sf4/g32 --calibration texts.txt -o out
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import t

from qcompile.formats import Format, FormatInfo, register_format
from qcompile.formats.levels import LevelFormat


@dataclass(frozen=True)
class StudentFloat(LevelFormat):
    """``sf<bits>[/g<group>]``; solvers, kernels and model.onnx follow from the table."""

    bits: int
    group: int = 0
    freedom: float = 5.0  # degrees of freedom; the normal distribution is the limit

    def __str__(self) -> str:
        return f"sf{self.bits}" + (f"/g{self.group}" if self.group else "")

    @cached_property
    def table(self) -> np.ndarray:
        half = 1 << (self.bits - 1)
        # Half a quantile is left out at either end, where the distribution has no bound.
        outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
        positive = t.ppf(np.linspace(0.5, outermost, half + 1), self.freedom)
        negative = -t.ppf(np.linspace(outermost, 0.5, half), self.freedom)
        return (np.concatenate([negative, positive[1:]]) / positive[-1]).astype(np.float32)


@register_format(info=FormatInfo("sf<2-8>[/g<N>]", "quantiles of Student's t-distribution", StudentFloat(4, 32)))
def parse(spelling: str) -> Format | None:
    match = re.fullmatch(r"sf([2-8])(?:/g([1-9]\d*))?", spelling)
    return StudentFloat(int(match[1]), int(match[2] or 0)) if match else None
