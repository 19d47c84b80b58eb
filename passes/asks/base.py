"""What an ask is, and how a list of them is applied to a model.

An ask looks at one space at a time (its group, its readers, statistics of their activations, their weights) and puts
what it wants into an element; the engine folds the element. It never sees a module or a name. What does not fold may
stay as an explicit operator at run time (`online.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from qcompile.errors import CalibrationError, RecipeError
from qcompile.formats import ActivationFormat, Format, parse_activation, parse_format
from qcompile.passes.graph import insert_after_producer
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
Rows = Callable[[ir.Model, Sequence[str], int], Mapping[str, np.ndarray]]
"""``(model, values, how many) -> sample rows (tokens), (rows, channels) float32, by value name``."""
Stats = Mapping[str, np.ndarray]
"""Only ranges: the largest magnitude of each channel, ``(channels,)``, by value name."""


@dataclass
class _Ranges:
    absmax: np.ndarray

    def __post_init__(self) -> None:
        self.minimum, self.maximum = -self.absmax, self.absmax
        self.mean = np.zeros_like(self.absmax)
        self.hessian: np.ndarray | None = None


@dataclass
class Data:
    """Calibration data, as asks use them.

    Attributes:
        measure: computes statistics of named values of a model; None without data.
        feeds: the samples themselves, for asks that learn.
        rows: picks sample rows of named values, for asks that search; None without data.
        stage: ``(title, steps) -> context manager`` of a function that is called after every step, maybe with a note;
            for asks that take long.
    """

    measure: Measure | None = None
    feeds: Sequence[Mapping[str, np.ndarray]] = ()
    rows: Rows | None = None
    stage: Callable[[str, int], Any] | None = None

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


@dataclass(frozen=True)
class Precision:
    """What the operands of one linear operator will be rounded to; None for the ones that stay float.

    Attributes:
        weight: of its weight.
        activation: of what it reads.
        compensated: whether the solver lets later weights absorb the rounding errors of earlier ones.
    """

    weight: Format | None
    activation: ActivationFormat | None
    compensated: bool = False

    @classmethod
    def of(cls, weight: str, activation: str) -> Precision:
        """From spellings such as ``int4/g128`` and ``int8/token``; ``none`` for float."""
        found = parse_activation(activation)
        return cls(None if weight == "none" else parse_format(weight), found if found.bits else None)


Quantized = Collection[str] | Mapping[str, Precision]
"""Names of the weights that will be quantized, with what to where that is known."""


@dataclass
class Context:
    """What an ask may look at.

    Attributes:
        spaces: the analysis of the model as it is now.
        data: calibration data.
        quantized: names of the weights that will be quantized, maybe with their formats; None for all.
        report: receives what was refused.
    """

    spaces: Spaces
    data: Data = field(default_factory=Data)
    quantized: Quantized | None = None
    report: Report = field(default_factory=lambda: Report())

    def __post_init__(self) -> None:
        self._readers = self.spaces.all_readers()
        self._known: dict[bool, Mapping[str, Statistics]] = {}
        self._rows: Mapping[str, np.ndarray] = {}

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
        """Statistics of the inputs of all readers, by the reader's activation.

        Raises:
            Refusal: there are no calibration data.
        """
        if self.data.measure is None:
            raise Refusal("no calibration data")
        if moments not in self._known:
            model, names = self._channels_last()
            found = self.data.measure(model, list(names), moments)
            self._known[moments] = {names[n]: s for n, s in found.items() if n in names}
        return self._known[moments]

    def rows(self, count: int) -> Mapping[str, np.ndarray]:
        """At least ``count`` sample rows ``(rows, channels)`` of the inputs of all readers, if the data have so many.

        Raises:
            Refusal: there are no calibration data, or only statistics of them.
        """
        if self.data.rows is None:
            raise Refusal("no calibration samples")
        if not self._rows:
            model, names = self._channels_last()
            found = self.data.rows(model, list(names), count)
            self._rows = {names[n]: r for n, r in found.items() if n in names}
        return self._rows

    def _channels_last(self) -> tuple[ir.Model, dict[str, str]]:
        """The model, and by the name of a value with channels on its last axis the activation whose channels it has.

        Inputs of convolutions are transposed for it, in a copy.
        """
        positions = {r.activation: r.position for r in self.all_readers()}
        if all(p == -1 for p in positions.values()):
            return self.model, {name: name for name in positions}
        model, names = self.model.clone(), {}
        values = {v.name: v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
        for name, position in positions.items():
            value = values[name]
            if position == -1 or value.shape is None:
                names[name] = name
                continue
            rank = len(value.shape)
            perm = [a for a in range(rank) if a != position % rank] + [position % rank]
            node = ir.node("Transpose", [value], attributes={"perm": perm}, name=f"{name}.channels_last")
            out = node.outputs[0]
            out.name, out.type, out.shape = node.name, value.type, ir.Shape([value.shape[a] for a in perm])
            insert_after_producer(value, node)
            names[out.name or ""] = name
        return model, names

    def precision(self, reader: Reader) -> Precision:
        """What the reader's operands will be rounded to; int8 both if nobody said."""
        if isinstance(self.quantized, Mapping):
            return self.quantized[reader.weight]
        return Precision.of("int8", "int8/token")

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
        """The reader's weight, float64, ``(channels read, everything else)``; of a grouped kernel, within the group."""
        tensor = self.model.graph.initializers[reader.weight].const_value
        assert tensor is not None
        array = tensor.numpy().astype(np.float64)
        count, axis = len(reader.channels), reader.axis
        if array.shape[axis] != count:
            # (out, in / groups, taps): group by group, inputs first.
            groups = count // array.shape[axis]
            array = array.reshape(groups, -1, *array.shape[1:]).swapaxes(1, 2).reshape(count, -1)
            axis = 0
        return np.moveaxis(array, axis, 0).reshape(count, -1)


def _inside(reader: Reader, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mine = reader.channels >= 0
    return reader.channels[mine], values[mine]


@dataclass(frozen=True)
class Entry:
    """One line of the report: what an ask did to a space, or why it did nothing.

    Attributes:
        ask: its name.
        space: index of the space; -1 for the whole model.
        done: whether the model changed.
        text: what was done, or the reason.
        where: the activations that lie in the space and are read by quantized operators.
    """

    ask: str
    space: int
    done: bool
    text: str
    where: str = ""


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


class Ask:
    """A method's wish. Subclasses are frozen dataclasses of its options.

    Attributes:
        name: for recipes and reports; see `register_ask`.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__.lower()

    def apply(self, context: Context) -> Spaces:
        """Return the analysis of the changed model (or ``context.spaces`` if nothing changed).

        By default: propose on every space, fold everything at once.
        """
        spaces = context.spaces
        element = spaces.identity()
        done = False
        for space in spaces:
            where = ", ".join(dict.fromkeys(r.activation for r in context.readers(space)))
            try:
                text = self.propose(space, context, element)
            except Refusal as refusal:
                context.report.entries.append(Entry(self.name, space.index, False, str(refusal), where))
                continue
            if text is not None:
                context.report.entries.append(Entry(self.name, space.index, True, text, where))
                done = True
        return spaces.rebase(fold(spaces, element)) if done else spaces

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Add what is wanted on ``space`` to ``element`` and say so in a few words; None if it is no concern.

        Raises:
            Refusal: the ask would act, but cannot; the reason goes to the report.
        """
        return None


A = TypeVar("A", bound=type[Ask])
_REGISTERED: dict[str, type[Ask]] = {}


def register_ask(name: str) -> Callable[[A], A]:
    """Make a class of asks known to recipes under ``name``; the fields of the class are the options of the step.

    Raises:
        RecipeError: the name is taken.
    """

    def register(cls: A) -> A:
        if name in _REGISTERED:
            raise RecipeError(f"a transform named {name!r} exists already")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return register


def registered_asks() -> dict[str, type[Ask]]:
    """All classes of asks that recipes know, by name."""
    return dict(sorted(_REGISTERED.items()))


class Rewrite(Ask, ABC):
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
    quantized: Quantized | None = None,
) -> tuple[ir.Model, Report]:
    """Apply ``asks`` one after another.

    Args:
        model: the model that was analysed; None for ``spaces.model``.
        spaces: the analysis.
        asks: in order; each sees the result of the ones before.
        stats: calibration data: ranges of activations, a function that measures them, or `Data`.
        quantized: names of the weights that will be quantized, maybe with their formats; None for all.

    Returns:
        The folded model (weights are computed when read) and what was done.

    Raises:
        CalibrationError: plain ranges were given and an ask needs those of the model as changed by earlier ones.
    """
    report, data = Report(), Data.of(stats)
    current = spaces
    for ask in asks:
        try:
            current = ask.apply(Context(current, data, quantized, report))
        except Refusal as refusal:
            report.entries.append(Entry(ask.name, -1, False, str(refusal)))
    return current.model, report
