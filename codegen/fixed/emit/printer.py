"""Scheduled TIR as C: a walk over loops, stores and integer expressions, parametrised by a dialect.

TVM's own ``c`` target wraps functions in its run-time's calling convention and drops loop annotations; this printer keeps
both plain. Only what fixed-point programs contain is handled; anything else is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import singledispatchmethod
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from qcompile.codegen.fixed.nodes.base import Node
from qcompile.errors import UnsupportedOperatorError
from qcompile.formats.fixed import IntType

_BINARY: dict[type, str] = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "/",
    tirx.FloorMod: "%",
    tirx.Div: "/",
    tirx.Mod: "%",
    tirx.EQ: "==",
    tirx.NE: "!=",
    tirx.LT: "<",
    tirx.LE: "<=",
    tirx.GT: ">",
    tirx.GE: ">=",
    tirx.And: "&&",
    tirx.Or: "||",
    tirx.RShift: ">>",
    tirx.LShift: "<<",
    tirx.BitwiseAnd: "&",
    tirx.BitwiseOr: "|",
    tirx.BitwiseXor: "^",
}
_CALLS = {
    "tirx.shift_right": ">>",
    "tirx.shift_left": "<<",
    "tirx.bitwise_and": "&",
    "tirx.bitwise_or": "|",
    "tirx.bitwise_xor": "^",
}


class Dialect:
    """What differs between C99 and HLS C++."""

    def type(self, dtype: str, narrow: IntType | None = None) -> str:
        """Name of a machine type, or of a narrower one where it is known."""
        raise NotImplementedError

    def literal(self, value: int, dtype: str) -> str:
        """An integer constant."""
        raise NotImplementedError

    def cast(self, dtype: str, value: str) -> str:
        """A conversion."""
        return f"({self.type(dtype)})({value})"

    def extreme(self, name: str, dtype: str, a: str, b: str) -> str:
        """``min`` or ``max`` of two values."""
        raise NotImplementedError

    def loop_pragmas(self, annotations: Mapping[str, int]) -> Iterator[str]:
        """Lines at the top of a loop's body."""
        yield from ()

    def buffer_pragmas(self, name: str) -> Iterator[str]:
        """Lines after the declaration of a local array."""
        yield from ()


def node_function(node: Node, dialect: Dialect) -> str:
    """The constants that are used and the function of one node: ``static void node_NAME(inputs, y)``."""
    from qcompile.codegen.fixed.tir import build

    names = {name: f"{node.name}_{name}" for name in node.constants}
    printer = FunctionPrinter(dialect, node.locals, names, node.name)
    body = printer.body(build.lower(node))
    text = []
    for name, values in node.constants.items():
        if name in printer.used:
            kind = build.constant_type(values)
            shape = "".join(f"[{d}]" for d in values.shape)
            text.append(f"static const {dialect.type(kind.dtype, kind)} {names[name]}{shape} = {array(values)};")
    parameters = [
        f"{const}{dialect.type(s.type.dtype, s.type)} {name}[{s.tokens}][{s.channels}]"
        for const, name, s in [
            *(("const ", name, s) for name, s in zip(build.input_names(node), node.inputs)),
            ("", build.OUTPUT, node.output),
        ]
    ]
    return "\n".join([*text, f"static void {function_name(node)}({', '.join(parameters)}) {{", *body, "}", ""])


def function_name(node: Node) -> str:
    """Name of a node's function; the plain name is that of its stream."""
    return f"node_{node.name}"


class FunctionPrinter:
    """Prints the body of one lowered PrimFunc.

    Attributes:
        dialect: the language.
        narrow: narrowest types of parameters and local buffers, by name.
        names: names of parameters in the text, where they differ.
    """

    def __init__(self, dialect: Dialect, narrow: Mapping[str, IntType], names: Mapping[str, str], where: str) -> None:
        self.dialect, self.narrow, self.names, self.where = dialect, narrow, names, where
        self.lines: list[str] = []
        self.used: set[str] = set()
        self._depth = 1
        self._pending: list[str] = []

    def body(self, function: Any) -> list[str]:
        """The statements of ``function``, indented by one level."""
        self._statement(function.body)
        return self.lines

    def _put(self, text: str) -> None:
        self.lines.append("  " * self._depth + text)

    def _unsupported(self, what: Any) -> UnsupportedOperatorError:
        return UnsupportedOperatorError(f"{self.where}: {type(what).__name__} cannot be printed: {what}")

    def expression(self, x: Any) -> str:
        """One expression; lets inside it are put aside as declarations."""
        if (symbol := _BINARY.get(type(x))) is not None:
            return f"({self.expression(x.a)} {symbol} {self.expression(x.b)})"
        match x:
            case tirx.IntImm():
                return self.dialect.literal(int(x.value), _dtype(x))
            case tirx.Cast():
                return self.dialect.cast(_dtype(x), self.expression(x.value))
            case tirx.Not():
                return f"!{self.expression(x.a)}"
            case tirx.Min() | tirx.Max():
                which = "min" if isinstance(x, tirx.Min) else "max"
                return self.dialect.extreme(which, _dtype(x), self.expression(x.a), self.expression(x.b))
            case tirx.Select():
                return self._choice(x, x.condition, x.true_value, x.false_value)
            case tirx.Let():
                value = self.expression(x.value)
                let = self.dialect.type(_dtype(x.value), self.narrow.get(x.var.name))
                self._pending.append(f"const {let} {x.var.name} = {value};")
                return self.expression(x.body)
            case tirx.Var():
                return x.name
            case tvm.ir.TensorLoad():
                return self._element(x.source, x.indices)
        name = getattr(getattr(x, "op", None), "name", None)
        if name in _CALLS:
            return f"({self.expression(x.args[0])} {_CALLS[name]} {self.expression(x.args[1])})"
        if name == "prim.if_then_else":
            return self._choice(x, *x.args)
        raise self._unsupported(x)

    def _choice(self, whole: Any, condition: Any, then: Any, other: Any) -> str:
        arms = [self.dialect.cast(_dtype(whole), self.expression(arm)) for arm in (then, other)]
        return f"({self.expression(condition)} ? {arms[0]} : {arms[1]})"

    def _element(self, buffer: Any, indices: Any) -> str:
        self.used.add(buffer.name)
        return self.names.get(buffer.name, buffer.name) + "".join(f"[{self._index(i)}]" for i in indices)

    def _index(self, x: Any) -> str:
        text = self.expression(x)
        return text[1:-1] if text.startswith("(") and _matches(text) else text

    @singledispatchmethod
    def _statement(self, x: Any) -> None:
        raise self._unsupported(x)

    @_statement.register
    def _(self, x: tirx.SeqStmt) -> None:
        for part in x.seq:
            self._statement(part)

    @_statement.register
    def _(self, x: tirx.AllocBuffer) -> None:
        buffer = x.buffer
        shape = "".join(f"[{int(d)}]" for d in buffer.shape)
        self._put(f"{self.dialect.type(str(buffer.dtype), self.narrow.get(buffer.name))} {buffer.name}{shape};")
        for line in self.dialect.buffer_pragmas(buffer.name):
            self._put(line)

    @_statement.register
    def _(self, x: tirx.For) -> None:
        name, start = x.loop_var.name, int(x.min)
        self._put(f"for (int {name} = {start}; {name} < {start + int(x.extent)}; ++{name}) {{")
        self._depth += 1
        for line in self.dialect.loop_pragmas({str(k): int(v) for k, v in x.annotations.items()}):
            self._put(line)
        self._statement(x.body)
        self._depth -= 1
        self._put("}")

    @_statement.register
    def _(self, x: tirx.BufferStore) -> None:
        value = self.expression(x.value)
        declarations, self._pending = self._pending, []
        store = f"{self._element(x.buffer, x.indices)} = {_strip(value)};"
        if not declarations:
            self._put(store)
            return
        self._put("{")
        for line in [*declarations, store]:
            self._put("  " + line)
        self._put("}")

    @_statement.register
    def _(self, x: tirx.IfThenElse) -> None:
        self._put(f"if ({_strip(self.expression(x.condition))}) {{")
        self._depth += 1
        self._statement(x.then_case)
        self._depth -= 1
        if x.else_case is not None:
            self._put("} else {")
            self._depth += 1
            self._statement(x.else_case)
            self._depth -= 1
        self._put("}")

    @_statement.register
    def _(self, x: tirx.Bind) -> None:
        self._put(f"const {self.dialect.type(_dtype(x.value))} {x.var.name} = {_strip(self.expression(x.value))};")

    @_statement.register
    def _(self, x: tirx.Evaluate) -> None:
        if not isinstance(x.value, tirx.IntImm):
            raise self._unsupported(x)


def array(values: np.ndarray, width: int = 110) -> str:
    """A nested initialiser in braces, broken into lines."""
    if values.ndim == 0:
        return str(int(values))
    if values.ndim > 1:
        return "{\n" + ",\n".join(array(v, width) for v in values) + "\n}"
    rows, row = [], ""
    for text in (str(int(v)) for v in values):
        if len(row) + len(text) + 2 > width:
            rows.append(row)
            row = ""
        row += f"{text}, "
    return "{" + "\n ".join([*rows, row.removesuffix(", ")]) + "}"


def _dtype(x: Any) -> str:
    return str(x.ty if hasattr(x, "ty") else x.dtype)


def _strip(text: str) -> str:
    return text[1:-1] if text.startswith("(") and _matches(text) else text


def _matches(text: str) -> bool:
    """Whether the first parenthesis closes with the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position == len(text) - 1
    return False
