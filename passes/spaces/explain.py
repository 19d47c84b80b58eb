"""Spaces in words: the table of ``qcompile spaces`` and its JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.errors import FormatError
from qcompile.formats.hadamard import factors
from qcompile.passes.spaces.groups import Limit

if TYPE_CHECKING:
    from qcompile.passes.spaces.analysis import Spaces
    from qcompile.passes.spaces.space import Reader, Space


@dataclass(frozen=True)
class Abilities:
    """What an ask on a space would cost.

    Attributes:
        folded: kinds of elements that fold: "scale", "rotation", "permutation".
        online: operations per row at run time for the kinds that do not, if a linear operator reads the space; a
            rotation is a Hadamard transform of the largest order known.
        share: the same as a share of the multiplications of those readers.
    """

    folded: tuple[str, ...]
    online: dict[str, int]
    share: dict[str, float]


def abilities(space: Space, spaces: Spaces, readers: list[Reader]) -> Abilities:
    """What folds into ``space``, and what the rest would cost in front of its ``readers``."""
    leader = space if space.leader is None else spaces[space.leader]
    folds = {
        "scale": space.scalable or (space.mixes and space.limit == Limit.NONE),
        "rotation": leader.mixes and not leader.limit & Limit.PLANE,
        "permutation": space.permutable or leader.mixes,
    }
    cost = {"scale": space.size, "rotation": _additions(space.size), "permutation": space.size}
    products = 0
    for reader in readers:
        shape = spaces.model.graph.initializers[reader.weight].shape
        others = [d for a, d in enumerate(shape or ()) if a != reader.axis and isinstance(d, int)]
        columns = 1
        for d in others:
            columns *= d
        products += columns * int((reader.channels >= 0).sum())
    online = {kind: cost[kind] for kind, does in folds.items() if not does and products and cost[kind]}
    share = {kind: operations / products for kind, operations in online.items()}
    return Abilities(tuple(kind for kind, does in folds.items() if does), online, share)


def _additions(width: int) -> int:
    """Additions of a Hadamard transform of a row by the largest block that divides it; 0 if there is none."""
    for order in range(width, 3, -1):
        if width % order == 0:
            try:
                core, power = factors(order)
            except FormatError:
                continue
            return width * (power + (core if core > 1 else 0))
    return 0


def table(spaces: Spaces) -> str:
    """One block per space: size, group, members, what restricts it, and what does not fold."""
    lines = []
    readers = spaces.all_readers()
    for space in spaces:
        if not space.members and not space.values:
            # Bookkeeping of the order of heads; shown at the spaces that have heads.
            continue
        lines.append(f"#{space.index:<4} {space.size:>6}  {space.group}")
        for role in ("writer", "reader", "parameter"):
            names = [f"{m.name}{list(m.axes)}" for m in space.members if m.role == role]
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"             {role + 's':<11}{shown}")
        lines += [f"             pinned by  {reason}" for reason in space.reasons[:3]]
        if len(space.reasons) > 3:
            lines.append(f"             pinned by  {len(space.reasons) - 3} more")
        for text, nodes in space.limits.items():
            more = f" and {len(nodes) - 2} more" if len(nodes) > 2 else ""
            lines.append(f"             limits     {text}: {', '.join(nodes[:2])}{more}")
        able = abilities(space, spaces, readers.get(space.index, []))
        if able.folded:
            lines.append(f"             folds      {', '.join(able.folded)}")
        if able.online:
            costs = [f"{k} {able.online[k]} operations per row ({100 * able.share[k]:.2g} %)" for k in able.online]
            lines.append(f"             online     {', '.join(costs)}")
    return "\n".join(lines)


def to_json(spaces: Spaces) -> dict:
    """A plain description of all spaces."""
    readers = spaces.all_readers()
    return {"spaces": [_space(s, abilities(s, spaces, readers.get(s.index, []))) for s in spaces]}


def _space(space: Space, able: Abilities) -> dict:
    return {
        "index": space.index,
        "size": space.size,
        "group": space.group,
        "blocks": [{"count": count, "size": g.size, "group": str(g)} for count, g in space.blocks],
        "scalable": space.scalable,
        "signed": space.signed,
        "permutable": space.permutable,
        "units": space.units,
        "follows": space.leader,
        "pinned": space.pinned,
        "members": [{"name": m.name, "axes": list(m.axes), "role": m.role} for m in space.members],
        "values": [{"name": name, "axes": list(axes)} for name, axes in space.values],
        "reasons": space.reasons,
        "limits": space.limits,
        "folds": list(able.folded),
        "online": {k: {"operations": able.online[k], "share": able.share[k]} for k in able.online},
    }
