"""What an ask is, and how a list of them is applied to a model.

An ask looks at one space at a time (its group, its readers, statistics of their activations, their weights) and puts
what it wants into an element; the engine folds the element. It never sees a module or a name. What does not fold may
stay as an explicit operator at run time (`online.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.errors import CalibrationError
from qcompile.passes.spaces import Element, Reader, Space, Spaces, analyse, fold


class Statistics(Protocol):
    """What is known about one activation; `qcompile.calibration.ChannelStatistics` has it."""

    absmax: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    hessian: np.ndarray | None


Measure = Callable[[ir.Model, Sequence[str], bool], Mapping[str, Statistics]]
"""``(model, values, with second moments) -> statistics by value name``."""
Stats = Mapping[str, np.ndarray]
"""Only ranges: the largest magnitude of each channel, ``(channels,)``, by value name."""


@dataclass
class _Ranges:
    absmax: np.ndarray

    def __post_init__(self) -> None:
        self.minimum, self.maximum = -self.absmax, self.absmax
        self.mean, self.hessian = np.zeros_like(self.absmax), None


@dataclass
class Data:
    """Calibration data, as asks use them.

    Attributes:
        measure: computes statistics of named values of a model; None without data.
        feeds: the samples themselves, for asks that learn.
    """

    measure: Measure | None = None
    feeds: Sequence[Mapping[str, np.ndarray]] = ()

    @classmethod
    def of(cls, stats: Stats | Callable[[ir.Model], Stats] | Data | None) -> Data:
        """Accept plain ranges, or a function that measures them."""
        if stats is None or isinstance(stats, Data):
            return stats or cls()
        if callable(stats):
            return cls(lambda model, names, moments: {k: _Ranges(np.asarray(v)) for k, v in stats(model).items()})
        known: list[Any] = [None]

        def once(model: ir.Model, names: Sequence[str], moments: bool) -> Mapping[str, Statistics]:
            if known[0] not in (None, model):
                raise CalibrationError(
                    "these ranges were measured before other asks changed the activations; give a function that measures"
                )
            known[0] = model
            return {k: _Ranges(np.asarray(v)) for k, v in stats.items()}

        return cls(once)


@dataclass
class Context:
    """What an ask may look at.

    Attributes:
        spaces: the analysis of the model as it is now.
        data: calibration data.
        quantized: names of the weights that will be quantized; None for all.
        report: receives what was refused.
    """

    spaces: Spaces
    data: Data = field(default_factory=Data)
    quantized: Collection[str] | None = None
    report: Report = field(default_factory=lambda: Report())

    def __post_init__(self) -> None:
        self._readers = self.spaces.all_readers()
        self._known: dict[bool, Mapping[str, Statistics]] = {}

    @property
    def model(self) -> ir.Model:
        """The model as it is now."""
        return self.spaces.model

    def readers(self, space: Space) -> list[Reader]:
        """Linear operators with a quantized weight that sum over channels of the space."""
        found = self._readers.get(space.index, [])
        return [r for r in found if self.quantized is None or r.weight in self.quantized]

    def all_readers(self) -> list[Reader]:
        """All linear operators with a quantized weight, each once."""
        unique = {r.node: r for space in self.spaces for r in self.readers(space)}
        return list(unique.values())

    def statistics(self, moments: bool = False) -> Mapping[str, Statistics]:
        """Statistics of the inputs of all readers.

        Raises:
            Refusal: there are no calibration data.
        """
        if self.data.measure is None:
            raise Refusal("no calibration data")
        if moments not in self._known:
            names = list(dict.fromkeys(r.activation for r in self.all_readers()))
            self._known[moments] = self.data.measure(self.model, names, moments)
        return self._known[moments]

    def activation_range(self, space: Space) -> np.ndarray:
        """Largest magnitude per channel of the space over all readers' inputs.

        Raises:
            Refusal: there are no statistics of them.
        """
        result = np.zeros(space.size)
        seen = False
        for reader in self.readers(space):
            stat = self.statistics().get(reader.activation)
            if stat is not None and len(stat.absmax) == len(reader.channels):
                np.maximum.at(result, *_inside(reader, np.asarray(stat.absmax, np.float64)))
                seen = True
        if not seen:
            raise Refusal("no statistics of the activations that read it")
        return result

    def weight_range(self, space: Space) -> np.ndarray:
        """Largest magnitude per channel of the space over all readers' weights."""
        result = np.zeros(space.size)
        for reader in self.readers(space):
            np.maximum.at(result, *_inside(reader, np.abs(self.weight_rows(reader)).max(1)))
        return result

    def weight_rows(self, reader: Reader) -> np.ndarray:
        """The reader's weight, float64, ``(channels read, everything else)``."""
        tensor = self.model.graph.initializers[reader.weight].const_value
        assert tensor is not None
        array = tensor.numpy().astype(np.float64)
        return np.moveaxis(array, reader.axis, 0).reshape(array.shape[reader.axis], -1)


def _inside(reader: Reader, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mine = reader.channels >= 0
    return reader.channels[mine], values[mine]


@dataclass(frozen=True)
class Entry:
    """One line of the report: what an ask did to a space, or why it did nothing."""

    ask: str
    space: int
    done: bool
    text: str


@dataclass
class Report:
    """What was applied and what was refused, with reasons."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def applied(self) -> list[Entry]:
        """Entries that changed the model."""
        return [e for e in self.entries if e.done]

    def __str__(self) -> str:
        return "\n".join(f"{e.ask:<16} #{e.space:<4} {'' if e.done else 'not done: '}{e.text}" for e in self.entries)


class Refusal(Exception):
    """An ask would like to act on a space and cannot; the message says why."""


class Ask(ABC):
    """A method's wish. Subclasses are dataclasses of its options."""

    @property
    def name(self) -> str:
        """Short name for reports."""
        return type(self).__name__.lower()

    def apply(self, context: Context) -> Spaces:
        """Return the analysis of the changed model (or ``context.spaces`` if nothing changed).

        By default: propose on every space, fold everything at once.
        """
        spaces = context.spaces
        element = spaces.identity()
        done = False
        for space in spaces:
            try:
                text = self.propose(space, context, element)
            except Refusal as refusal:
                context.report.entries.append(Entry(self.name, space.index, False, str(refusal)))
                continue
            if text is not None:
                context.report.entries.append(Entry(self.name, space.index, True, text))
                done = True
        return spaces.rebase(fold(spaces, element)) if done else spaces

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Add what is wanted on ``space`` to ``element`` and say so in a few words; None if it is no concern.

        Raises:
            Refusal: the ask would act, but cannot; the reason goes to the report.
        """
        return None


class Rewrite(Ask):
    """An ask that also changes the graph; the result is analysed again."""

    def apply(self, context: Context) -> Spaces:
        """Rewrite a clone of the model."""
        model = context.model.clone()
        return analyse(model) if self.rewrite(model, context) else context.spaces

    @abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Change ``model`` in place without changing its function; returns whether anything was done."""


def apply_asks(
    model: ir.Model | None,
    spaces: Spaces,
    asks: Sequence[Ask],
    stats: Stats | Callable[[ir.Model], Stats] | Data | None = None,
    quantized: Collection[str] | None = None,
) -> tuple[ir.Model, Report]:
    """Apply ``asks`` one after another.

    Args:
        model: the model that was analysed; None for ``spaces.model``.
        spaces: the analysis.
        asks: in order; each sees the result of the ones before.
        stats: calibration data: ranges of activations, a function that measures them, or `Data`.
        quantized: names of the weights that will be quantized; None for all.

    Returns:
        The folded model (weights are computed when read) and what was done.

    Raises:
        CalibrationError: plain ranges were given and an ask needs those of the model as changed by earlier ones.
    """
    report, data = Report(), Data.of(stats)
    current = spaces
    for ask in asks:
        current = ask.apply(Context(current, data, quantized, report))
    return current.model, report
