"""Arithmetic on dimensions: Python integers where known, int64 TIR expressions where symbolic.

Every tensor of a converted program has a shape of such dimensions, so output shapes are computed, never guessed. Where two
dimensions cannot be proved equal but the operator needs them to be, the program checks it when it runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

Dim = Any
"""``int`` or an int64 expression of ``tirx.Var``s."""

_MAX_DIM = 1 << 40


class DimArithmetic:
    """Simplifies and compares dimensions, knowing that none of them is negative.

    Attributes:
        run_time: variables that are no dimension of an input, but read or computed when the program runs.
    """

    def __init__(self) -> None:
        self.analyzer = tvm.sym.Analyzer()
        self._vars: dict[str, tirx.Var] = {}
        self.run_time: set[tirx.Var] = set()

    def var(self, name: str, *, unique: bool = False, signed: bool = False) -> tirx.Var:
        """The variable called ``name``: the same object each time, or a new one with a numbered name if ``unique``."""
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "dim"
        if not unique and name in self._vars:
            return self._vars[name]
        if unique:
            base, n = name, 0
            while name in self._vars:
                n += 1
                name = f"{base}_{n}"
        var = tirx.Var(name, "int64")
        if not signed:
            self.analyzer.bind(var, tvm.ir.Range(tirx.const(0, "int64"), tirx.const(_MAX_DIM, "int64")))
        self._vars[name] = var
        return var

    def run_time_var(self, hint: str, *, signed: bool = False) -> tirx.Var:
        """A new variable bound when the program runs; ``signed`` if it may be negative."""
        var = self.var(hint, unique=True, signed=signed)
        self.run_time.add(var)
        return var

    def owns(self, var: Any) -> bool:
        """Whether the variable is one of the program's (and not a loop's)."""
        return any(v.same_as(var) for v in (self._vars.get(var.name),) if v is not None)

    def over_inputs(self, value: Dim) -> bool:
        """Whether the value depends on dimensions of the inputs only."""
        return isinstance(value, int) or not any(v in self.run_time for v in tirx.analysis.undefined_vars(value))

    def parse(self, text: str) -> Dim:
        """A dimension from its name in the model; ``"past + seq"`` becomes the sum, anything unreadable a plain variable."""
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return self.var(text)
        result = self._from_ast(tree, self.var)
        return self.var(text) if result is None else result

    def known(self, text: str) -> Dim | None:
        """A dimension expression over variables that exist already; ``None`` if it names others."""
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return self._vars.get(text)
        return self._from_ast(tree, self._vars.get)

    def _from_ast(self, tree: ast.AST, variable: Callable[[str], Dim | None]) -> Dim | None:
        if isinstance(tree, ast.Name):
            return variable(tree.id)
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.BinOp):
            left, right = self._from_ast(tree.left, variable), self._from_ast(tree.right, variable)
            if left is None or right is None:
                return None
            if isinstance(tree.op, ast.Add):
                return self.simplify(left + right)
            if isinstance(tree.op, ast.Sub):
                return self.simplify(left - right)
            if isinstance(tree.op, ast.Mult):
                return self.simplify(left * right)
            if isinstance(tree.op, ast.FloorDiv):
                return self.floordiv(left, right)
        return None

    def simplify(self, value: Dim) -> Dim:
        """The canonical form; a Python integer if the value is constant."""
        if isinstance(value, int):
            return value
        value = self.analyzer.simplify(as_expr(value))
        return int(value) if isinstance(value, tirx.IntImm) else value

    def equal(self, a: Dim, b: Dim) -> bool:
        """Whether the two are provably equal."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return a is b or self.analyzer.can_prove_equal(as_expr(a), as_expr(b))

    def provable(self, condition: Any) -> bool:
        """Whether a boolean expression is provably true."""
        if isinstance(condition, bool | int):
            return bool(condition)
        return bool(self.analyzer.can_prove(condition))

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The product; 1 for none."""
        result: Dim = 1
        for d in dims:
            result = result * d
        return self.simplify(result)

    def floordiv(self, a: Dim, b: Dim) -> Dim:
        """``floor(a / b)``."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return self.simplify(tirx.floordiv(as_expr(a), as_expr(b)))

    def ceildiv(self, a: Dim, b: Dim) -> Dim:
        """``ceil(a / b)``."""
        return self.floordiv(a + b - 1, b)

    def minimum(self, a: Dim, b: Dim) -> Dim:
        """The smaller of the two."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.simplify(tirx.min(as_expr(a), as_expr(b)))

    def maximum(self, a: Dim, b: Dim) -> Dim:
        """The larger of the two."""
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.simplify(tirx.max(as_expr(a), as_expr(b)))

    def select(self, condition: Any, a: Dim, b: Dim) -> Dim:
        """``a`` if the condition holds, else ``b``."""
        if isinstance(condition, bool | int):
            return a if condition else b
        condition = self.analyzer.simplify(condition)
        if isinstance(condition, tirx.IntImm):
            return a if int(condition) else b
        return self.simplify(tirx.Select(condition, as_expr(a), as_expr(b)))


def as_expr(value: Dim) -> Any:
    """A dimension as an int64 TIR expression."""
    return tirx.const(int(value), "int64") if isinstance(value, int) else value


def dim_text(value: Dim) -> int | str:
    """A dimension for people: an integer, or the expression without dtypes."""
    return value if isinstance(value, int) else re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(value))


def is_static(shape: Sequence[Dim]) -> bool:
    """Whether every dimension is an integer."""
    return all(isinstance(d, int) for d in shape)
