"""Rotations folded into the weights: the residual stream and the values of every head.

    x' = Q x  with Q orthogonal,  W_in' = Q W_in,  W_out' = W_out Q^T

    hadamard     Q = H diag(+-1)       an outlier channel is spread over all channels, so the range of a token shrinks
                                       from the size of its outlier to a few standard deviations
    orthogonal   uniformly random
    klt          Q = H V^T             V diagonalises the second moment of the activations: first the channels are
                                       decorrelated, then all get the same variance

Q goes wherever the analysis finds orthogonal matrices admitted and some quantized operator reads the result; norm gammas
are peeled into the readers by the engine. Behind a LayerNorm the ones vector is kept in place: Q = H diag(1, +-1, ...)
H^T with the first column of H proportional to ones.

Sources: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024; Xu et al., "MambaQuant:
Quantizing the Mamba Family with Variance Aligned Rotation Methods", 2025 (klt).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError, RecipeError
from qcompile.formats.hadamard import hadamard_matrix
from qcompile.passes.asks.base import Ask, Context, Entry, Refusal, Rewrite, register_ask
from qcompile.passes.asks.online import Hadamard, block_order
from qcompile.passes.domain import add_functions
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.groups import BlockGroup, Limit, ones_complement, random_orthogonal
from qcompile.passes.spaces.request import mix


@register_ask("rotate")
@dataclass(frozen=True)
class Rotate(Ask):
    """Rotates every space that admits it and matters to a quantized reader; folds, costs nothing at run time.

    Attributes:
        kind: "hadamard" (entries of equal size; a random orthogonal matrix where no Hadamard matrix of that order is
            known), "orthogonal" (uniformly random) or "klt".
        everywhere: also spaces that no quantized operator reads, such as queries and keys without rotary positions.
        seed: of the signs.
    """

    kind: str = "hadamard"
    everywhere: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "orthogonal", "klt"):
            raise RecipeError(f"rotate: unknown kind {self.kind!r}; choose hadamard, orthogonal or klt")

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """Mix every cell of the space by its own rotation."""
        if not space.mixes or space.limit & Limit.PLANE:
            return None
        if not self.everywhere and not reaches_quantized(space, context):
            return None
        rng = np.random.default_rng([self.seed, space.index])
        moment = second_moment(space, context) if self.kind == "klt" else None
        for cell in range(int(space.cells.max()) + 1):
            inside = np.flatnonzero(space.cells == cell)
            group = BlockGroup(len(inside), space.limit)
            basis = None if moment is None else moment[np.ix_(inside, inside)]
            mix(context.spaces, element, space, cell, self.matrix(group, rng, basis))
        return f"rotated by {self.kind} matrices: " + ", ".join(f"{count} x {g.size}" for count, g in space.blocks)

    def matrix(self, group: BlockGroup, rng: np.random.Generator, moment: np.ndarray | None = None) -> np.ndarray:
        """A rotation in ``group``; ``moment`` is that of its channels, for "klt"."""
        fix_ones = bool(group.limit & Limit.FIX_ONES)
        if self.kind == "hadamard":
            return random_hadamard(group.size, rng, fix_ones=fix_ones)
        # Orthogonal matrices that fix the ones vector act on its complement alone.
        basis = ones_complement(group.size) if fix_ones else np.eye(group.size)
        inner = basis.shape[1]
        if self.kind == "klt":
            assert moment is not None
            vectors = np.linalg.eigh(basis.T @ moment @ basis)[1]
            q = random_hadamard(inner, rng) @ vectors.T
        else:
            q = random_orthogonal(inner, rng)
        rest = np.full((group.size, group.size), 1 / group.size) if fix_ones else 0.0
        return basis @ q @ basis.T + rest


def reaches_quantized(space: Space, context: Context) -> bool:
    """Whether a quantized operator reads the space, or one that follows it through a norm."""
    return any(context.readers(s) for s in context.spaces if s is space or s.leader == space.index)


def second_moment(space: Space, context: Context) -> np.ndarray:
    """Mean of ``x x^T / |x|^2``-like moments of the activations of a space, each with trace 1.

    Raises:
        Refusal: no data, or the space is never seen along the last axis of an activation.
    """
    if context.data.measure is None:
        raise Refusal("no calibration data")
    names = {}
    for name, axes in space.values:
        m = next(m for m in context.spaces.layouts[name] if m.axes == axes)
        place = context.spaces.index_in_space(m.flat, space)
        if axes == (m.rank - 1,) and len(np.unique(place)) == len(place) == space.size:
            names[name] = place
    if not names:
        raise Refusal("its channels are not the last axis of any activation")
    total = np.zeros((space.size, space.size))
    for name, found in context.data.measure(context.model, list(names), True).items():
        if found.hessian is not None and (trace := float(np.trace(found.hessian))) > 0:
            place = names[name]
            total[np.ix_(place, place)] += found.hessian / trace
    return total


def random_hadamard(size: int, rng: np.random.Generator, *, fix_ones: bool = False) -> np.ndarray:
    """A Hadamard matrix with random signs, or a random orthogonal one where none is known; maybe fixing the ones vector."""
    signs = rng.choice([-1.0, 1.0], size)
    try:
        h = hadamard_matrix(size)
    except FormatError:
        if fix_ones:
            basis = ones_complement(size)
            return np.full((size, size), 1 / size) + basis @ random_orthogonal(size - 1, rng) @ basis.T
        return random_orthogonal(size, rng) * signs
    if not fix_ones:
        return h * signs
    # Make the first column positive, then all vectors orthogonal to it sum to zero.
    h = h * np.sign(h[:, :1])
    signs[0] = 1
    return h * signs @ h.T


@register_ask("rotate-keys")
@dataclass(frozen=True)
class RotateKeys(Rewrite):
    """Rotates queries and keys of every attention after their rotary positions, at run time (for quantized keys).

    ``(q H) (k H)^T = q k^T``: scores stay what they are.
    """

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Insert one rotation per operand."""
        done = 0
        for node in list(model.graph):
            if node.op_type != "Attention" or node.inputs[0] is None or node.inputs[1] is None:
                continue
            q, k = node.inputs[0], node.inputs[1]
            width = q.shape[-1] if q.shape is not None and len(q.shape) == 4 else None
            order = block_order(width) if isinstance(width, int) else 1
            reason = (
                "keys of earlier steps come from outside"
                if any(v is not None for v in node.inputs[4:6])
                else "its operands are not split into heads of a static width"
                if not isinstance(width, int)
                else f"no Hadamard block of order 4 or more divides {width}"
                if order < 4
                else ""
            )
            if reason:
                context.report.entries.append(Entry(self.name, -1, False, f"{node.name}: {reason}"))
                continue
            for i, value in enumerate((q, k)):
                rotated = Hadamard(
                    order,
                    int(width),  # type: ignore[arg-type]
                    f"rotated.{node.name}",
                ).insert(model.graph, value)
                node.replace_input_with(i, rotated)
            done += 1
        add_functions(model)
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} attentions"))
        return done > 0
