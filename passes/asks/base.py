"""What an ask is, and how a list of them is applied to a model.

An ask looks at one space at a time (its group, its readers, statistics of their activations, their weights) and puts
what it wants into an element; the engine folds the element. It never sees a module or a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.errors import CalibrationError
from qcompile.passes.spaces import Element, Reader, Space, Spaces, fold

Stats = Mapping[str, np.ndarray]
"""Per activation name, the largest magnitude of each channel over the calibration data, ``(channels,)``."""


@dataclass
class Context:
    """What an ask may look at.

    Attributes:
        spaces: the analysis.
        stats: per-channel absolute maxima of activations, by value name.
        quantized: names of the weights that will be quantized; None for all.
    """

    spaces: Spaces
    stats: Stats
    quantized: Collection[str] | None = None
    _readers: dict[int, list[Reader]] | None = None

    def readers(self, space: Space) -> list[Reader]:
        """Linear operators with a quantized weight that sum over channels of the space."""
        if self._readers is None:
            self._readers = self.spaces.all_readers()
        found = self._readers.get(space.index, [])
        return [r for r in found if self.quantized is None or r.weight in self.quantized]

    def activation_range(self, space: Space) -> np.ndarray | None:
        """Largest magnitude per channel of the space over all readers' inputs; None if there are no statistics."""
        result = np.zeros(space.size)
        seen = False
        for reader in self.readers(space):
            stat = self.stats.get(reader.activation)
            if stat is None:
                continue
            inside = reader.channels >= 0
            np.maximum.at(result, reader.channels[inside], np.asarray(stat, np.float64)[inside])
            seen = True
        return result if seen else None

    def weight_range(self, space: Space) -> np.ndarray:
        """Largest magnitude per channel of the space over all readers' weights."""
        result = np.zeros(space.size)
        for reader in self.readers(space):
            rows = self.weight_rows(reader)
            inside = reader.channels >= 0
            np.maximum.at(result, reader.channels[inside], np.abs(rows[inside]).max(1))
        return result

    def weight_rows(self, reader: Reader) -> np.ndarray:
        """The reader's weight, float64, ``(channels read, everything else)``."""
        tensor = self.spaces.model.graph.initializers[reader.weight].const_value
        assert tensor is not None
        array = tensor.numpy().astype(np.float64)
        return np.moveaxis(array, reader.axis, 0).reshape(array.shape[reader.axis], -1)


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


class Ask(ABC):
    """A method's wish. Subclasses are dataclasses of its options."""

    @property
    def name(self) -> str:
        """Short name for reports."""
        return type(self).__name__.lower()

    @abstractmethod
    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Add what is wanted on ``space`` to ``element`` and say so in a few words; None if the ask does not concern it.

        Raises:
            Refusal: it would, but cannot; the reason goes to the report.
        """


class Refusal(Exception):
    """An ask would like to act on a space and cannot; the message says why."""


def apply_asks(
    model: ir.Model | None,
    spaces: Spaces,
    asks: Sequence[Ask],
    stats: Stats | Callable[[ir.Model], Stats] | None = None,
    quantized: Collection[str] | None = None,
) -> tuple[ir.Model, Report]:
    """Apply ``asks`` one after another.

    Args:
        model: a model with the graph of ``spaces.model``; None for that model itself.
        spaces: the analysis.
        asks: in order; each sees the result of the ones before.
        stats: activation ranges, or a function that measures them on a model (called again after each ask that
            changed activations).
        quantized: names of the weights that will be quantized; None for all.

    Returns:
        The folded model (weights are computed when read) and what was done.

    Raises:
        CalibrationError: an ask after the first needs statistics that the earlier ones changed.
    """
    report = Report()
    current = spaces if model is None or model is spaces.model else spaces.rebase(model)
    fresh = True
    for ask in asks:
        if not fresh and not callable(stats):
            raise CalibrationError(
                f"{ask.name} needs activation ranges of the model as changed by the asks before it; "
                "give a function that measures them"
            )
        measured = stats(current.model) if callable(stats) else (stats or {})
        context = Context(current, measured, quantized)
        element = current.identity()
        done = False
        for space in current:
            try:
                text = ask.propose(space, context, element)
            except Refusal as refusal:
                report.entries.append(Entry(ask.name, space.index, False, str(refusal)))
                continue
            if text is not None:
                report.entries.append(Entry(ask.name, space.index, True, text))
                done = True
        if done:
            current = current.rebase(fold(current, element))
            fresh = False
    return current.model, report
