"""Other roundings said as rounding half to even, which is the only one that nodes know.

With one more bit below, no result is ever a tie, and half to even becomes what is wanted, for every integer ``p`` and ``s >= 0``:

    floor(p / 2^s)            = round_half_even((2 p + 1 - 2^s) / 2^(s+1))
    floor(p / 2^s + 1/2)      = round_half_even((2 p + 1) / 2^(s+1))            half up
    ceil(p / 2^s)             = round_half_even((2 p - 1 + 2^s) / 2^(s+1))

The numerators are odd, so they are no odd multiple of ``2^s`` unless ``s = 0``, where the three are ``p`` itself. Hardware whose
weights are constants sees that and adds nothing.
"""

from __future__ import annotations

import numpy as np

from qcompile.errors import FormatError
from qcompile.formats.fixed import Requantize

MODES = ("half-even", "half-up", "floor", "ceil")


def with_rounding(
    weight: np.ndarray, bias: np.ndarray, step: Requantize, mode: str
) -> tuple[np.ndarray, np.ndarray, Requantize]:
    """Weight, bias and requantization of a layer ``clamp(round(x @ weight + bias) / 2^shift)`` that rounds otherwise.

    Args:
        weight, bias: int64 ``(K, N)``, ``(N,)``.
        step: a shift, without multipliers.
        mode: of `MODES`.

    Raises:
        FormatError: an unknown mode, or multipliers, under which the lowest bit is not that of the sum.
    """
    if mode not in MODES:
        raise FormatError(f"unknown rounding {mode!r}; known: {', '.join(MODES)}")
    if mode == "half-even" or not step.shift:
        return weight, bias, step
    if not step.is_shift:
        raise FormatError(f"rounding {mode} needs scales whose ratios are powers of two")
    one = 1 << step.shift
    offset = {"half-up": 1, "floor": 1 - one, "ceil": one - 1}[mode]
    return 2 * weight, 2 * bias + offset, Requantize(step.multiplier, step.shift + 1, step.low, step.high)
