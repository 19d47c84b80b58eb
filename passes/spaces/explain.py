"""Spaces in words: the table of ``qcompile spaces`` and its JSON form."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompile.passes.spaces.analysis import Space, Spaces


def table(spaces: Spaces) -> str:
    """One block per space: size, group, members, and what restricts it."""
    lines = []
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
        for reason in space.reasons[:3]:
            lines.append(f"             because    {reason}")
    return "\n".join(lines)


def to_json(spaces: Spaces) -> dict:
    """A plain description of all spaces."""
    return {"spaces": [_space(s) for s in spaces]}


def _space(space: Space) -> dict:
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
        "members": [{"name": m.name, "axes": list(m.axes), "role": m.role} for m in space.members],
        "values": [{"name": name, "axes": list(axes)} for name, axes in space.values],
        "reasons": space.reasons,
    }
