"""Numerical proof of an analysis: a random element of every space's group at once must not change the function.

The element is folded into float64 copies of the constants, one after another; the model runs before and after in
float64, and the outputs must agree to 1e-10 of their largest entry. One wrong rule anywhere shows as an error of the
order of 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.passes.execute import run
from qcompile.passes.spaces.act import Actor
from qcompile.passes.spaces.analysis import Spaces
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.fold import constant_values, fold_epsilons, overwritten_entries
from qcompile.passes.spaces.translate import Translator, Untranslatable

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Proof:
    """Outcome of a proof.

    Attributes:
        error: largest difference of an output, relative to that output's largest entry.
        per_space: the same for an element of one space's family alone, by space index (empty unless asked for).
        spaces: how many spaces the element acted on.
        translations: how many values were translated as well.
    """

    error: float
    per_space: dict[int, float]
    spaces: int
    translations: int = 0

    @property
    def holds(self) -> bool:
        """Whether the error is within `TOLERANCE`."""
        return bool(self.error <= TOLERANCE)


def prove(
    spaces: Spaces,
    seed: int = 0,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    each: bool = False,
) -> Proof:
    """Fold a random element of all groups and compare the model's outputs in float64.

    Args:
        spaces: the analysis to prove.
        seed: of the element and, if not given, of the inputs.
        inputs: graph inputs; random ones by default (see `random_inputs`).
        each: also prove every family of spaces alone, to find the one at fault.
    """
    rng = np.random.default_rng(seed)
    feeds = random_inputs(spaces.model, rng) if inputs is None else inputs
    before = run(spaces.model, feeds)
    spaces, translated = random_translations(spaces, rng)
    element = Element.random(spaces.solution, rng)
    error = _error(before, run_folded(spaces, element, feeds))
    per_space: dict[int, float] = {}
    if each:
        for space in spaces:
            if not space.pinned:
                alone = restrict(element, spaces, space.family)
                per_space[space.index] = _error(before, run_folded(spaces, alone, feeds))
    return Proof(error, per_space, sum(not s.pinned for s in spaces), translated)


def random_translations(spaces: Spaces, rng: np.random.Generator) -> tuple[Spaces, int]:
    """Translate the input of every linear operator at random where constants alone can take it back."""
    model = spaces.model.clone()
    for value in model.graph.initializers.values():
        # Float64 vectors, so that the constants take translations without rounding.
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and sum(d != 1 for d in tensor.shape) <= 1:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float64), name=value.name)
    moved = spaces.rebase(model)
    translator = Translator(moved, insert=False)
    count = 0
    for name in dict.fromkeys(r.activation for readers in spaces.all_readers().values() for r in readers):
        maps = spaces.layouts.get(name, ())
        if len(maps) == 1:
            with contextlib.suppress(Untranslatable):
                translator.translate(name, rng.standard_normal(maps[0].size))
                count += 1
    return moved, count


def run_folded(spaces: Spaces, element: Element, feeds: Mapping[str, np.ndarray]) -> dict:
    """Run the model in float64 with ``element`` folded into float64 constants."""
    actor = Actor(element, lambda coordinates: constant_values(spaces, coordinates))
    overwritten = overwritten_entries(spaces, actor)
    model = spaces.model
    if spaces.solution.constraints.aliases:
        model = model.clone()
        fold_epsilons(spaces, actor, model)
    return run(model, feeds, constants=_Folded(spaces, actor, overwritten))


class _Folded(Mapping):
    """Constants transformed when they are read, so that no more than one is held."""

    def __init__(self, spaces: Spaces, actor: Actor, overwritten: dict[str, np.ndarray]) -> None:
        self.spaces, self.actor, self.overwritten = spaces, actor, overwritten
        touched = {n for n, maps in spaces.constants.items() if any(actor.touches(m) for m in maps)}
        self.names = touched | set(overwritten)

    def __getitem__(self, name: str):
        import torch

        tensor = self.spaces.model.graph.initializers[name].const_value
        array = tensor.numpy().astype(np.float64)
        array = self.actor.transform(array, self.spaces.constants[name], self.overwritten.get(name))
        return torch.from_numpy(np.ascontiguousarray(array))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def restrict(element: Element, spaces: Spaces, family: int) -> Element:
    """The part of ``element`` that acts on one family."""
    s = spaces.solution
    alone = Element.identity(s)
    inside = s.family_of == family
    alone.log[inside], alone.sign[inside] = element.log[inside], element.sign[inside]
    alone.source[inside] = element.source[inside]
    alone.blocks = {c: m for c, m in element.blocks.items() if inside[s.cells[c][0]]}
    return alone


def _error(before: Mapping, after: Mapping) -> float:
    worst = 0.0
    for name, a in before.items():
        if a.is_floating_point():
            scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 1.0
            difference = (a - after[name]).abs()
            worst = max(worst, float(difference[a.isfinite()].max()) / (scale or 1.0)) if a.numel() else worst
            if not bool((a.isfinite() == after[name].isfinite()).all()):
                return float("inf")
        elif not bool((a == after[name]).all()):
            return float("inf")
    return worst


def random_inputs(model: ir.Model, rng: np.random.Generator, sizes: Mapping[str, int] | None = None) -> dict:
    """Random graph inputs: normal floats, ones for masks, integers below the first dimension of the table they index.

    Symbolic sizes get 2 (first axis) or 7 unless given.

    Raises:
        ModelError: an input has an unknown rank.
    """
    feeds = {}
    known = dict(sizes or {})
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.shape is None:
            raise ModelError(f"input {value.name!r} has no known rank; give inputs explicitly")
        shape = []
        for axis, d in enumerate(value.shape):
            if isinstance(d, int):
                shape.append(d)
            else:
                shape.append(known.setdefault(str(d.value), 2 if axis == 0 else 7))
        dtype = value.dtype
        if dtype is not None and dtype.is_integer():
            feeds[value.name] = rng.integers(0, _bound(value), shape).astype(dtype.numpy())
        elif dtype == ir.DataType.BOOL:
            feeds[value.name] = np.ones(shape, bool)
        else:
            feeds[value.name] = rng.standard_normal(shape)
    return feeds


def _bound(value: ir.Value) -> int:
    """Largest admissible index plus one; 2 (with ones likely) for masks, which index nothing."""
    bounds = [
        int(u.node.inputs[0].shape[0])  # type: ignore[arg-type]  # tables are constants
        for u in value.uses()
        if u.node.op_type == "Gather" and u.idx == 1 and u.node.inputs[0] is not None and u.node.inputs[0].shape
    ]
    return min(bounds, default=2)
