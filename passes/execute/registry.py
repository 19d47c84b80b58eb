"""Implementations of ONNX operators by name. Each takes the node (for attributes), the float type and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.passes.graph import attribute

OPERATORS: dict[str, Callable[..., Any]] = {}


def op(*names: str) -> Callable[[Callable], Callable]:
    """Register an implementation."""

    def register(function: Callable) -> Callable:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def plain(functions: dict[str, Callable[..., Any]]) -> None:
    """Register functions of the inputs alone."""
    for name, function in functions.items():
        OPERATORS[name] = lambda node, ft, *a, function=function: function(*a)


def ints(x: torch.Tensor) -> list[int]:
    """Numbers that a shape, axes and the like are given as."""
    return [int(v) for v in x.reshape(-1).tolist()]


def axes_of(node, given):
    """Axes given as an input, or by older operators as an attribute; None if they are not."""
    return ints(given) if given is not None else attribute(node, "axes")
