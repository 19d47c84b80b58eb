"""Integer expressions over run-time extents: their value, and the same as C.

Extents are not negative, and divisors are positive, so C's division rounds like TIR's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx

from qcompile.errors import UnsupportedOperatorError

_BINARY: list[tuple[Any, Callable[[int, int], int], str]] = [
    (tirx.Add, operator.add, "({} + {})"),
    (tirx.Sub, operator.sub, "({} - {})"),
    (tirx.Mul, operator.mul, "({} * {})"),
    (tirx.FloorDiv, operator.floordiv, "({} / {})"),
    (tirx.Div, operator.floordiv, "({} / {})"),
    (tirx.FloorMod, operator.mod, "({} % {})"),
    (tirx.Mod, operator.mod, "({} % {})"),
    (tirx.Min, min, "QC_MIN({}, {})"),
    (tirx.Max, max, "QC_MAX({}, {})"),
    (tirx.LT, operator.lt, "({} < {})"),
    (tirx.LE, operator.le, "({} <= {})"),
    (tirx.GT, operator.gt, "({} > {})"),
    (tirx.GE, operator.ge, "({} >= {})"),
    (tirx.EQ, operator.eq, "({} == {})"),
    (tirx.NE, operator.ne, "({} != {})"),
]


def evaluate(expr: Any, values: Mapping[Any, int]) -> int:
    """The value of ``expr`` where its variables have ``values``.

    Raises:
        UnsupportedOperatorError: it is not an expression over extents.
    """
    return _fold(expr, lambda v: values[v], int, lambda f, _, a, b: f(a, b), lambda c, a, b: a if c else b)


def c_expression(expr: Any, names: Mapping[Any, str]) -> str:
    """``expr`` in C, int64, with variables called ``names``.

    Raises:
        UnsupportedOperatorError: it is not an expression over extents.
    """
    return _fold(
        expr, lambda v: names[v], str, lambda _, form, a, b: form.format(a, b), lambda c, a, b: f"({c} ? {a} : {b})"
    )


def _fold(expr: Any, variable: Callable, constant: Callable, binary: Callable, choose: Callable) -> Any:
    def visit(e: Any) -> Any:
        if isinstance(e, int):
            return constant(e)
        if isinstance(e, tirx.IntImm):
            return constant(int(e))
        if isinstance(e, tirx.Var):
            return variable(e)
        if isinstance(e, tirx.Cast):
            return visit(e.value)
        if isinstance(e, tirx.Select):
            return choose(visit(e.condition), visit(e.true_value), visit(e.false_value))
        for kind, function, form in _BINARY:
            if isinstance(e, kind):
                return binary(function, form, visit(e.a), visit(e.b))
        raise UnsupportedOperatorError(f"an extent depends on more than sums and products of others: {e}")

    return visit(expr)
