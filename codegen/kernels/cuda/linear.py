"""What the families of quantized linear operators on CUDA share: which problems they take, and how weights are packed.

All families read the same packed arrays (see `layout`), so that a layer keeps one copy of its weights for any number of
rows.

The PrimFuncs take, all on the device: ``x (M, Kx)`` fp16, bf16 or int8, ``Kx`` the next multiple of 16 bytes after K and
zero in between; ``scale (M,)`` float32 if x is int8; the arrays of `CudaLinear.pack`; ``bias (N,)`` float32 and
``residual (M, N)`` in the type of the output if the epilogue has them; ``partial`` float32 and ``arrived`` int32 scratch of
`CudaLinear.scratch`, the second zero (it is zero again afterwards); the output ``(M, N)`` in ``config["out"]``.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, Support
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE, FragmentLayout, pack_meta, split_scales, unsigned
from qcompile.formats import IntFormat, Quantized
from qcompile.targets.target import Target


@dataclass(frozen=True)
class LinearShape:
    """What is static about a kernel and follows from the problem and the types alone.

    Attributes:
        k, n, weight: of the problem.
        dtype, out: of x and of the result.
    """

    k: int
    n: int
    weight: IntFormat
    dtype: str
    out: str

    @property
    def integer(self) -> bool:
        """Whether x is int8."""
        return self.dtype == "int8"

    @property
    def stored_bits(self) -> int:
        """Of a code: 3-bit codes take 4 bits where x is int8."""
        return 4 if self.integer and self.weight.bits == 3 else self.weight.bits

    @property
    def layout(self) -> FragmentLayout:
        """Of the packed codes."""
        return _layout(self.stored_bits, self.integer)

    @property
    def x_width(self) -> int:
        """Elements of a row of x, padding included."""
        per = 16 if self.integer else 8
        return -(-self.k // per) * per

    @property
    def chunks(self) -> int:
        """16-byte chunks of a row of x in a stage of `BLOCK` positions."""
        return 8 if self.integer else 16

    @property
    def tiles(self) -> int:
        """Channel tiles."""
        return -(-self.n // TILE)

    @property
    def blocks(self) -> int:
        """Stages along K."""
        return -(-self.k // BLOCK)

    @property
    def groups(self) -> int:
        """Scale groups along K with metadata; 0 if scales are per channel."""
        return -(-self.k // self.weight.group) if self.weight.group else 0

    @property
    def chunk(self) -> int:
        """Positions of a stage that share a scale."""
        return min(self.weight.group or BLOCK, BLOCK)

    @property
    def meta_bytes(self) -> int:
        """Scale and zero point of one group for the two channels of a lane; 0 if there is neither."""
        return (4 if self.weight.group else 0) + (0 if self.weight.symmetric else 4)

    @property
    def meta_groups(self) -> int:
        """Rows of the metadata array along K."""
        return max(self.groups, 1)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one channel tile in a stage."""
        return sum(p.block_bytes for p in self.layout.planes)


@functools.cache
def _layout(bits: int, integer: bool) -> FragmentLayout:
    return FragmentLayout(bits, integer)


class CudaLinear(LinearKernel):
    """Base of the families.

    Attributes:
        bits: of weights. dtypes: of x.
    """

    bits: ClassVar[tuple[int, ...]]
    dtypes: ClassVar[tuple[str, ...]]

    @property
    def integer(self) -> bool:
        """Whether x is int8."""
        return "int8" in self.dtypes

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        fmt = problem.weight
        if target.kind != "cuda":
            return Support(False, f"{self.name} needs a CUDA target, not {target.kind}")
        if not isinstance(fmt, IntFormat) or fmt.bits not in self.bits:
            return Support(False, f"{self.name} takes integer weights of {self.bits} bits, not {fmt}")
        if fmt.group and (fmt.group % 32 or (BLOCK % fmt.group and fmt.group % BLOCK)):
            return Support(False, f"{self.name} takes groups of 32, 64 or multiples of 128 along K, not {fmt.group}")
        if (problem.k + BLOCK) * (problem.n + TILE) * fmt.bits // 8 >= 1 << 31:
            return Support(False, f"{self.name} addresses at most 2 GiB of weights")
        if self.integer:
            if not 2 <= problem.activation.bits <= 8:
                return Support(
                    False, f"{self.name} takes integer activations of up to 8 bits, not {problem.activation}"
                )
            if fmt.bits == 8 and not fmt.symmetric:
                return Support(False, f"{self.name} takes symmetric weights of 8 bits, not {fmt}")
        elif problem.activation.bits:
            return Support(False, f"{self.name} takes float activations, not {problem.activation}")
        return self._needs(target)

    def _needs(self, target: Target) -> Support:
        """Instructions a family asks for."""
        return Support(True)

    @abstractmethod
    def shape(self, problem: LinearProblem, config: dict[str, Any]) -> Any:
        """The kernel a config stands for, a `LinearShape`."""

    @abstractmethod
    def fits(self, shape: Any, target: Any) -> bool:
        """Whether the chip has the shared memory and registers, and the problem is large enough for the division."""

    @abstractmethod
    def scratch(self, problem: LinearProblem, config: dict[str, Any], m: int) -> tuple[int, int]:
        """Elements of ``partial`` and ``arrived`` a call with ``m`` rows needs; at least 1."""

    def pack(self, problem: LinearProblem, config: dict[str, Any], weight: Quantized) -> dict[str, np.ndarray]:
        """``codes``, ``high`` (3 bits only), ``meta`` (groups or zero points), ``column``."""
        s = LinearShape(problem.k, problem.n, problem.weight, config["dtype"], config["out"])
        fmt = s.weight
        codes = weight.codes if s.integer else unsigned(fmt, weight)
        packed = dict(zip(("codes", "high"), s.layout.pack(codes)))
        scale = np.asarray(weight.scale, np.float32)
        if fmt.group:
            stored, column = split_scales(scale)
        else:
            stored, column = None, scale[0]
        if s.meta_bytes:
            zero = None if fmt.symmetric else weight.zero_point
            packed["meta"] = pack_meta(stored, zero, s.meta_groups, s.n, s.dtype)
        if s.integer and fmt.symmetric:
            column = column / np.float32(1 << 8 - s.stored_bits)
        packed["column"] = column.astype(np.float32)
        return packed
