"""The transforms a recipe may name: each rewrites the float model without changing its function.

A transform takes the model and what it may ask of the calibration data, and returns a line for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qcompile.calibration import ChannelStatistics, Feed, collect
from qcompile.errors import RecipeError
from qcompile.passes.sites import LinearSite, linear_sites
from qcompile.recipes import Recipe
from qcompile.report import Report


@dataclass
class TransformContext:
    """What a transform may use.

    Attributes:
        recipe: the whole recipe; formats of the readers follow from it.
        feeds: calibration samples; empty without data.
        report: receives what was refused.
        advance: called after every calibration sample that is run.
        known: statistics of the model as it came, by value name; they hold until a transform changes it.
    """

    recipe: Recipe
    feeds: Sequence[Feed]
    report: Report
    advance: Callable[[], None] = field(default=lambda: None)
    known: Mapping[str, ChannelStatistics] = field(default_factory=dict)

    def quantized_sites(self, model: ir.Model) -> list[LinearSite]:
        """Linear sites the recipe quantizes."""
        return [s for s in linear_sites(model) if self.recipe.weight_format(s.name) is not None]

    def statistics(
        self, model: ir.Model, values: Sequence[str], hessian: Sequence[str] = ()
    ) -> Mapping[str, ChannelStatistics]:
        """Statistics of values of ``model`` as it is now."""
        if not hessian and all(name in self.known for name in values):
            return {name: self.known[name] for name in values}
        return collect(model, self.feeds, values, hessian=hessian, progress=self.advance)


Transform = Callable[..., str]
_TRANSFORMS: dict[str, Transform] = {}


def transform(name: str) -> Callable[[Transform], Transform]:
    """Register a function ``(model, context, **options) -> one line for the report`` that rewrites ``model`` in place."""

    def register(function: Transform) -> Transform:
        _TRANSFORMS[name] = function
        return function

    return register


def apply_transforms(model: ir.Model, context: TransformContext) -> ir.Model:
    """Apply the recipe's transforms in order and return the model.

    Raises:
        RecipeError: a transform or one of its options does not exist.
    """
    for step in context.recipe.transforms:
        if step.name not in _TRANSFORMS:
            raise RecipeError(f"unknown transform {step.name!r}; known: {', '.join(sorted(_TRANSFORMS))}")
        try:
            model, line = _TRANSFORMS[step.name](model, context, **step.options)
        except TypeError as error:
            if "unexpected keyword" in str(error):
                raise RecipeError(f"transform {step.name!r}: {error}") from None
            raise
        context.known = {}
        context.report.transforms.append(f"{step}: {line}")
    return model


def list_transforms() -> dict[str, str]:
    """First line of the description of every transform, by name."""
    return {name: (f.__doc__ or "").strip().splitlines()[0] for name, f in sorted(_TRANSFORMS.items())}


@transform("smooth")
def smooth(model: ir.Model, context: TransformContext, **options: Any) -> tuple[ir.Model, str]:
    """Move activation outliers into the weights, channel by channel, wherever the analysis finds it legal."""
    from qcompile.passes.asks import Smooth

    return _ask(model, context, Smooth(**options))


@transform("rotate-inputs")
def rotate_inputs(model: ir.Model, context: TransformContext, block: int = 128) -> tuple[ir.Model, str]:
    """Rotate the input of every quantized linear operator by Hadamard blocks at run time; its weight takes the inverse."""
    from qcompile.passes.rotate_inputs import rotate

    done, refused = rotate(model, context.quantized_sites(model), block)
    for where, reason in refused:
        context.report.refuse("rotate-inputs", where, reason)
    return model, f"{done} activations rotated in blocks of up to {block}"


def _ask(model: ir.Model, context: TransformContext, ask: Any) -> tuple[ir.Model, str]:
    """Apply one ask to every space of the model and fold the result."""
    from qcompile.passes.asks import apply_asks
    from qcompile.passes.spaces import analyse

    if not context.feeds:
        context.report.refuse(ask.name, "all spaces", "no calibration data; pass --calibration")
        return model, "skipped, no calibration data"
    sites = context.quantized_sites(model)
    quantized = {s.weight.name or "" for s in sites}

    def ranges(current: ir.Model) -> dict[str, Any]:
        values = list(dict.fromkeys(s.x.name or "" for s in linear_sites(current) if s.weight.name in quantized))
        return {name: s.absmax for name, s in context.statistics(current, values).items()}

    # Analysing and asking read the statistics before anything changes, so what is known still holds here.
    folded, report = apply_asks(model, analyse(model), [ask], stats=ranges, quantized=quantized)
    for entry in report.entries:
        if not entry.done:
            context.report.refuse(entry.ask, f"space {entry.space}", entry.text)
    return folded, f"{len(report.applied)} spaces changed"
