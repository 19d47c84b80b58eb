"""Which spaces a learned method acts on, and where it begins."""

from __future__ import annotations

import numpy as np

from qcompile.passes.asks.base import Context, Entry
from qcompile.passes.asks.online import block_order, can_rotate
from qcompile.passes.asks.rotate import random_hadamard, reaches_quantized
from qcompile.passes.asks.smooth import smooth_scale
from qcompile.passes.learn.freedoms import Rotation, Scales, equal_cells
from qcompile.passes.learn.mixing import FixedHadamard, LearnedKronecker, balanced
from qcompile.passes.learn.program import Program
from qcompile.passes.spaces import Space
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.request import admits_diagonal
from qcompile.passes.spaces.translate import Translator, Untranslatable


def rotating_spaces(context: Context, name: str) -> list[Space]:
    """Spaces that mix and matter to a quantized operator."""
    found = []
    for space in context.spaces:
        if not space.mixes or space.limit & Limit.PLANE or not reaches_quantized(space, context):
            continue
        if equal_cells(space):
            found.append(space)
        else:
            context.report.entries.append(Entry(name, space.index, False, "its cells differ in size"))
    return found


def hadamards(space: Space, seed: int) -> np.ndarray:
    """``(cells, k, k)`` random Hadamard matrices, in the group of the space: those that ``rotate`` takes for this seed."""
    rng = np.random.default_rng([seed, space.index])
    size, fixed = equal_cells(space), bool(space.limit & Limit.FIX_ONES)
    return np.stack([random_hadamard(size, rng, fix_ones=fixed) for _ in range(int(space.cells.max()) + 1)])


def add_rotations(context: Context, program: Program, seed: int, name: str) -> None:
    """A learned rotation, Hadamard at first, of every space that admits one."""
    for space in rotating_spaces(context, name):
        program.freedoms.append(Rotation(context.spaces, space, hadamards(space, seed), program.like))


def add_scales(context: Context, program: Program, alpha: float | None = None) -> None:
    """A learned scale of every channel that a quantized operator reads; 1 at first, or SmoothQuant's at ``alpha``."""
    for space in context.spaces:
        if context.readers(space) and admits_diagonal(space) and not (space.mixes and not equal_cells(space)):
            start = scale_start(context, space, alpha)
            program.freedoms.append(Scales(context.spaces, space, start, program.like))


def scale_start(context: Context, space: Space, alpha: float | None) -> np.ndarray:
    """Factors to begin with; see `add_scales`."""
    if alpha is None:
        return np.ones(space.size)
    s = smooth_scale(context.activation_range(space), context.weight_range(space), alpha)
    return 1 / np.clip(s, 1e-4, 1e4)


def add_hadamards(context: Context, program: Program, name: str) -> None:
    """A fixed Hadamard rotation at run time of every quantized activation that no folded rotation reaches."""
    for activation, width, rotates in _activations(context, program):
        order = block_order(width)
        if rotates:
            continue
        if order < 4:
            text = f"{activation}: width {width} has no Hadamard block of order 4 or more"
            context.report.entries.append(Entry(name, -1, False, text))
            continue
        program.mixings[activation] = FixedHadamard(order, width, program.like)


def add_kroneckers(context: Context, program: Program, rng: np.random.Generator, *, scaled: bool = True) -> None:
    """A learned Kronecker product at run time of every quantized activation."""
    for activation, width, _ in _activations(context, program):
        program.mixings[activation] = LearnedKronecker(balanced(width), rng, program.like, scaled=scaled)


def _activations(context: Context, program: Program) -> list[tuple[str, int, bool]]:
    """Rounded activations with their width and whether a rotation folds into them."""
    rotates: dict[str, bool] = {}
    for space in context.spaces:
        for reader in context.readers(space):
            rotates[reader.activation] = rotates.get(reader.activation, True) and can_rotate(space, context)
    found: dict[str, tuple[str, int, bool]] = {}
    for site in program.sites.values():
        if site.precision.activation is not None:
            found[site.activation] = (site.activation, site.width, rotates.get(site.activation, False))
    return list(found.values())


def add_shifts(context: Context, program: Program) -> None:
    """A learned translation, the middle of the range at first, of activations whose constants can take it back."""
    statistics = context.statistics()
    for activation, width, _ in _activations(context, program):
        found = statistics.get(activation)
        if found is None or len(found.minimum) != width or not _translatable(context, activation, width):
            continue
        middle = (np.asarray(found.minimum, np.float64) + found.maximum) / 2
        start = -middle * _scale_of(context, program, activation, width)
        program.shifts[activation] = program.like.new_tensor(start).requires_grad_()


def _scale_of(context: Context, program: Program, activation: str, width: int) -> np.ndarray:
    """What the scales multiply the channels of an activation by at first."""
    result = np.ones(width)
    for freedom in program.freedoms:
        for reader in context.readers(freedom.space) if isinstance(freedom, Scales) else ():
            if reader.activation == activation:
                mine = reader.channels >= 0
                result[mine] = np.exp(freedom.log.detach().cpu().numpy())[reader.channels[mine]]  # type: ignore[union-attr]
    return result


def _translatable(context: Context, activation: str, width: int) -> bool:
    """Whether a translation of the value can be written and taken back without a new operator."""
    spaces = context.spaces.rebase(context.model.clone())
    try:
        return not Translator(spaces, insert=False).translate(activation, np.ones(width))
    except Untranslatable:
        return False
