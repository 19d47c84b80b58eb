"""Patterns over dataflow: written like the expression they match, tried with backtracking.

A pattern is a tree of `Var`, `Const`, `Op` and `Either`. ``match(pattern, value)`` looks at how ``value`` is computed and
yields every `Match`: variables bound to values (the same name twice must mean the same value), constants bound to
arrays, operators bound to nodes. Add, Mul and the other commutative operators are tried both ways round.

    x = Var("x")
    swish = Op("Mul", x, Op("Sigmoid", x))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import constant

_LARGEST = 1 << 22
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Max", "Min", "Equal"})


@dataclass(frozen=True)
class Match:
    """What a pattern stood for: ``values`` by variable name, ``constants`` by name, ``nodes`` in order of discovery."""

    values: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    named: dict[str, ir.Node] = field(default_factory=dict)
    nodes: tuple[ir.Node, ...] = ()

    def scalar(self, name: str) -> float | None:
        """The constant as a number, if it has one element."""
        array = self.constants[name]
        return float(array.reshape(())) if array.size == 1 else None


class Pattern:
    """Base of all pattern nodes."""

    def bind(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """Yield every extension of ``match`` under which this pattern describes ``value``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """Any value; the same one wherever the name is repeated."""

    name: str

    def bind(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        if value is None:
            return
        known = match.values.get(self.name)
        if known is None:
            yield Match({**match.values, self.name: value}, match.constants, match.named, match.nodes)
        elif known is value:
            yield match


@dataclass(frozen=True)
class Const(Pattern):
    """A constant; with ``near`` only a single number equal to it within ``tolerance`` (relative)."""

    name: str = ""
    near: float | None = None
    tolerance: float = 1e-4

    def bind(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        array = small_constant(value, 1 if self.near is not None else _LARGEST)
        if array is None:
            return
        if self.near is not None and not (
            array.size == 1 and np.isclose(float(array.reshape(())), self.near, rtol=self.tolerance, atol=0)
        ):
            return
        if not self.name:
            yield match
            return
        yield Match(match.values, {**match.constants, self.name: array}, match.named, match.nodes)


@dataclass(frozen=True, init=False)
class Op(Pattern):
    """The result of an operator of the default domain. Inputs beyond those given must be absent unless ``more``."""

    kinds: tuple[str, ...]
    inputs: tuple[Pattern, ...]
    name: str
    more: bool

    def __init__(self, kind: str | tuple[str, ...], *inputs: Pattern, name: str = "", more: bool = False) -> None:
        object.__setattr__(self, "kinds", (kind,) if isinstance(kind, str) else kind)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "more", more)

    def bind(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        node = value.producer() if value is not None else None
        if node is None or node.domain != "" or node.op_type not in self.kinds or value is not node.outputs[0]:
            return
        given = node.inputs
        if len(given) < len(self.inputs) or (not self.more and any(v is not None for v in given[len(self.inputs) :])):
            return
        named = {**match.named, self.name: node} if self.name else match.named
        nodes = match.nodes if node in match.nodes else (*match.nodes, node)
        start = Match(match.values, match.constants, named, nodes)
        orders = permutations(self.inputs) if node.op_type in COMMUTATIVE else (self.inputs,)
        for order in orders:
            yield from _bind_all(order, given, start)


@dataclass(frozen=True, init=False)
class Either(Pattern):
    """Any of several forms of one expression."""

    forms: tuple[Pattern, ...]

    def __init__(self, *forms: Pattern) -> None:
        object.__setattr__(self, "forms", forms)

    def bind(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        for form in self.forms:
            yield from form.bind(value, match)


def _bind_all(patterns: tuple[Pattern, ...], values: Sequence[ir.Value | None], match: Match) -> Iterator[Match]:
    if not patterns:
        yield match
        return
    for extended in patterns[0].bind(values[0], match):
        yield from _bind_all(patterns[1:], values[1:], extended)


def match(pattern: Pattern, value: ir.Value) -> Iterator[Match]:
    """All ways in which ``pattern`` describes how ``value`` is computed."""
    return pattern.bind(value, Match())


def first(pattern: Pattern, value: ir.Value) -> Match | None:
    """The first match, or None."""
    return next(match(pattern, value), None)


def small_constant(value: ir.Value | None, limit: int = _LARGEST) -> np.ndarray | None:
    """Value of a constant of at most ``limit`` elements; weights beyond that are not loaded to match patterns."""
    if value is None or (value.const_value is not None and value.const_value.size > limit):
        return None
    return constant(value)


def outside_readers(matched: tuple[ir.Node, ...], result: ir.Value) -> ir.Value | None:
    """An intermediate value that something outside the match reads, or that is a graph output; None if there is none."""
    inside = set(matched)
    for node in matched:
        for value in node.outputs:
            if value is result:
                continue
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                return value
    return None
