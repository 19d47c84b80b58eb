"""What a kernel family is: config space, TIR builder, weight packer, numpy reference, cost, and reasons to refuse.

A family is one class. The planner asks every family `supports`, takes the tuned config or the one with the lowest
`cost`, packs the weights with `pack` and calls the PrimFunc from `build` inside the compiled program.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.formats import ActivationFormat, BitLayout, Format, Quantized
from qcompile.targets.target import Target


@dataclass(frozen=True)
class Epilogue:
    """What happens to the accumulator before it is stored, in this order.

    Attributes:
        bias: add a float32 ``(N,)`` vector.
        activation: ``""``, ``relu``, ``gelu`` (erf), ``gelu_tanh`` or ``silu``.
        residual: add a float32 ``(M, N)`` matrix after the activation.
        codes: store what a static quantizer makes of the result, uint8 ``clip(round_half_even(y / step)) + 128``, instead
            of float32; step and limits are a parameter.
    """

    bias: bool = False
    activation: str = ""
    residual: bool = False
    codes: bool = False


@dataclass(frozen=True)
class LinearProblem:
    """``y[m, n] = epilogue(sum_k x[m, k] * w[k, n])`` with ``x`` and ``w`` in given formats.

    Attributes:
        k, n: reduction length and number of output channels; any positive integers.
        weight: format of ``w``.
        activation: format of ``x``.
        epilogue: fused tail.
        m: number of rows if it is known at compile time, else None (the kernel takes any ``M >= 0`` at run time).
        threads: cores the schedule may assume.
    """

    k: int
    n: int
    weight: Format
    activation: ActivationFormat
    epilogue: Epilogue = field(default_factory=Epilogue)
    m: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Support:
    """Whether a family executes a problem, and if not, why."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class StoredCodes:
    """How the packed array ``weight`` of a kernel holds the codes of a matrix, so that others can read them too.

    The other packed arrays then are ``scale`` ``(N',)`` in float32, to be multiplied by ``unit``, and where groups have scales
    ``group_scale``, ``zero`` and ``offset``, ``(panels, groups, ..., width)``.

    Attributes:
        layout: the bit permutation, from padded codes ``(K', N')``.
        source: for every padded row its k, or -1, int64 ``(K',)``.
        group: length of a scale group along K; 0 for one scale per column.
        unit: see above.
        bias: what the unsigned codes of a symmetric format exceed the signed ones by.
        twos_complement: whether they are stored in two's complement; ``bias`` is the weight of the sign bit then.
        levels: what codes stand for, float32, where no packed array ``table`` says so.
    """

    layout: BitLayout
    source: np.ndarray
    group: int
    unit: int = 1
    bias: int = 0
    twos_complement: bool = False
    levels: np.ndarray | None = None


class LinearKernel(ABC):
    """A family of kernels for quantized linear operators.

    The PrimFunc from `build` takes, in this order, float32 unless said:

    * activation ``int8/token`` or ``int8/tensor``: ``codes (M, K)`` **uint8 = signed code + 128** (1 to 255 of a token,
      whose grid is symmetric, 0 to 255 of a tensor), then ``scale (M,)``
      (for ``int8/tensor`` every row holds the same value; a zero point other than 0 is folded into the bias by the
      caller). Activation ``none``: ``x (M, K)``.
    * the packed weight arrays in the order `pack` returns them;
    * ``bias (N,)`` if the epilogue has one; ``residual (M, N)`` if it has one; ``limits (3,)`` if it stores codes: the step
      of the quantizer, the lowest and the highest code;
    * the output ``(M, N)``.

    Attributes:
        name: of the family.
        stores_codes: whether it can store codes; `select` refuses it for operators that want them otherwise.
    """

    name: str
    stores_codes = False

    @abstractmethod
    def supports(self, problem: LinearProblem, target: Target) -> Support:
        """Whether and why not."""

    @abstractmethod
    def configs(self, problem: LinearProblem, target: Target) -> list[dict[str, Any]]:
        """The config space; the first entry is the default when nothing is tuned. JSON-serialisable."""

    @abstractmethod
    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        """Bring codes, scales and zero points into the kernel's layout. Names are stable; order is the call's order."""

    @abstractmethod
    def build(self, problem: LinearProblem, config: dict[str, Any], target: Target, name: str) -> Any:
        """Return the scheduled ``tirx.PrimFunc`` with global symbol ``name``."""

    @abstractmethod
    def cost(self, problem: LinearProblem, config: dict[str, Any], target: Target, m: int) -> float:
        """Estimated seconds for ``m`` rows."""

    def stored(self, problem: LinearProblem, config: dict[str, Any]) -> StoredCodes | None:
        """Where `pack` puts the codes; None if they cannot be read back as integers."""
        return None

    def reference(
        self,
        problem: LinearProblem,
        x: np.ndarray,
        scale: np.ndarray | None,
        weight: Quantized,
        bias: np.ndarray | None = None,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        """What the kernel computes, in float64 numpy: ``x`` as `build` takes it, weights as the format stores them."""
        w = problem.weight.decode(weight).astype(np.float64)
        a = x.astype(np.float64)
        if problem.activation.bits:
            assert scale is not None
            a = (a - 128.0) * scale.astype(np.float64).reshape(-1, 1)
        y = a @ w
        if bias is not None:
            y = y + bias
        y = ACTIVATIONS[problem.epilogue.activation](y)
        return y + residual if residual is not None else y


def _erf(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return erf(x)


ACTIVATIONS: dict[str, Any] = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
