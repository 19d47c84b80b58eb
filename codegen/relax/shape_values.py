"""Evaluation of shape arithmetic at conversion.

Exporters express a dynamic shape as a little graph: ``Shape``, then ``Gather``/``Slice`` of one dimension, arithmetic,
``Concat``, and at the end a ``Reshape``, ``Expand``, ``Range`` ... that needs the numbers. Here a small integer tensor is an
object array whose elements are Python integers or expressions of the program's dimensions, and the operators of such
chains act on those arrays element by element, so the end of the chain knows its shape symbolically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import SYMBOLIC_LIMIT, Context, object_array
from qcompile.codegen.relax.dims import as_expr

if TYPE_CHECKING:
    Evaluator = Callable[[Context, ir.Node, list[np.ndarray | None]], np.ndarray | None]

_EVALUATORS: dict[str, Any] = {}


def _evaluates(*op_types: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for op_type in op_types:
            _EVALUATORS[op_type] = function
        return function

    return register


def evaluate(ctx: Context, node: ir.Node) -> np.ndarray | None:
    """The symbolic value of a node's (only) output, or ``None`` if it is not one."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    if node.op_type in ("Shape", "Size"):
        return _shape_or_size(ctx, node)
    function = _EVALUATORS.get(node.op_type)
    if function is None:
        return None
    inputs = []
    for value in node.inputs:
        symbolic = ctx.symbolic(value)
        if value is not None and symbolic is None:
            return None
        inputs.append(symbolic)
    symbolic_input = any(x is not None and any(not isinstance(e, int) for e in x.reshape(-1)) for x in inputs)
    if not symbolic_input and node.op_type != "ConstantOfShape":
        return None  # a plain constant: folding does that with the operator's exact semantics
    result = function(ctx, node, inputs)
    return result if result is not None and result.size <= SYMBOLIC_LIMIT else None


def _shape_or_size(ctx: Context, node: ir.Node) -> np.ndarray | None:
    known = ctx.known(node.inputs[0])
    if known.sequence is not None:
        return None
    if known.symbolic is not None:
        shape: list[Any] = list(known.symbolic.shape)
    elif known.tensor is not None or known.constant is not None:
        shape = list((known.constant if known.constant is not None else known.tensor).shape)
    else:
        shape = ctx.shape(known.expr)
    if node.op_type == "Size":
        return _array(ctx.dims.product(shape), ())
    rank = len(shape)
    start, end = attr(node, "start", 0), attr(node, "end", rank)
    start = min(max(start + rank if start < 0 else start, 0), rank)
    end = min(max(end + rank if end < 0 else end, 0), rank)
    return _array(shape[start:end], (max(end - start, 0),))


def _array(elements: Any, shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(shape, dtype=object)
    if shape == ():
        result[()] = elements
    else:
        for i, e in enumerate(elements):
            result.reshape(-1)[i] = e
    return result


def _elementwise(function: Callable[..., Any]) -> Any:
    """An evaluator applying ``function`` to the broadcast elements."""

    def evaluator(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
        arrays = np.broadcast_arrays(*inputs)
        result = np.empty(arrays[0].shape, dtype=object)
        for index in np.ndindex(*result.shape):
            result[index] = function(ctx, *(a[index] for a in arrays))
        return result

    return evaluator


def _integral(ctx: Context, value: Any) -> Any:
    return int(value) if isinstance(value, bool | int) else ctx.dims.simplify(value)


def _divide(ctx: Context, a: Any, b: Any) -> Any:
    """Integer division as ONNX defines it, rounding towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    if ctx.dims.provable(as_expr(a) >= 0) and ctx.dims.provable(as_expr(b) > 0):
        return ctx.dims.floordiv(a, b)
    return ctx.dims.simplify(tirx.truncdiv(as_expr(a), as_expr(b)))


def _modulo(ctx: Context, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    return ctx.dims.simplify(tirx.floormod(as_expr(a), as_expr(b)))


def _compare(python: Callable[[int, int], bool], expr: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def compare(ctx: Context, a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return python(a, b)
        condition = ctx.dims.analyzer.simplify(expr(as_expr(a), as_expr(b)))
        return bool(condition) if isinstance(condition, tirx.IntImm) else condition

    return compare


def _where(ctx: Context, condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool | int):
        return a if condition else b
    return ctx.dims.select(condition, a, b)


def _absolute(ctx: Context, a: Any) -> Any:
    return abs(a) if isinstance(a, int) else ctx.dims.select(a >= 0, a, -a)


_EVALUATORS.update(
    {
        "Add": _elementwise(lambda ctx, a, b: _integral(ctx, a + b)),
        "Sub": _elementwise(lambda ctx, a, b: _integral(ctx, a - b)),
        "Mul": _elementwise(lambda ctx, a, b: _integral(ctx, a * b)),
        "Neg": _elementwise(lambda ctx, a: _integral(ctx, -a)),
        "Abs": _elementwise(_absolute),
        "Div": _elementwise(_divide),
        "Min": _elementwise(lambda ctx, *a: _fold(ctx.dims.minimum, a)),
        "Max": _elementwise(lambda ctx, *a: _fold(ctx.dims.maximum, a)),
        "Equal": _elementwise(_compare(lambda a, b: a == b, tirx.EQ)),
        "Less": _elementwise(_compare(lambda a, b: a < b, tirx.LT)),
        "LessOrEqual": _elementwise(_compare(lambda a, b: a <= b, tirx.LE)),
        "Greater": _elementwise(_compare(lambda a, b: a > b, tirx.GT)),
        "GreaterOrEqual": _elementwise(_compare(lambda a, b: a >= b, tirx.GE)),
        "Not": _elementwise(lambda ctx, a: not a if isinstance(a, bool) else tirx.Not(a)),
        "Where": _elementwise(_where),
        "Identity": _elementwise(lambda ctx, a: a),
    }
)


def _fold(function: Callable[[Any, Any], Any], values: tuple[Any, ...]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


@_evaluates("Mod")
def _mod(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    return None if attr(node, "fmod", 0) else _elementwise(_modulo)(ctx, node, inputs)


@_evaluates("Cast")
def _cast(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    """Between the wide integers only: dimensions are assumed to fit them."""
    wide = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.UINT64)
    if ir.DataType(attr(node, "to")) not in wide or ctx.dtype(node.inputs[0]) not in (*wide, ir.DataType.BOOL):
        return None

    def integer(_: Context, a: Any) -> Any:
        if isinstance(a, bool | int):
            return int(a)
        return a if str(a.ty.dtype) == "int64" else tirx.Select(a, as_expr(1), as_expr(0))

    return _elementwise(integer)(ctx, node, inputs)


@_evaluates("Gather")
def _gather(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    data, indices = inputs
    if data.ndim == 0 or any(not isinstance(i, int) for i in indices.reshape(-1)):
        return None
    axis = attr(node, "axis", 0) % data.ndim
    return _as_objects(np.take(data, indices.astype(np.int64), axis=axis))


@_evaluates("Concat")
def _concat(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(inputs, axis=attr(node, "axis", 0))


@_evaluates("Squeeze")
def _squeeze(ctx: Context, node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    axes = _axes(node, inputs)
    return _as_objects(np.squeeze(_given(inputs[0]), axis=None if axes is None else tuple(axes)))


@_evaluates("Unsqueeze")
def _unsqueeze(ctx: Context, node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    axes = _axes(node, inputs)
    return None if axes is None else _as_objects(np.expand_dims(_given(inputs[0]), tuple(axes)))


def _given(value: np.ndarray | None) -> np.ndarray:
    """An input that the operator cannot do without."""
    assert value is not None
    return value


def _axes(node: ir.Node, inputs: list[np.ndarray | None]) -> list[int] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return [int(a) for a in inputs[1].reshape(-1)]
    axes = attr(node, "axes", None)
    return None if axes is None else list(axes)


@_evaluates("Reshape")
def _reshape(ctx: Context, node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    data = _given(inputs[0])
    shape = _given(inputs[1]) if len(inputs) > 1 else object_array(np.array(attr(node, "shape", ())))
    if any(not isinstance(d, int) for d in shape) or (0 in shape and not attr(node, "allowzero", 0)):
        return None
    return data.reshape([int(d) for d in shape])


@_evaluates("Slice")
def _slice(ctx: Context, node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    data = _given(inputs[0])
    axes: Iterable[Any]
    steps: Iterable[Any]
    if len(inputs) == 1:
        starts, ends = attr(node, "starts"), attr(node, "ends")
        axes, steps = attr(node, "axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = _given(inputs[1]), _given(inputs[2])
        axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
        steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    if any(not isinstance(v, int) for vector in (starts, ends, axes, steps) for v in vector):
        return None
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps):
        size = data.shape[axis]
        if step < 0:
            start, end = (min(v + size if v < 0 else v, size - 1) for v in (start, end))
            index[axis] = slice(max(start, -1), None if end < 0 else end, step) if start >= 0 else slice(0, 0)
        else:
            index[axis] = slice(start, end, step)
    return data[tuple(index)]


@_evaluates("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(ctx: Context, node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    data, axes = _given(inputs[0]), _axes(node, inputs)
    if (axes is not None and len(axes) > 1) or data.ndim != 1 or data.size == 0:
        return None
    if not axes and attr(node, "noop_with_empty_axes", 0):
        return data
    combine = {
        "ReduceProd": lambda a, b: _integral(ctx, a * b),
        "ReduceSum": lambda a, b: _integral(ctx, a + b),
        "ReduceMax": ctx.dims.maximum,
        "ReduceMin": ctx.dims.minimum,
    }[node.op_type]
    result = _array(_fold(combine, tuple(data)), ())
    return result.reshape(1) if attr(node, "keepdims", 1) else result


@_evaluates("Range")
def _range(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    start, limit, step = (x[()] if x.ndim == 0 else x.reshape(-1)[0] for x in inputs)
    if not isinstance(step, int) or step == 0:
        return None
    distance = ctx.dims.simplify(limit - start)
    if not isinstance(distance, int):
        return None
    count = max(math.ceil(distance / step), 0)
    return (
        None if count > SYMBOLIC_LIMIT else _array([_integral(ctx, start + i * step) for i in range(count)], (count,))
    )


@_evaluates("Expand")
def _expand(ctx: Context, node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    data, shape = inputs
    if any(not isinstance(d, int) for d in shape) or math.prod(shape) > SYMBOLIC_LIMIT:
        return None
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(shape))).copy()


def _as_objects(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    return _array(value, ())
