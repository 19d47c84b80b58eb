"""What the families of quantized linear operators on CUDA share: which problems they take, and how weights are packed.

All families read the same packed arrays (see `layout`), so that a layer keeps one copy of its weights for any number of
rows.

The PrimFuncs take, all on the device: ``x (M, Kx)`` fp16, bf16, int8 or e4m3, ``Kx`` the next multiple of 16 bytes after K
and zero in between; ``scale (M,)`` float32 if x has 8 bits; the arrays of `CudaLinear.pack`; ``bias (N,)`` float32 and
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
from qcompile.codegen.kernels.cuda.layout import (
    BLOCK,
    TILE,
    FragmentLayout,
    pack_meta,
    split_scales,
    table_words,
    unsigned,
)
from qcompile.formats import ActivationFormat, Codebook, DualInt4, Format, IntFormat, Quantized
from qcompile.formats.floats import minifloat_table
from qcompile.formats.levels import LevelFormat
from qcompile.targets.target import Target

FLOAT8 = "float8_e4m3fn"
"""Type of e4m3 activations."""


@dataclass(frozen=True)
class Float8Activation(ActivationFormat):
    """``e4m3/token``: e4m3 numbers with a scale per row that makes the largest of it 448."""

    bits: int = 8

    def __str__(self) -> str:
        return "e4m3/token"

    def round(self, rows: np.ndarray, scale: float | None = None, clip: float = 1.0) -> np.ndarray:
        """See `ActivationFormat.round`."""
        import ml_dtypes

        rows = np.asarray(rows, np.float32)
        step = np.abs(rows).max(-1, keepdims=True) * np.float32(clip) / np.float32(448)
        step = np.where(step == 0, np.float32(1), step)
        bounded = np.clip(rows / step, -448, 448)
        return bounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * step


def activation_type(activation: ActivationFormat, floats: str) -> str:
    """Type of x: ``floats`` if activations are not quantized."""
    if isinstance(activation, Float8Activation):
        return FLOAT8
    return "int8" if activation.bits else floats


@dataclass(frozen=True)
class LinearShape:
    """What is static about a kernel and follows from the problem and the types alone.

    Attributes:
        k, n, weight: of the problem.
        dtype, out: of x and of the result.
    """

    k: int
    n: int
    weight: Format
    dtype: str
    out: str

    @property
    def integer(self) -> bool:
        """Whether x is int8."""
        return self.dtype == "int8"

    @property
    def narrow(self) -> bool:
        """Whether x has 8 bits, and a scale per row."""
        return self.dtype in ("int8", FLOAT8)

    @property
    def group(self) -> int:
        """Positions of K that share metadata; 0 if there are no groups."""
        return self.weight.group

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return not isinstance(self.weight, IntFormat) or self.weight.symmetric

    @property
    def levels(self) -> bool:
        """Whether operands are looked up in a table."""
        if isinstance(self.weight, IntFormat):
            return self.dtype == FLOAT8
        return isinstance(self.weight, LevelFormat | Codebook) and self.weight.bits <= 4

    @property
    def float8(self) -> bool:
        """Whether codes are e4m3 numbers."""
        return isinstance(self.weight, LevelFormat) and self.weight.bits == 8

    @property
    def dual(self) -> bool:
        """Whether integers of groups multiply out to int8 weights."""
        return isinstance(self.weight, DualInt4)

    @property
    def scaled(self) -> bool:
        """Whether there are scales of groups."""
        return bool(self.group) and not self.dual

    @property
    def stored_bits(self) -> int:
        """Of a code: table indices, and 3-bit codes where x is int8, take 4 bits."""
        return 4 if self.levels or (self.integer and self.weight.bits == 3) else self.weight.bits

    @property
    def layout(self) -> FragmentLayout:
        """Of the packed codes."""
        return _layout(self.stored_bits, self.narrow, self.levels and not self.narrow)

    @property
    def table_words(self) -> int:
        """Words of the table of levels; 0 if there is none."""
        return (4 if self.narrow else 8) if self.levels else 0

    @property
    def x_width(self) -> int:
        """Elements of a row of x, padding included."""
        per = 16 if self.narrow else 8
        return -(-self.k // per) * per

    @property
    def chunks(self) -> int:
        """16-byte chunks of a row of x in a stage of `BLOCK` positions."""
        return 8 if self.narrow else 16

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
        return -(-self.k // self.group) if self.group else 0

    @property
    def chunk(self) -> int:
        """Positions of a stage that share a scale."""
        return min(self.group or BLOCK, BLOCK)

    @property
    def meta_bytes(self) -> int:
        """Scale (or integer) and zero point of one group for the two channels of a lane; 0 if there is neither."""
        return (4 if self.group else 0) + (0 if self.symmetric else 4)

    @property
    def meta_groups(self) -> int:
        """Rows of the metadata array along K."""
        return max(self.groups, 1)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one channel tile in a stage."""
        return sum(p.block_bytes for p in self.layout.planes)


@functools.cache
def _layout(bits: int, integer: bool, pairs: bool) -> FragmentLayout:
    return FragmentLayout(bits, integer, pairs)


class CudaLinear(LinearKernel):
    """Base of the families.

    Attributes:
        bits: of weights. dtypes: of x.
        packing: families with the same one read the same arrays; the kernels of a layer all do.
    """

    bits: ClassVar[tuple[int, ...]]
    dtypes: ClassVar[tuple[str, ...]]
    packing: ClassVar[str] = "fragments"

    def supports(self, problem: LinearProblem, target: Target) -> Support:
        fmt = problem.weight
        if target.kind != "cuda":
            return Support(False, f"{self.name} needs a CUDA target, not {target.kind}")
        if activation_type(problem.activation, "float16") not in self.dtypes:
            wanted = {"int8": "integer", FLOAT8: "e4m3"}.get(self.dtypes[0], "float")
            return Support(False, f"{self.name} takes {wanted} activations, not {problem.activation}")
        if not (support := self._takes(fmt)):
            return support
        least = 16 if "float16" in self.dtypes else 32
        if fmt.group and (fmt.group % least or (BLOCK % fmt.group and fmt.group % BLOCK)):
            sizes = ", ".join(str(g) for g in (16, 32, 64) if g >= least)
            return Support(False, f"{self.name} takes groups of {sizes} or multiples of 128 along K, not {fmt.group}")
        if (problem.k + BLOCK) * (problem.n + TILE) * fmt.bits // 8 >= 1 << 31:
            return Support(False, f"{self.name} addresses at most 2 GiB of weights")
        return self._needs(target)

    def unsound(self, shape: Any) -> str:
        """What a kernel of this shape cannot have, if so: a pipeline that does not end, or would read what is not there."""
        return ""

    def _takes(self, fmt: Format) -> Support:
        """Whether there is a dequantizer, and a reason if not."""
        integers = isinstance(fmt, IntFormat) and fmt.bits in self.bits
        symmetric = isinstance(fmt, IntFormat) and fmt.symmetric
        if self.dtypes == ("int8",):
            if isinstance(fmt, DualInt4) or (integers and (fmt.bits < 8 or symmetric)):
                return Support(True)
            bits = ", ".join(map(str, self.bits))
            what = f"integer weights of {bits} bits (symmetric ones if 8) or dual4"
        elif self.dtypes == (FLOAT8,):
            small = isinstance(fmt, LevelFormat) and _representable(fmt)
            if small or (integers and fmt.bits <= 4 and symmetric):
                return Support(True)
            what = "e4m3 weights, and those e4m3 represents: symmetric integers of up to 4 bits, e2m1"
        else:
            small = isinstance(fmt, LevelFormat | Codebook) and fmt.bits <= 4
            if integers or small or (isinstance(fmt, LevelFormat) and fmt.bits == 8 and _representable(fmt)):
                return Support(True)
            bits = ", ".join(map(str, self.bits))
            what = f"integer weights of {bits} bits, tables of up to 16 levels and e4m3"
        return Support(False, f"{self.name} takes {what}, not {fmt}")

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
        """``codes``, ``high`` (3 bits only), ``meta`` (groups or zero points), ``table`` (levels), ``column``."""
        s = LinearShape(problem.k, problem.n, problem.weight, config["dtype"], config["out"])
        fmt = s.weight
        if isinstance(fmt, IntFormat):
            codes = weight.codes if s.integer else unsigned(fmt, weight)
        else:
            codes = weight.codes.astype(np.int16) + (8 if s.dual else 0)
        packed = dict(zip(("codes", "high"), s.layout.pack(codes)))
        scale = np.asarray(weight.scale, np.float32)
        if s.scaled:
            stored, column = split_scales(scale)
        else:
            stored, column = None, scale[0]
        if s.dual:
            packed["meta"] = pack_meta(weight.aux["group_scale"], None, s.meta_groups, s.n, "integer")
        elif s.meta_bytes:
            zero = None if s.symmetric else weight.zero_point
            packed["meta"] = pack_meta(stored, zero, s.meta_groups, s.n, s.dtype)
        if s.levels:
            levels = _levels(fmt, weight)
            # Levels of at most 1, so that products with scales of at most 1 do not overflow.
            unit = np.float32(1) if s.narrow else np.ldexp(np.float32(1), np.frexp(np.abs(levels).max())[1])
            packed["table"] = table_words(levels / unit, s.dtype)
            column = column * unit
        elif s.integer and s.symmetric and not s.dual:
            column = column / np.float32(1 << 8 - s.stored_bits)
        packed["column"] = column.astype(np.float32)
        return packed


def _levels(fmt: Format, weight: Quantized) -> np.ndarray:
    """What codes stand for, float32 ``(2^bits,)``; 0 for those that are not used."""
    if isinstance(fmt, Codebook):
        return np.asarray(weight.aux["codebook"], np.float32)
    if isinstance(fmt, LevelFormat):
        return np.nan_to_num(fmt.table)
    return (np.arange(1 << fmt.bits) - (1 << fmt.bits - 1)).astype(np.float32)


def _representable(fmt: LevelFormat) -> bool:
    """Whether e4m3 holds every level: as a table of up to 16, or code by code."""
    if fmt.bits <= 4:
        return bool(np.isin(np.nan_to_num(fmt.table), minifloat_table(4, 3)).all())
    return fmt.bits == 8 and bool(np.array_equal(fmt.table, minifloat_table(4, 3), equal_nan=True))
