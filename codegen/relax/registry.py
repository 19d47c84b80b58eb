"""Which function converts which operator.

A converter is a plain function::

    @converter("", "Relu")
    def relu(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr: ...

It gets one argument per input of the node (``None`` where an optional input is absent) and returns one expression, or a
list with one per output. Several converters may be registered for one operator: the one with the highest priority (the
latest among equals) is asked first, and passes the node on to the next by returning ``NotImplemented``. That is how a
target or a kernel family puts its own implementation in front of the general one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Converter = Callable[..., Any]


@dataclass(frozen=True)
class Registration:
    """One registered converter.

    Attributes:
        function: the converter.
        kinds: target kinds it is for; empty means any, and conversion without a target.
        priority: higher is asked first.
    """

    function: Converter
    kinds: frozenset[str] = frozenset()
    priority: int = 0


_CONVERTERS: dict[tuple[str, str], list[Registration]] = {}


def converter(
    domain: str, *op_types: str, kinds: tuple[str, ...] = (), priority: int = 0
) -> Callable[[Converter], Converter]:
    """Registers a converter for operators of ``domain`` (``""`` is ONNX's own).

    Args:
        domain: the operators' domain.
        op_types: one or more operator names.
        kinds: target kinds (``x86``, ``arm``, ``cuda`` ...) this implementation is for; all when empty.
        priority: which of several converters is asked first.
    """

    def register(function: Converter) -> Converter:
        for op_type in op_types:
            entries = _CONVERTERS.setdefault((_canonical(domain), op_type), [])
            entries.insert(0, Registration(function, frozenset(kinds), priority))
            entries.sort(key=lambda entry: -entry.priority)
        return function

    return register


def converters(domain: str, op_type: str, kind: str | None = None) -> list[Converter]:
    """The converters to try for an operator on a target kind, in order."""
    found = _CONVERTERS.get((_canonical(domain), op_type), [])
    return [entry.function for entry in found if not entry.kinds or kind in entry.kinds]


def registered() -> list[tuple[str, str]]:
    """All operators with a converter, sorted."""
    return sorted(_CONVERTERS)


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
