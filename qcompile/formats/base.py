"""The protocol of a weight format and its short spelling.

A weight matrix is always ``(K, N)``: ``K`` input channels (the reduction axis), ``N`` output channels, as in ONNX
``MatMul``. A format maps it to integer codes and a *grid*: the scales, zero points and tables that say which real
number each code of each group stands for.

A format states four facts, and everything else (encode, decode, every solver) follows from them:

    minmax_grid   the grid that covers the weights' own range
    fit_grid      the grid with the least (weighted) rounding error
    nearest       values -> codes,  elementwise, given the grid of their rows
    values        codes -> values, likewise
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.errors import FormatError

Rows = slice | np.ndarray
"""Positions along K."""


@dataclass(frozen=True)
class Grid:
    """What codes stand for; the last two axes of every array are ``(G, N)`` unless the format says otherwise.

    Attributes:
        scale: float32, ``(G, N)``; ``G`` is the number of groups along ``K`` (1 for per-channel). May be negative.
        zero_point: integer, same shape as ``scale``, or None for symmetric formats.
        aux: further parameter arrays of formats that need them (codebooks, second-level scales ...).
    """

    scale: np.ndarray
    zero_point: np.ndarray | None = None
    aux: dict[str, np.ndarray] = field(default_factory=dict)

    def with_codes(self, codes: np.ndarray) -> Quantized:
        """Return the quantized matrix that ``codes`` ``(K, N)`` make on this grid."""
        return Quantized(codes, self.scale, self.zero_point, self.aux)

    def replace(self, group: int, part: Grid) -> Grid:
        """Write the one-group grid ``part`` into ``group``, in place, and return the grid.

        Arrays that all groups share stay as they are.
        """
        for name, array in self._arrays():
            if array.ndim > 1 and array.shape[-2] > group:
                array[..., group, :] = dict(part._arrays())[name][..., 0, :]
        return self

    def where(self, columns: np.ndarray, other: Grid) -> Grid:
        """Return a grid with the parameters of ``other`` in the ``columns`` (bool, ``(N,)``), its own elsewhere."""
        merged = {
            name: np.where(columns, dict(other._arrays())[name], array) if array.ndim > 1 else array
            for name, array in self._arrays()
        }
        return Grid(merged.pop("scale"), merged.pop("zero_point", None), merged)

    def _arrays(self) -> list[tuple[str, np.ndarray]]:
        own = [("scale", self.scale)] + ([] if self.zero_point is None else [("zero_point", self.zero_point)])
        return own + list(self.aux.items())


@dataclass(frozen=True)
class Quantized:
    """A quantized ``(K, N)`` matrix: integer ``codes`` ``(K, N)`` and the fields of their `Grid`."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    aux: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """Everything but the codes."""
        return Grid(self.scale, self.zero_point, self.aux)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """One matrix of the columns of several ``(K, n_i)`` of the same format."""

    def columns(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays, axis=-1)

    first = parts[0]
    return Quantized(
        columns([p.codes for p in parts]),
        columns([p.scale for p in parts]),
        None if first.zero_point is None else columns([p.zero_point for p in parts if p.zero_point is not None]),
        {n: columns([p.aux[n] for p in parts]) if first.aux[n].ndim > 1 else first.aux[n] for n in first.aux},
    )


def separated(whole: Quantized, count: int) -> list[Quantized]:
    """The inverse of `joined`, for ``count`` parts of the same width."""

    def columns(array: np.ndarray | None) -> list[Any]:
        return [None] * count if array is None else np.split(array, count, axis=-1)

    aux = {n: columns(a) if a.ndim > 1 else [a] * count for n, a in whole.aux.items()}
    parts = zip(columns(whole.codes), columns(whole.scale), columns(whole.zero_point))
    return [Quantized(c, s, z, {n: aux[n][i] for n in aux}) for i, (c, s, z) in enumerate(parts)]


class Format(ABC):
    """What stored codes of a weight matrix mean. Instances are hashable values; ``str(fmt)`` is the spelling."""

    bits: int
    """Bits of one code."""

    group: int
    """Weights along K that share a scale; 0 for one scale per output channel."""

    @abstractmethod
    def minmax_grid(self, weight: np.ndarray) -> Grid:
        """Return the grid that covers the range of ``weight`` (float, ``(K, N)``)."""

    @abstractmethod
    def fit_grid(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Grid:
        """Return the grid with the least ``sum(importance * (weight - rounded)**2)`` that a search finds.

        Args:
            weight: float, ``(K, N)``.
            importance: non-negative, ``(K,)`` or ``(K, N)``; all ones if None.
        """

    def fit_group(self, weight: np.ndarray, importance: np.ndarray, grid: Grid) -> Grid:
        """Return the best one-group grid for the rows of one group, ``(L, N)``.

        What groups share (second-level scales, codebooks) is taken from ``grid``, the present grid of this group as `rows`
        gives it.
        """
        return self.fit_grid(weight, importance)

    @abstractmethod
    def nearest(self, values: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the codes nearest to ``values`` ``(R, N)``; ``grid`` comes from `rows` and broadcasts to them."""

    @abstractmethod
    def values(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the real numbers that ``codes`` ``(R, N)`` stand for on a grid that comes from `rows`."""

    @abstractmethod
    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per weight of a ``(K, N)`` matrix, scales and zero points included."""

    def encode(self, weight: np.ndarray) -> Quantized:
        """Round ``weight`` (float, ``(K, N)``) to nearest on `minmax_grid`.

        Raises:
            FormatError: ``weight`` is not a matrix of finite floats.
        """
        weight = check_weight(weight, self)
        return self.quantize(weight, self.minmax_grid(weight))

    def quantize(self, weight: np.ndarray, grid: Grid) -> Quantized:
        """Round ``weight`` (float, ``(K, N)``) to nearest on a given grid."""
        return grid.with_codes(self.nearest(weight, self.rows(grid, slice(0, weight.shape[0]), weight.shape[0])))

    def decode(self, quantized: Quantized) -> np.ndarray:
        """Return the float32 ``(K, N)`` matrix that the codes stand for."""
        k = quantized.codes.shape[0]
        return self.values(quantized.codes, self.rows(quantized.grid, slice(0, k), k)).astype(np.float32, copy=False)

    def rescale(self, grid: Grid, factor: np.ndarray) -> Grid | None:
        """Return ``grid`` with all values of each group multiplied by ``factor`` ``(G, N)``, as nearly as can be stored.

        None if the format has no scale of its own per group.
        """
        return Grid((grid.scale * factor).astype(np.float32), grid.zero_point, grid.aux)

    def group_length(self, k: int) -> int:
        """Rows of one full group of a reduction axis of length ``k``."""
        return self.group or max(k, 1)

    def groups(self, k: int) -> int:
        """Number of groups along a reduction axis of length ``k``; the last one may be shorter."""
        return -(-k // self.group) if self.group else 1

    def expand(self, per_group: np.ndarray, k: int) -> np.ndarray:
        """Repeat parameters ``(..., G, N)`` to ``(..., K, N)``."""
        return np.repeat(per_group, self.group_length(k), axis=-2)[..., :k, :]

    def rows(self, grid: Grid, rows: Rows, k: int) -> Grid:
        """Return the part of ``grid`` that applies to ``rows``, broadcastable to ``(len(rows), N)``.

        Tables without a group axis (``aux`` arrays of fewer than two dimensions) are passed on as they are.
        """
        index = np.arange(*rows.indices(k)) if isinstance(rows, slice) else np.asarray(rows)
        group = index // self.group_length(k)
        if group.size and (group == group[0]).all():
            group = group[:1]

        def take(array: np.ndarray) -> np.ndarray:
            return array if array.ndim < 2 or array.shape[-2] == 1 else np.take(array, group, axis=-2)

        return Grid(
            take(grid.scale),
            None if grid.zero_point is None else take(grid.zero_point),
            {name: take(array) for name, array in grid.aux.items()},
        )

    def split(self, weight: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cut ``weight`` into zero-padded float32 ``(G, length, N)`` and importance, which is 0 on the padding.

        Importance has mean 1. A group where it is zero throughout counts every weight alike, so that it is fitted too.
        """
        k, n = weight.shape
        groups, length = self.groups(k), self.group_length(k)
        blocks = np.zeros((groups * length, n), np.float32)
        blocks[:k] = weight
        flat = np.zeros((groups * length, 1 if importance is None or importance.ndim == 1 else n))
        flat[:k] = 1 if importance is None else importance.reshape(k, -1)
        flat *= flat.size / (flat.sum() or 1)
        h = flat.reshape(groups, length, -1)
        inside = (np.arange(groups * length) < k).reshape(groups, length, 1)
        h = np.where(h.any(1, keepdims=True), h, inside)
        return blocks.reshape(groups, length, n), h.astype(np.float32)


def check_weight(weight: np.ndarray, fmt: Format) -> np.ndarray:
    """Return ``weight`` as float32.

    Raises:
        FormatError: it is not a matrix, not real, or holds NaN or infinity.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2 or not weight.size:
        raise FormatError(f"{fmt}: expected a non-empty matrix (K, N), got shape {weight.shape}")
    if not (np.issubdtype(weight.dtype, np.floating) or weight.dtype.kind in "iuV"):
        raise FormatError(f"{fmt}: expected real weights, got {weight.dtype}")
    with np.errstate(over="ignore"):
        narrow = weight.astype(np.float32, copy=False)
    if not np.isfinite(narrow).all():
        row, column = np.argwhere(~np.isfinite(narrow))[0]
        value = weight[row, column]
        raise FormatError(f"{fmt}: weight[{row}, {column}] is {value}; only finite float32 weights can be quantized")
    return narrow


def column_chunks(weight: np.ndarray, elements: int = 1 << 18) -> Iterator[slice]:
    """Yield slices of columns so that a search over one of them stays in the cache."""
    k, n = weight.shape
    step = max(1, elements // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@dataclass(frozen=True)
class FormatInfo:
    """One line of ``qcompile formats``: how a family is spelled, what it is and one instance of it."""

    spelling: str
    description: str
    example: Format


Parser = Callable[[str], Format | None]

_PARSERS: list[Parser] = []
_INFO: list[FormatInfo] = []


def register_format(*, info: FormatInfo) -> Callable[[Parser], Parser]:
    """Decorate a function that turns a spelling into a Format, or returns None if the spelling is not its own.

    ``info`` puts the family into `list_formats`.
    """

    def register(parser: Parser) -> Parser:
        _PARSERS.append(parser)
        _INFO.append(info)
        return parser

    return register


def parse_format(spelling: str) -> Format:
    """Return the format spelled ``spelling``, e.g. ``int8``, ``int4/g128``, ``int3/g64/asym``.

    Raises:
        FormatError: no registered format has this spelling.
    """
    for parser in _PARSERS:
        if (found := parser(spelling)) is not None:
            return found
    raise FormatError(f"unknown format {spelling!r}; `qcompile formats` lists the spellings")


def parse_group(spelling: str, digits: str | None) -> int:
    """Return the group size written ``digits`` (None means per channel).

    Raises:
        FormatError: the group is empty.
    """
    if digits is not None and int(digits) < 1:
        raise FormatError(f"{spelling}: a group holds at least one weight")
    return int(digits or 0)


def list_formats() -> list[FormatInfo]:
    """Return every registered family."""
    return list(_INFO)
