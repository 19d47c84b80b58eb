"""What recognition found, what it refused and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

COMPOSITES = (
    "Attention",
    "Gelu",
    "LayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
    "Swish",
)


@dataclass(frozen=True)
class Found:
    """One decomposed pattern that became a composite (``kind``), where, and anything worth knowing about it."""

    kind: str
    where: str
    detail: str = ""


@dataclass(frozen=True)
class Refused:
    """A subgraph that looks like a composite (``kind``) but is not equal to it, or could not be proven to be."""

    kind: str
    where: str
    reason: str


@dataclass
class Recognised:
    """Result of `recognise`; ``print`` it.

    Attributes:
        composites: number of each composite in the resulting graph, raised here or there from the start.
        found: rewrites that were made.
        refused: near misses, with reasons.
        swiglu: number of gated units ``Swish(gate) * up``; they stay two operators.
        linears: number of ``MatMul`` with a constant ``(K, N)`` weight.
    """

    composites: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    swiglu: int = 0
    linears: int = 0

    def raised(self) -> Counter[str]:
        """How often each kind of rewrite was made."""
        return Counter(item.kind for item in self.found)

    def __str__(self) -> str:
        raised = self.raised()
        lines = [f"{'composite':<20} {'in graph':>8} {'raised':>7}"]
        for kind in COMPOSITES:
            if self.composites[kind] or raised[kind]:
                lines.append(f"{kind:<20} {self.composites[kind]:>8} {raised[kind]:>7}")
        lines.append(f"{'linear (MatMul)':<20} {self.linears:>8} {raised['Linear']:>7}")
        if self.swiglu:
            lines.append(f"{'gated (Swish * up)':<20} {self.swiglu:>8}")
        other = [f"{kind} {count}" for kind, count in sorted(raised.items()) if kind not in (*COMPOSITES, "Linear")]
        if other:
            lines.append(f"other rewrites: {', '.join(other)}")
        details = Counter((item.kind, item.detail) for item in self.found if item.detail)
        for (kind, detail), count in sorted(details.items()):
            lines.append(f"note: {kind} x{count}: {detail}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for item in self.refused:
            reasons.setdefault((item.kind, item.reason), []).append(item.where)
        for (kind, reason), places in sorted(reasons.items()):
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"refused {kind} at {places[0]}{more}: {reason}")
        return "\n".join(lines)
