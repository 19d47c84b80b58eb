"""The transforms a recipe may name, and how they meet calibration data.

A transform is an ask (`qcompile.passes.asks`): it says what it wants on a space of channels; the analysis decides where
that folds. A step of a recipe names it, by the name it was registered under or as ``file.py:Class`` or ``module:Class``.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

import qcompile.passes.learn  # noqa: F401 (registers its transforms)
from qcompile import extensions, ort
from qcompile.analysis import check, difference, random_sample
from qcompile.calibration import ChannelStatistics, Feed, collect
from qcompile.errors import ExtensionError, RecipeError
from qcompile.passes.asks import Ask, Data, Precision, apply_asks, registered_asks
from qcompile.passes.sites import LinearSite, linear_sites
from qcompile.passes.spaces import analyse
from qcompile.recipes import Recipe, Step
from qcompile.report import Report
from qcompile.solvers import get_solver


@dataclass
class TransformContext:
    """What a transform may use.

    Attributes:
        recipe: the whole recipe; formats of the readers follow from it.
        feeds: calibration samples; empty without data.
        report: receives what was refused.
        advance: called after every calibration sample that is run.
        known: statistics of the model as it came, by value name; they hold until a transform changes it.
        prove: check the analysis, and what the transforms did, on one sample in float32.
        stage: opens a line of the progress display for a transform that takes long.
    """

    recipe: Recipe
    feeds: Sequence[Feed]
    report: Report
    advance: Callable[[], None] = field(default=lambda: None)
    known: Mapping[str, ChannelStatistics] = field(default_factory=dict)
    prove: bool = False
    stage: Callable[[str, int], Any] | None = None

    def quantized_sites(self, model: ir.Model) -> list[LinearSite]:
        """Linear sites the recipe quantizes."""
        return [s for s in linear_sites(model) if self.recipe.weight_format(s.name) is not None]

    def precisions(self, model: ir.Model) -> dict[str, Precision]:
        """What the recipe rounds the operands of each site to, by the name of the weight."""
        found = {}
        for site in self.quantized_sites(model):
            activation = self.recipe.activation_format(site.name)
            found[site.weight.name or ""] = Precision(
                self.recipe.weight_format(site.name),
                activation if activation.bits else None,
                get_solver(self.recipe.solver_name(site.name)).needs_hessian,
            )
        return found

    def data(self) -> Data:
        """The calibration data, as asks use them."""
        if not self.feeds:
            return Data()
        return Data(self.statistics, self.feeds, self.rows, self.stage)

    def statistics(
        self, model: ir.Model, values: Sequence[str], moments: bool = False
    ) -> Mapping[str, ChannelStatistics]:
        """Statistics of values of ``model`` as it is now, with second moments if wanted."""
        if not moments and all(name in self.known for name in values):
            return {name: self.known[name] for name in values}
        hessian = list(values) if moments else []
        return collect(model, self.feeds, values, hessian=hessian, progress=self.advance)

    def rows(self, model: ir.Model, values: Sequence[str], count: int) -> Mapping[str, np.ndarray]:
        """Rows of values, from samples spread over the data until there are ``count`` of them."""
        session = ort.session(model, outputs=values)
        inputs = {i.name for i in session.get_inputs()}
        found: dict[str, list[np.ndarray]] = {name: [] for name in values}
        for i in np.random.default_rng(0).permutation(len(self.feeds)):
            fetch = [name for name in values if name not in inputs]
            arrays = session.run(fetch, {k: v for k, v in self.feeds[i].items() if k in inputs})
            for name, array in (*zip(fetch, arrays), *((n, self.feeds[i][n]) for n in values if n in inputs)):
                found[name].append(np.asarray(array, np.float32).reshape(-1, array.shape[-1]))
            self.advance()
            if all(sum(map(len, rows)) >= count for rows in found.values()):
                break
        return {name: np.concatenate(rows) for name, rows in found.items()}


def apply_transforms(model: ir.Model, context: TransformContext) -> ir.Model:
    """Apply the recipe's transforms in order and return the model.

    Raises:
        RecipeError: a transform or one of its options does not exist.
    """
    asks = [resolve(step) for step in context.recipe.transforms]
    if not asks:
        return model
    original, spaces = model, analyse(model)
    sample = context.feeds[0] if context.feeds else random_sample(model)
    if context.prove:
        context.report.proof["analysis"] = check(spaces, sample)
    for number, (step, ask) in enumerate(zip(context.recipe.transforms, asks)):
        # An ask is measured on the model that the ones before it made.
        precisions = context.precisions(model)
        model, report = apply_asks(model, analyse(model) if number else spaces, [ask], context.data(), precisions)
        context.known = {}
        for entry in report.entries:
            if not entry.done:
                where = entry.where or (f"space {entry.space}" if entry.space >= 0 else "the model")
                context.report.refuse(entry.ask, where, entry.text)
        done = [e for e in report.entries if e.done]
        whole = [e.text for e in done if e.space < 0]
        count = sum(e.space >= 0 for e in done)
        line = "; ".join([*whole, *([f"{count} spaces changed"] if count or not whole else [])])
        context.report.transforms.append(f"{step}: {line}")
    if context.prove:
        context.report.proof["transforms"] = difference(original, model, sample)
    return model


def resolve(step: Step) -> Ask:
    """The ask that a step of a recipe names.

    Raises:
        RecipeError: there is none, it has no such option, or a value is of another type.
    """
    cls = _class(step.name)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    if strange := step.options.keys() - set(known):
        options = ", ".join(known) or "none"
        raise RecipeError(f"transform {step.name!r} has no option {sorted(strange)[0]!r}; its options: {options}")
    for name, value in step.options.items():
        kind = type(defaults[name])
        if kind in _TYPES:
            allowed, what = _TYPES[kind]
            if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
                raise RecipeError(f"transform {step.name!r}: {name} is {what}, not {value!r}")
        if name == "seed" and value < 0:
            raise RecipeError(f"transform {step.name!r}: a seed is 0 or a positive number, not {value}")
    return cls(**step.options)


_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}
"""Of options by the type of their default: what is allowed, in words too."""


def step_of(ask: Ask) -> Step:
    """The step of a recipe that names ``ask``, with the options that differ from their defaults."""
    fields = dataclasses.fields(ask)  # type: ignore[arg-type]
    options = {f.name: getattr(ask, f.name) for f in fields if f.init and getattr(ask, f.name) != f.default}
    cls = type(ask)
    name = cls.name if registered_asks().get(cls.name) is cls else f"{cls.__module__}:{cls.__qualname__}"
    return Step(name, options)


def list_transforms() -> dict[str, str]:
    """First line of the description of every transform, by name."""
    return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in registered_asks().items()}


def _class(name: str) -> type[Ask]:
    known = registered_asks()
    if name in known:
        return known[name]
    place, _, attribute = name.rpartition(":")
    if not place:
        raise RecipeError(f"unknown transform {name!r}; known: {', '.join(known)}, or file.py:Class")
    try:
        found = getattr(extensions.load(place), attribute)
    except ExtensionError as error:
        raise RecipeError(f"transform {name!r}: {error}") from error
    except AttributeError:
        raise RecipeError(f"transform {name!r} cannot be loaded: {place} has no {attribute!r}") from None
    if not (isinstance(found, type) and issubclass(found, Ask) and dataclasses.is_dataclass(found)):
        raise RecipeError(f"transform {name!r} is not a dataclass derived from qcompile.passes.asks.Ask")
    return found
