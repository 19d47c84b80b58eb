"""`analyse`: the channel spaces of a model, as objects that can be printed, asked and folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.prepare import prepare
from qcompile.passes.spaces.relations import Constraints, Use
from qcompile.passes.spaces.solve import Solution, solve
from qcompile.passes.spaces.space import Member, Reader, Space
from qcompile.passes.spaces.walk import Walk

if TYPE_CHECKING:
    from qcompile.passes.spaces.prove import Proof


@dataclass
class Spaces:
    """Result of the analysis.

    Attributes:
        model: the prepared model that names and folds refer to.
        spaces: all spaces, in the order in which the graph reaches them.
        solution: the solver's result.
        layouts: index maps of activations, by value name.
        constants: index maps of constants, by initializer name.
    """

    model: ir.Model
    spaces: list[Space]
    solution: Solution
    layouts: dict[str, tuple[IndexMap, ...]]
    constants: dict[str, tuple[IndexMap, ...]]
    space_of_class: np.ndarray

    def __iter__(self) -> Iterator[Space]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, index: int) -> Space:
        return self.spaces[index]

    def of(self, name: str, axis: int = -1) -> Space:
        """The space of a value or constant along ``axis``.

        Raises:
            KeyError: the value belongs to no space there, or to several.
        """
        found = set()
        for m in (*self.layouts.get(name, ()), *self.constants.get(name, ())):
            if m.along(axis):
                found |= set(self.space_of_class[self.solution.class_of[m.flat]].tolist())
        if len(found) != 1:
            raise KeyError(f"{name!r} lies in {len(found)} spaces along axis {axis}")
        return self.spaces[found.pop()]

    def spaces_of(self, name: str, axis: int = -1) -> list[Space]:
        """All spaces of a value or constant along ``axis``."""
        found: dict[int, None] = {}
        for m in (*self.layouts.get(name, ()), *self.constants.get(name, ())):
            if m.along(axis):
                found.update(dict.fromkeys(self.space_of_class[self.solution.class_of[m.flat]].tolist()))
        return [self.spaces[i] for i in found]

    def index_in_space(self, coordinates: np.ndarray, space: Space) -> np.ndarray:
        """Index of each coordinate in ``space``, -1 if it belongs to another."""
        classes = self.solution.class_of[coordinates]
        place = np.full(len(self.space_of_class), -1)
        place[space.classes] = np.arange(space.size)
        return place[classes]

    def readers(self, space: Space) -> list[Reader]:
        """Linear operators that sum over channels of ``space``."""
        return self.all_readers().get(space.index, [])

    def all_readers(self) -> dict[int, list[Reader]]:
        """Linear operators by the index of the space they read."""
        found: dict[int, list[Reader]] = {}
        for node in self.model.graph:
            axes = _summed_axes(node)
            if axes is None:
                continue
            x, w = node.inputs[0], node.inputs[1]
            if x is None or w is None or w.name not in self.constants:
                continue
            for m in self.layouts.get(x.name or "", ()):
                if not m.along(axes[0]):
                    continue
                spaces = self.space_of_class[self.solution.class_of[m.flat]]
                for i in np.unique(spaces):
                    channels = self.index_in_space(m.flat, self.spaces[i])
                    found.setdefault(int(i), []).append(
                        Reader(node.name or "", x.name or "", w.name or "", axes[1], axes[0], channels)
                    )
        return found

    def rebase(self, model: ir.Model) -> Spaces:
        """The same analysis on a model with the same graph and other constants (a folded one)."""
        return replace(self, model=model)

    def identity(self) -> Element:
        """The element that changes nothing."""
        return Element.identity(self.solution)

    def prove(self, seed: int = 0, *, each: bool = False) -> Proof:
        """Fold a random element of all groups and compare outputs in float64; see `qcompile.passes.spaces.prove`."""
        from qcompile.passes.spaces.prove import prove

        return prove(self, seed, each=each)

    def __str__(self) -> str:
        from qcompile.passes.spaces.explain import table

        return table(self)

    def to_json(self) -> dict:
        """A plain description for tools."""
        from qcompile.passes.spaces.explain import to_json

        return to_json(self)


def _summed_axes(node: ir.Node) -> tuple[int, int] | None:
    """Summed axis of the activation and of the weight of a linear operator; None for other nodes."""
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].shape is None:
        return None
    if node.op_type == "MatMul" and len(node.inputs[1].shape) >= 2:
        return -1, len(node.inputs[1].shape) - 2
    if node.op_type == "Gemm":
        transposed = node.attributes["transB"].value if "transB" in node.attributes else 0
        return (-2 if "transA" in node.attributes and node.attributes["transA"].value else -1), int(bool(transposed))
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1, int(node.op_type == "Conv")
    return None


def analyse(model: ir.Model) -> Spaces:
    """Find the channel spaces of ``model``. No weight is read, apart from vectors that sit between two spaces."""
    prepared = prepare(model)
    walk = Walk(prepared)
    walk.run()
    solution = solve(walk.constraints)
    _write_promoted(walk, solution)
    layouts = {v.name: maps for v, maps in walk.layouts.items() if v.name and maps}
    constants = {v.name: maps for v, maps in walk.constants.items() if v.name and v.is_initializer()}
    layouts |= {v.name: maps for v, maps in walk.constants.items() if v.name and not v.is_initializer()}
    spaces, space_of_class = _spaces(solution)
    result = Spaces(prepared, spaces, solution, layouts, constants, space_of_class)
    _describe(result, walk.constraints)
    return result


def _write_promoted(walk: Walk, s: Solution) -> None:
    """Put vectors in the place of numbers where some scale acts on them; forget the others."""
    for vector, node, i in walk.promoted:
        classes = s.class_of[walk.constants[vector][0].flat]
        family = s.families[int(s.family_of[classes[0]])]
        if family.logs[s.column_of[classes]].any():
            walk.model.graph.register_initializer(vector)
            node.replace_input_with(i, vector)
        else:
            del walk.constants[vector]


def _spaces(s: Solution) -> tuple[list[Space], np.ndarray]:
    """Columns of a family that the same uses touch form one space."""
    found = []
    for number, family in enumerate(s.families):
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for column, c in enumerate(family.classes[0]):
            groups.setdefault((int(s.signature[c]), int(s.limit_of[c]), s.leader[c] >= 0), []).append(column)
        for (_, limit, following), columns in groups.items():
            classes = np.sort(family.classes[:, columns].reshape(-1))
            if not following and int(s.cell_of[classes[0]]) in s.cells:
                _, cells = np.unique(s.cell_of[classes], return_inverse=True)
            else:
                cells = np.arange(len(classes))
            found.append(
                Space(
                    0,
                    number,
                    tuple(columns),
                    classes,
                    cells,
                    Limit(limit),
                    scalable=bool((family.logs[columns] != 0).any()),
                    signed=bool(family.signs[columns].any()),
                    permutable=bool((family.orbit >= 0).any()),
                )
            )
    # Graph order: coordinates are born in it.
    birth = np.full(len(s.cell_of), np.iinfo(np.int64).max)
    np.minimum.at(birth, s.class_of, np.arange(len(s.class_of)))
    found.sort(key=lambda space: int(birth[space.classes].min()))
    space_of_class = np.full(len(s.cell_of), -1)
    for i, space in enumerate(found):
        space.index = i
        space_of_class[space.classes] = i
    for units in s.unit_orbits:
        for i in np.unique(space_of_class[units]):
            found[i].units = max(found[i].units, len(units))
    for space in found:
        number = s.leader[space.classes[0]]
        if number >= 0:
            peel = s.peels[int(number)]
            partner = dict(zip(peel.follower.tolist(), peel.leader.tolist()))
            space.leader = int(space_of_class[partner[int(space.classes[0])]])
            space.follows = peel.scaling.node
    return found, space_of_class


def _describe(result: Spaces, constraints: Constraints) -> None:
    s, births = result.solution, constraints.births
    starts = np.array([b.start for b in births])
    for name, maps in result.constants.items():
        shape = result.model.graph.initializers[name].shape or ()
        vector = sum(d != 1 for d in shape) <= 1
        for m in maps:
            ids = np.unique(result.space_of_class[s.class_of[m.flat]])
            for i in ids:
                summed = births[int(np.searchsorted(starts, m.flat[0], side="right")) - 1].reader
                role = "parameter" if vector else "reader" if summed else "writer"
                result.spaces[i].members.append(Member(name, m.axes, role))
    for name, maps in result.layouts.items():
        for m in maps:
            for i in np.unique(result.space_of_class[s.class_of[m.flat]]):
                result.spaces[i].values.append((name, m.axes))
    _give_reasons(result, constraints)


def _give_reasons(result: Spaces, constraints: Constraints) -> None:
    """Say of every space what pins it and what limits it."""
    s = result.solution

    def touched(coordinates: np.ndarray) -> list[Space]:
        return [result.spaces[i] for i in np.unique(result.space_of_class[s.class_of[coordinates]])]

    for use in constraints.uses:
        text = _restriction(use)
        for space in touched(use.coordinates) if text or use.reason else ():
            if use.reason:
                reason = f"{use.op} {use.node!r}: {use.reason}" if use.op != "output" else use.reason
                if reason not in space.reasons:
                    space.reasons.append(reason)
            else:
                space.limits.setdefault(text, []).append(f"{use.op} {use.node!r}")
    for number, scaling in enumerate(constraints.scalings):
        if number not in s.peels and scaling.gamma is not None:
            for space in (*touched(scaling.x), *touched(scaling.y)):
                names = space.limits.setdefault("channels stay apart: a scale per channel cannot move elsewhere", [])
                names.append(repr(scaling.node))
    # Spaces of one family are permuted together, so one that is pinned keeps the others in their order.
    pinned: dict[int, Space] = {}
    for space in result.spaces:
        if space.reasons and space.pinned:
            pinned.setdefault(space.family, space)
    for space in result.spaces:
        first = pinned.get(space.family)
        if first is not None and not space.reasons:
            space.reasons.append(f"its channels keep their order, as those of #{first.index} do ({first.reasons[0]})")
        elif space.pinned and not space.reasons:
            together = "; ".join(f"{text}: {', '.join(dict.fromkeys(names))}" for text, names in space.limits.items())
            space.reasons.append(f"its operators leave nothing but the identity together ({together})")


def _restriction(use: Use) -> str:
    """What an operator does not bear, in words."""
    if use.limit & Limit.SCALAR:
        return "permutations only" if use.limit & Limit.RIGID else "permutations and positive scales only"
    if use.limit & Limit.PLANE:
        return "pairs of channels turn and scale as a whole"
    if use.limit & Limit.ORTHOGONAL:
        return "rotations only" + (", and the mean stays" if use.limit & Limit.FIX_ONES else "")
    if use.mix is not None and len(np.unique(use.mix)) == len(use.mix) > 1:
        return "channels stay apart"
    return ""
