"""How a rule is written: a function of a `NodeView`, registered under the operators it speaks for.

A rule reads the index maps of the inputs, states constraints, and sets the index maps of the outputs. Its docstring is
the algebra: which pairs of actions (A on inputs, B on outputs) satisfy f(A x) = B f(x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qcompile.passes.spaces.walk import NodeView


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        apply: the function.
        always: called even if no input carries channels, because it creates them from constants.
        pointwise: the operator treats every position by itself and broadcasts its operands.
    """

    apply: Callable[[NodeView], None]
    always: bool = False
    pointwise: bool = False

    @property
    def algebra(self) -> str:
        """The law, as written in the rule."""
        return (self.apply.__doc__ or "").strip()


RULES: dict[tuple[str, str], Rule] = {}


def rule(
    *ops: str, domain: str = "", always: bool = False, pointwise: bool = False
) -> Callable[[Callable[[NodeView], None]], Callable]:
    """Register a function as the rule of ``ops``. For the flags see `Rule`.

    Raises:
        ValueError: an operator already has a rule.
    """

    def register(function: Callable[[NodeView], None]) -> Callable[[NodeView], None]:
        for op in ops:
            if (domain, op) in RULES:
                raise ValueError(f"operator {domain}::{op} already has a rule")
            RULES[(domain, op)] = Rule(function, always, pointwise)
        return function

    return register
