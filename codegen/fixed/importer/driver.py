"""The walk over a quantized model: every node of the ONNX graph becomes nodes of a program, or an error that names it.

Constants are folded on the way. Registered handlers (`operator`) give the meaning of every operator on `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.importer.values import Builder, Codes, Constant, Pending, Real
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import UnsupportedOperatorError
from qcompile.formats.fixed import IntType

Value: TypeAlias = Constant | Codes | Real | Pending

OUTPUT_BITS = 16
"""Bits of outputs that no quantizer of the model narrows."""


@dataclass(frozen=True)
class Port:
    """An input or output of the model and the stream that carries it.

    Attributes:
        name: in the model.
        shape: without the batch axis.
        stream: name of the stream.
        index: positions of the elements in a frame, of ``shape``.
        scale: of the stream.
    """

    name: str
    shape: tuple[int, ...]
    stream: str
    index: np.ndarray
    scale: float


@dataclass(frozen=True)
class Note:
    """Something a user should know of the import: what, of which tensor, and why."""

    what: str
    where: str
    reason: str


@dataclass(frozen=True)
class Imported:
    """A program, how the model's tensors map to its streams, and what was lost on the way."""

    program: Program
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    notes: tuple[Note, ...] = ()


class Context:
    """What handlers share."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.builder = Builder()
        self.values: dict[ir.Value, Value] = {}
        self.inputs: list[Port] = []
        self.streams: list[Stream] = []
        self.notes: list[Note] = []

    def get(self, value: ir.Value | None, node: ir.Node) -> Value:
        """What is known of an input.

        Raises:
            UnsupportedOperatorError: nothing is.
        """
        if value is None:
            raise UnsupportedOperatorError(f"{label(node)}: an input is missing")
        if value not in self.values:
            if value.const_value is None:
                if value.is_graph_input() and value.dtype is not None and not value.dtype.is_floating_point():
                    raise UnsupportedOperatorError(
                        f"{label(node)}: the input {value.name!r} is {value.dtype.name}; hardware takes numbers, not "
                        "indices: let the model begin with what is looked up"
                    )
                raise UnsupportedOperatorError(f"{label(node)}: its input {value.name!r} is not quantized")
            self.values[value] = Constant(np.asarray(value.const_value.numpy()))
        return self.values[value]

    def constant(self, value: ir.Value | None, node: ir.Node) -> np.ndarray:
        """A constant input."""
        found = self.get(value, node)
        if not isinstance(found, Constant | Codes):
            raise UnsupportedOperatorError(f"{label(node)}: {value.name if value else ''!r} must be constant")
        return found.array

    def real(self, value: ir.Value | None, node: ir.Node) -> Real:
        """An input that is integers."""
        found = self.get(value, node)
        if not isinstance(found, Real):
            raise UnsupportedOperatorError(
                f"{label(node)}: its input {value.name if value else ''!r} is not quantized; put QuantizeLinear and "
                "DequantizeLinear in front of it"
            )
        return found

    def shape(self, value: ir.Value, node: ir.Node) -> tuple[int, ...]:
        """The static shape of a value without its batch axis."""
        dims = None if value.shape is None else list(value.shape)[1:]
        if dims is None or not all(isinstance(d, int) for d in dims):
            raise UnsupportedOperatorError(f"{label(node)}: the shape of {value.name!r} is not static: {value.shape}")
        return tuple(int(d) for d in dims)  # type: ignore[arg-type]


Handler = Callable[[Context, ir.Node], Value | list[Value]]
HANDLERS: dict[tuple[str, str], Handler] = {}


def operator(*names: str, domain: str = "") -> Callable[[Handler], Handler]:
    """Register a handler; it returns the value of the first output, or of all."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[domain, name] = handler
        return handler

    return register


def label(node: ir.Node) -> str:
    """How messages name a node."""
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"


def _listed(nodes: list[ir.Node], most: int = 6) -> str:
    """Nodes by name, one of every operator first, and "has" or "have"."""
    firsts: dict[tuple[str, str], ir.Node] = {}
    for node in nodes:
        firsts.setdefault((node.domain, node.op_type), node)
    words = [f"{n.domain}::{label(n)}" if n.domain else label(n) for n in list(firsts.values())[:most]]
    more = len(nodes) - len(words)
    if more:
        words.append(f"{more} more")
    return f"{', '.join(words)} {'have' if len(words) > 1 else 'has'}"


def import_model(model: ir.Model, name: str) -> Imported:
    """Turn a model in which every operand is quantized into a program.

    Args:
        model: with static shapes but for the batch axis, which comes first everywhere.
        name: of the program, an identifier.

    Raises:
        UnsupportedOperatorError: an operator has no fixed-point node, or its operands are not quantized; names it.
    """
    from qcompile.codegen.fixed.importer import operators  # noqa: F401  (registers the handlers)

    context = Context(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        context.builder.names |= {value.name or "", (value.name or "").lower()}
    unknown = [node for node in model.graph if (node.domain, node.op_type) not in HANDLERS]
    if unknown:
        raise UnsupportedOperatorError(
            f"{_listed(unknown)} no fixed-point form; rewrite the model without, or compile for another target"
        )
    for node in model.graph:
        results = HANDLERS[node.domain, node.op_type](context, node)
        for out, value in zip(node.outputs, results if isinstance(results, list) else [results]):
            context.values[out] = value
    outputs = [_output(context, value) for value in model.graph.outputs]
    program = Program(name, tuple(context.streams), tuple(context.builder.nodes), tuple(p.stream for p in outputs))
    return Imported(_prune(program), tuple(context.inputs), tuple(outputs), tuple(context.notes))


def _output(context: Context, value: ir.Value) -> Port:
    found = context.values.get(value)
    if isinstance(found, Pending):
        kind = IntType(OUTPUT_BITS, True)
        # A power of two: a shift wherever what is summed allows one.
        scale = 2.0 ** np.ceil(np.log2(max(found.reach(), 1e-30) / kind.high))
        found = found.quantize(context.builder, float(scale), -kind.high, kind.high)
    if not isinstance(found, Real) or found.log2:
        raise UnsupportedOperatorError(f"the output {value.name!r} is not computed from quantized values")
    return Port(value.name or "output", found.index.shape, found.stream.name, found.index, found.scale)


def _prune(program: Program) -> Program:
    """Without nodes that no output needs."""
    needed, kept = set(program.outputs), []
    for node in reversed(program.nodes):
        if node.name in needed:
            kept.append(node)
            needed |= {s.name for s in node.inputs}
    return Program(program.name, program.inputs, tuple(reversed(kept)), program.outputs)
