"""Fold an element into the constants of a model: every member obeys its transformation law, nothing else changes.

    weights         W' = A_out W A_in^-1          biases, tables      b' = A b
    norm gamma      g' = D g / d_in, or g' = D where g is peeled into its neighbours (see `solve.py`)
    epsilon         e' = c^2 e

Weights are transformed one at a time, when something asks for them, in float64; the result is stored in the type of the
original, so a model of memory-mapped weights stays on disk (`lazy.py`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.spaces.act import Actor, scale_of
from qcompile.passes.spaces.analysis import Spaces
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.lazy import computed


def fold(spaces: Spaces, element: Element) -> ir.Model:
    """Return a model that computes the same function with ``element`` folded into its constants (lazily)."""
    model = spaces.model.clone()
    actor = Actor(element, lambda coordinates: constant_values(spaces, coordinates))
    overwritten = overwritten_entries(spaces, actor)
    for name, maps in spaces.constants.items():
        if any(actor.touches(m) for m in maps) or name in overwritten:
            value = model.graph.initializers[name]
            value.const_value = _lazy(value.const_value, maps, actor, overwritten.get(name))
    fold_epsilons(spaces, actor, model)
    return model


def _lazy(
    old: ir.TensorProtocol | None, maps: tuple[IndexMap, ...], actor: Actor, overwritten: np.ndarray | None
) -> ir.LazyTensor:
    assert old is not None
    return computed(lambda: actor.transform(old.numpy().astype(np.float64), maps, overwritten), old)


def constant_values(spaces: Spaces, coordinates: np.ndarray) -> np.ndarray:
    """Current values of vector constants at their coordinates."""
    births = spaces.solution.constraints.births
    starts = np.array([b.start for b in births])
    result = np.empty(len(coordinates))
    which = np.searchsorted(starts, coordinates, side="right") - 1
    for i in np.unique(which):
        tensor = spaces.model.graph.initializers[births[i].name].const_value
        assert tensor is not None
        inside = which == i
        result[inside] = tensor.numpy().astype(np.float64).reshape(-1)[coordinates[inside] - starts[i]]
    return result


def overwritten_entries(spaces: Spaces, actor: Actor) -> dict[str, np.ndarray]:
    """Vectors that a peeled scaling replaces, with a mask of the entries concerned."""
    births = spaces.solution.constraints.births
    starts = np.array([b.start for b in births])
    found: dict[str, np.ndarray] = {}
    for peel in spaces.solution.peels.values():
        if peel.scaling.gamma is None or not (actor.cell_of[peel.leader] >= 0).any():
            continue
        active = peel.scaling.gamma[actor.cell_of[peel.follower] >= 0]
        which = np.searchsorted(starts, active, side="right") - 1
        for i in np.unique(which):
            mask = found.setdefault(births[i].name, np.zeros(births[i].count, bool))
            mask[active[which == i] - starts[i]] = True
    return found


def fold_epsilons(spaces: Spaces, actor: Actor, model: ir.Model) -> None:
    """Rewrite the epsilon of every normalisation whose input is scaled: e' = c^2 e."""
    scales: dict[str, float] = {}
    for alias in spaces.solution.constraints.aliases:
        classes = spaces.solution.class_of[alias.coordinates]
        cells = np.unique(actor.cell_of[classes])
        mixed = cells[0] >= 0
        c = float(scale_of(actor.cells[cells[0]].matrix)) if mixed else float(np.exp(actor.element.log[classes[0]]))
        if abs(c - 1) > 1e-12:
            scales[alias.node] = c
    for node in model.graph if scales else ():
        name = node.name or node.outputs[0].name or node.op_type
        if name in scales:
            epsilon = float(node.attributes["epsilon"].value) if "epsilon" in node.attributes else 1e-5
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * scales[name] ** 2)
