"""A channel space, its members and its readers, as objects that can be printed and asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.passes.spaces.groups import BlockGroup, Limit


@dataclass(frozen=True)
class Member:
    """A constant some of whose channels belong to a space.

    Attributes:
        name: the initializer.
        axes: its axes along which the space runs.
        role: "writer" (the space's channels are produced), "reader" (summed over) or "parameter" (a vector).
    """

    name: str
    axes: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Reader:
    """A linear operator that sums over channels of a space: ``activation @ weight``.

    Attributes:
        node: name of the node.
        activation: name of its non-constant operand.
        weight: name of its constant operand.
        axis: axis of the weight that is summed over.
        position: axis of the activation that is summed over.
        channels: for each channel of the activation's summed axis, its index in the space (-1: another space).
    """

    node: str
    activation: str
    weight: str
    axis: int
    position: int
    channels: np.ndarray


@dataclass
class Space:
    """Channels that share one basis everywhere.

    Attributes:
        index: number of the space.
        family: family in the solution; spaces of one family share one permutation.
        columns: columns of the family.
        classes: ``(n,)``, the solver's classes in index order.
        cells: ``(n,)``, block each channel mixes in, numbered from 0; every channel its own if nothing mixes.
        limit: restrictions on a block.
        scalable: whether a free positive diagonal acts on single channels.
        signed: whether single channels may change sign.
        permutable: whether some channels may trade places.
        units: how many units (heads, groups) of it may trade places as a whole; 0 if none.
        leader: index of the space that this one follows through a peeled scaling, or None.
        follows: name of that scaling's node.
        members: constants.
        values: activations, ``(name, axes)``.
        reasons: what pins it, in words.
        limits: what else restricts it, with the operators that do.
    """

    index: int
    family: int
    columns: tuple[int, ...]
    classes: np.ndarray
    cells: np.ndarray
    limit: Limit
    scalable: bool
    signed: bool
    permutable: bool
    units: int = 0
    leader: int | None = None
    follows: str = ""
    members: list[Member] = field(default_factory=list)
    values: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    limits: dict[str, list[str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.classes)

    @property
    def blocks(self) -> list[tuple[int, BlockGroup]]:
        """How many cells of which group."""
        sizes, counts = np.unique(np.bincount(self.cells), return_counts=True)
        return [(int(c), BlockGroup(int(k), self.limit)) for k, c in zip(sizes, counts)]

    @property
    def mixes(self) -> bool:
        """Whether the space has matrices of its own: cells of several channels that are not scalar."""
        return self.leader is None and any(g.mixes for _, g in self.blocks)

    @property
    def pinned(self) -> bool:
        """Whether only the identity acts."""
        free = self.scalable or self.signed or self.permutable or self.units or self.leader is not None
        return not free and not any(g.mixes or g.scalable for _, g in self.blocks)

    @property
    def group(self) -> str:
        """The group in words: ``O(4096)``, ``GL(128)^8``, ``R*^11008 x S``, ``R*^4096 x follows #3``, ``1``."""
        parts = []
        if self.leader is not None:
            parts.append(_power("R*" if self.signed else "R+", self.size) if self.scalable else "1")
            parts.append(f"follows #{self.leader}")
        else:
            for count, group in self.blocks:
                text = self._single if group.size == 1 else str(group)
                if text and text != "1":
                    parts.append(_power(text, count))
        if self.permutable:
            parts.append("S")
        if self.units:
            parts.append(f"S_{self.units} of units")
        return " x ".join(parts) or "1"

    @property
    def _single(self) -> str:
        """What acts on a channel that does not mix."""
        if self.scalable:
            return "R*" if self.signed else "R+"
        return "±1" if self.signed else ""


def _power(text: str, count: int) -> str:
    return text if count == 1 else f"{text}^{count}"
