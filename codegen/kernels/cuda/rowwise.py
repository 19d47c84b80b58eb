"""Row kernels: normalisation, activation, gated product, Walsh-Hadamard rotation or Kronecker product, and activation quantizer in one
pass.

    n = (x - mean(x)) / sqrt(var(x) + epsilon) * gamma + beta     if ``norm`` is "layer"
        x / sqrt(mean(x^2) + epsilon) * gamma                     if ``norm`` is "rms"
    a = activation(n), or activation(x[:D]) * x[D:]               the latter if ``gated``
    a = a * factor                                                if ``factor``
    y = a @ blockdiag(H, ..., H)                                  orthonormal Walsh-Hadamard blocks, if ``hadamard``
        a @ blockdiag(L (x) R, ..., L (x) R)                      if ``kronecker``
    codes = clip(round_half_even(y / scale))                      if ``quantize``

A block computes one row at a time; its values stay in registers, 4 or 8 neighbours to a thread, so that memory is read once
and written once. Rows of whole vectors of 256 are rotated by tensor cores (`rotation`): a block goes on to further rows, several
share a row where rows are few, and codes are rounded products with the inverse of the step. Kronecker products (`kronecker`) are computed
likewise, by one block. In others a Hadamard block of order
``core 2^p`` (see `qcompile.formats.hadamard`) is applied to what a thread holds in registers, to the rest in shared memory:
passes of up to 32 points for the power of two, one for the core. Sums are float32; the quantizer divides, so that codes of rows
that are not rotated are those of ``QuantizePerToken`` bit for bit.

Sources: Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019);
Shazeer, "GLU Variants Improve Transformer" (2020); Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard
transform" (1976).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.codegen.kernels.base import ACTIVATIONS
from qcompile.codegen.kernels.cuda import build
from qcompile.codegen.kernels.cuda.kronecker import (
    KroneckerConfig,
    KroneckerRows,
    kronecker_configs,
    kronecker_rows,
    refusal,
)
from qcompile.codegen.kernels.cuda.rotation import VECTOR, RotationConfig, WarpRotation, rotation_configs, warp_rotation
from qcompile.errors import TargetError
from qcompile.formats.hadamard import factors, hadamard_matrix
from qcompile.targets.cuda import CudaTarget


@dataclass(frozen=True)
class SpreadConfig:
    """Rows that are not transformed, a block of up to 1024 threads to each, or several that share it: for few rows."""

    blocks: int = 1


MOST_COLUMNS = 1024 * 32
"""A row is held by one block."""

SPREAD_WIDTH = 2048
"""From this width on few rows are spread over more threads."""

SHARED_WIDTH = 4096
"""From this width on, and over several multiprocessors, if something of all the row is needed."""


@dataclass(frozen=True)
class CudaRowwise:
    """A kernel over the rows of ``x``.

    Parameters of the PrimFunc: ``x (M, D)``, ``(M, 2 D)`` if `gated`, in `dtype`; ``gamma (D,)``, ``beta (D,)``, ``factor (D,)``
    float32 where there are any; ``left``, ``right`` and ``gain`` of `KroneckerRows.pack` if `kronecker` is given; ``static_scale
    (1,)`` float32; then the outputs: ``y (M, D)`` in `out` if that is given, before factor and rotation; ``codes (M, D)`` int8
    and ``scale (M,)`` float32 if `quantize` is. M is known at run time.

    Attributes:
        width: D.
        norm: ``""``, ``"layer"`` or ``"rms"``, with `gamma` and `beta`.
        activation: a key of `ACTIVATIONS`. gated: of the first half of the row, times the second.
        factor: of each channel, before rotation and quantizer.
        hadamard: order of the blocks that rotate the row before it is quantized, a divisor of the width, or 0.
        kronecker: rows of the two matrices whose Kronecker product multiplies blocks of the row there, or zeros.
        quantize: ``""``, ``"token"`` (scale = clip max|y| / (2^(bits-1) - 1), or 1 for a zero row) or ``"tensor"``.
        zero_point: of the static quantizer, in signed codes.
        dtype, out: of x and y: ``float32``, ``float16`` or ``bfloat16``; ``out`` may be ``""``.
        config: how tensor cores transform the row; chosen by width and order if it is None.
    """

    width: int
    norm: str = ""
    gamma: bool = False
    beta: bool = False
    epsilon: float = 1e-5
    activation: str = ""
    gated: bool = False
    factor: bool = False
    hadamard: int = 0
    kronecker: tuple[int, int] = (0, 0)
    quantize: str = ""
    bits: int = 8
    clip: float = 1.0
    zero_point: int = 0
    dtype: str = "float32"
    out: str = ""
    config: RotationConfig | KroneckerConfig | SpreadConfig | None = None

    def __post_init__(self) -> None:
        if self.hadamard and self.width % self.hadamard:
            raise TargetError(f"Hadamard blocks of {self.hadamard} do not divide rows of {self.width}")
        if self.width > MOST_COLUMNS:
            raise TargetError(f"CUDA row kernels take up to {MOST_COLUMNS} columns, not {self.width}")
        if not (self.out or self.quantize):
            raise TargetError("a row kernel without output")
        if any(self.kronecker) and (self.hadamard or not self.quantize):
            raise TargetError("a Kronecker product comes before a quantizer, and there is no other rotation")
        if any(self.kronecker) and self.mixed is None:
            raise TargetError(f"rows of {self.width} are not multiplied by {self.kronecker} in one kernel")
        if self.spread and self.hadamard:
            raise TargetError("rows that are rotated by butterflies are not spread over more threads")
        if self.config is not None and self.transform is None and not self.spread:
            raise TargetError(f"rows of {self.width} are not rotated in blocks of {self.hadamard} by {self.config}")
        if isinstance(self.config, RotationConfig) and self.config.blocks > 1 and self.config.twice:
            raise TargetError("blocks that share a row keep the third product of its rotation")
        if self.rotation and self.rotation.gather > 1 and not self.direct:
            raise TargetError("only rows that are rotated as they are loaded are gathered")

    @functools.cached_property
    def rotation(self) -> WarpRotation | None:
        """How tensor cores rotate the row, if they do."""
        if not self.quantize or isinstance(self.config, KroneckerConfig | SpreadConfig):
            return None
        return warp_rotation(self.width, self.hadamard, self.config)

    @functools.cached_property
    def mixed(self) -> KroneckerRows | None:
        """How they multiply it by a Kronecker product, if they do."""
        if not any(self.kronecker) or isinstance(self.config, RotationConfig | SpreadConfig):
            return None
        return kronecker_rows(self.width, self.kronecker, self.config)

    @property
    def spread(self) -> bool:
        """See `SpreadConfig`."""
        return isinstance(self.config, SpreadConfig)

    @property
    def transform(self) -> WarpRotation | KroneckerRows | None:
        """Either."""
        return self.rotation or self.mixed

    @property
    def direct(self) -> bool:
        """Whether tensor cores take elements as they are loaded."""
        plain = not (self.norm or self.activation or self.gated or self.factor or self.out)
        return self.dtype == "float16" and plain and self.vector > 1

    @property
    def ahead(self) -> bool:
        """Whether a block loads the next row while it computes one."""
        return self.direct and self.transform is not None and self.transform.config.ahead

    @property
    def vector(self) -> int:
        """Neighbouring elements of a thread."""
        if self.rotation:
            return 8
        if self.mixed:
            return self.mixed.vector
        if self.spread and self.width % 8 == 0:
            return 8
        return 4 if self.width % 4 == 0 else 1

    @property
    def threads(self) -> int:
        """Of a block: a power of two; 16 elements each where that fills a warp, 32 of wide rows, so that several blocks fit
        a multiprocessor."""
        if self.transform:
            return self.transform.threads
        each = self.vector * self.shares if self.spread else 32 if self.width > 4096 else 16 if self.width > 512 else 4
        wanted = max(1, -(-self.width // each))
        return min(1024, max(32, 1 << (wanted - 1).bit_length()))

    @property
    def chunks(self) -> int:
        """Vectors of a thread."""
        if self.rotation:
            return self.rotation.rounds * self.rotation.held
        shares = self.shares if self.spread else 1  # transforms take the whole row
        return -(-self.width // (self.threads * self.vector * shares))

    @property
    def shares(self) -> int:
        """Blocks that share a row."""
        if self.mixed:
            return self.mixed.config.blocks
        if isinstance(self.config, SpreadConfig):
            return self.config.blocks
        return self.rotation.shares if self.rotation else 1

    @property
    def staged(self) -> bool:
        """Whether warps find what is reduced of a block before blocks tell each other."""
        return self.rotation.config.staged if self.rotation else self.shares > 1

    @property
    def told(self) -> int:
        """Words that a block receives for one reduction."""
        return self.shares * (1 if self.staged else self.threads // 32)

    @property
    def slots(self) -> int:
        """Words of shared memory for one reduction: a warp each, of all blocks of a row."""
        return max(32, self.threads // 32 * self.shares)

    @property
    def barriers(self) -> int:
        """The mbarriers of a block that shares rows with others: one for what is rotated, two per reduction, for rows in turn: another
        block may begin the next one while a word of this one is under way."""
        return 1 + 2 * self.common if self.shares > 1 else 0

    @property
    def common(self) -> int:
        """Reductions, the last ones, over what all blocks of a row hold: of a row that each block holds, that of its results."""
        return 1 if self.mixed else self.reductions

    @property
    def reductions(self) -> int:
        """Over a row."""
        return {"": 0, "rms": 1, "layer": 2}[self.norm] + (self.quantize == "token" or self.transform is not None)

    @property
    def scratch_at(self) -> int:
        """Where in shared memory the scratch of reductions begins, after the mbarriers."""
        return 2 * (self.barriers + self.barriers % 2)

    @property
    def row_at(self) -> int:
        """Where the row begins: reductions have scratch of their own, twice if a block takes several rows."""
        return self.scratch_at + self.slots * self.reductions * (2 if self.transform else 1)

    @property
    def shared_bytes(self) -> int:
        """Scratch of the reductions, and the row if it is rotated through shared memory."""
        if self.rotation:
            row = self.rotation.row_words
        elif self.mixed:
            row = self.mixed.words
        else:
            row = padded_words(self.width) if self.hadamard else 0
        return 4 * (self.row_at + row)

    @property
    def resident(self) -> int:
        """Blocks that are to fit a multiprocessor."""
        return self.transform.config.resident if self.transform else 1

    def place(self, chunk: int, thread: Any, rank: Any = 0) -> tuple[Any, list[Any]]:
        """First column of a thread's vector, and what must hold for it to be inside the row. ``rank`` is that of the block among
        those that share the row."""
        if w := self.rotation:
            turn, c = divmod(chunk, w.held)
            within = turn * w.config.warps + thread // 32
            task = rank * w.share + within if w.config.blocks > 1 else within
            conditions = [] if (turn + 1) * w.config.warps <= w.share else [within < w.share]
            conditions += [] if w.config.blocks * w.share == w.tasks else [task < w.tasks]
            return (task * w.held + c) * VECTOR + thread % 32 * 8, conditions
        shares = self.shares if self.spread else 1
        at = (((chunk * shares + rank) if shares > 1 else chunk) * self.threads + thread) * self.vector
        inside = (chunk + 1) * shares * self.threads * self.vector <= self.width
        return at, [] if inside else [at < self.width]

    def variants(self, target: CudaTarget) -> list[tuple[int, CudaRowwise]]:
        """Kernels for up to so many rows, in this order; the last one takes any number."""
        if self.config is not None:
            return [(0, self)]
        if self.transform is None:
            few = self.width >= SPREAD_WIDTH and not self.hadamard and bool(self.quantize or self.norm)
            shared = target.has("cluster") and self.width >= SHARED_WIDTH and self.reductions
            most = 8 if self.width >= 2 * SHARED_WIDTH else 4
            rows = [(16, most), (target.multiprocessors // 2, 2)] if shared else []
            rows.append((target.multiprocessors, 1))
            return [*((n, replace(self, config=SpreadConfig(blocks))) for n, blocks in rows if few), (0, self)]
        if self.mixed:
            if reason := refusal(self.width, self.kronecker, target):
                raise TargetError(reason)
            mixing = kronecker_configs(self.width, self.kronecker, target, self.direct)
            return [(rows, replace(self, config=config)) for rows, config in mixing]
        chosen = rotation_configs(self.width, self.hadamard, target, self.direct)
        return [(rows, replace(self, config=config)) for rows, config in chosen]

    def build(self, target: Any, name: str) -> Any:
        """The PrimFunc.

        Raises:
            TargetError: the row does not fit the chip's shared memory, or blocks share it and the chip has no clusters.
        """
        if self.shares > 1 and not target.has("cluster"):
            raise TargetError(f"{target} has no clusters of blocks to share rows of {self.width}")
        if self.shared_bytes > target.shared:
            raise TargetError(f"{target.cpu} has no room for rotating rows of {self.width}")
        from qcompile.codegen.kernels.cuda.rowwise_code import emit

        return emit(self, name, target)

    def reference(self, x: np.ndarray, *vectors: np.ndarray) -> dict[str, np.ndarray]:
        """``y``, ``codes``, ``scale`` in numpy: float64, the quantizer in float32. The matrices of a Kronecker product as they are, not packed."""
        given = list(vectors)
        a = x.astype(np.float64)
        if self.norm == "layer":
            a = a - a.mean(1, keepdims=True)
        if self.norm:
            a = a / np.sqrt((a * a).mean(1, keepdims=True) + self.epsilon)
            a = a * (given.pop(0) if self.gamma else 1.0) + (given.pop(0) if self.beta else 0.0)
        d = self.width
        a = ACTIVATIONS[self.activation](a[:, :d]) * (a[:, d:] if self.gated else 1.0)
        result = {"y": a}
        if self.factor:
            a = a * given.pop(0)
        if any(self.kronecker):
            left, right = given.pop(0), given.pop(0)
            blocks = a.reshape(len(a), -1, *self.kronecker)
            a = (left.T.astype(np.float64) @ blocks @ right).reshape(a.shape)
        if self.hadamard:
            few = 1 << factors(self.hadamard)[1] // 2  # the matrix is the Kronecker product of two
            blocks = a.reshape(len(a), -1, self.hadamard // few, few)
            left, right = hadamard_matrix(self.hadamard // few), hadamard_matrix(few)
            a = (left.T @ blocks @ right).reshape(a.shape)
        top = (1 << self.bits - 1) - 1
        b = a.astype(np.float32)
        if self.quantize == "token":
            scale = np.abs(b).max(1) * np.float32(self.clip) / np.float32(top)
            scale = np.where(scale == 0, np.float32(1), scale)
        elif self.quantize == "tensor":
            scale = np.full(len(b), given.pop(0)[0], np.float32)
        if self.quantize:
            low, zero = (-top, 0) if self.quantize == "token" else (-top - 1, self.zero_point)
            result |= {"scale": scale, "real": b / scale[:, None]}
            result["codes"] = np.clip(np.rint(result["real"]) + zero, low, top).astype(np.int8)
        return result


def source(kernels: Mapping[str, CudaRowwise], target: CudaTarget) -> Path:
    """One cached CUDA source with kernels by name. A name with kernels for several numbers of rows is a function that picks one."""
    built, tail = {}, ""
    for name, kernel in kernels.items():
        variants = kernel.variants(target)
        if len(variants) == 1:
            built[name] = variants[0][1]
            continue
        parts = [(rows, f"{name}_{i}") for i, (rows, _) in enumerate(variants)]
        built |= {part: variant for (_, part), (_, variant) in zip(parts, variants)}
        tail += build.dispatch(name, parts)
    described = {name: repr(kernel) for name, kernel in built.items()} | ({"names": list(kernels)} if tail else {})
    make = lambda: {name: kernel.build(target, name) for name, kernel in built.items()}  # noqa: E731
    resident = {name: kernel.resident for name, kernel in built.items() if kernel.resident > 1}
    clusters = {name: kernel.shares for name, kernel in built.items() if kernel.shares > 1}
    return build.source({"row kernels": described}, make, target, tail, resident=resident, clusters=clusters)


def padded_words(words: int) -> int:
    """Words of shared memory a row takes: one is left out after 32 against bank conflicts."""
    return words + words // 32 + 1
