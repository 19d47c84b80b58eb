"""Composites back to primitive operators: the inverse of `qcompile.passes.recognise`, for tools that lack them.

    Swish_a(x)           = x sigmoid(a x)
    RMSNormalization(x)  = x / sqrt(mean(x^2) + eps) * gain
    RotaryEmbedding(x)   = (a cos - b sin, b cos + a sin) on halves or on even and odd channels
    Attention(q, k, v)   = softmax(cap(scale q k^T) + mask) v, keys and values repeated per group of heads

The forms are those that `recognise` leaves: four axes (batch, heads, positions, size), cos and sin tables by batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.graph import attribute, module_path
from qcompile.passes.opset import NEWEST, convert_opset
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.rule import emit, emit_constant, substitute

MASKED = np.float32(np.finfo(np.float32).min)


def decompose(model: ir.Model, kinds: Iterable[str] | None = None, *, keep: Collection[str] = ()) -> ir.Model:
    """Return a copy of ``model`` in which the named composites (default: all of `KINDS`) are primitive operators.

    Functions with bodies are inlined first, but those named in ``keep``.

    Raises:
        UnsupportedOperatorError: a composite has inputs, outputs or axes that `recognise` does not produce.
    """
    model = model.clone()
    convert_opset(model, NEWEST)  # functions can only be inlined into a graph of the same opset
    common_passes.InlinePass(lambda function: function.name not in keep)(model)
    symbols.infer(model)
    wanted = set(KINDS if kinds is None else kinds)
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type in wanted:
            result = node.outputs[0]
            substitute(result, KINDS[node.op_type](node))
    common_passes.DeduplicateInitializersPass(size_limit=16)(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    symbols.infer(model)
    symbols.clear(model)
    return model


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _required(node: ir.Node, index: int) -> ir.Value:
    value = _input(node, index)
    if value is None:
        raise _unsupported(node, f"input {index} is missing")
    return value


def _unsupported(node: ir.Node, reason: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"{node.op_type} '{module_path(node)}' cannot be written in primitive operators: {reason}"
    )


def _constant(node: ir.Node, array: np.ndarray, role: str) -> ir.Value:
    return emit_constant(node, np.asarray(array), f"{node.outputs[0].name}.{role}")


def _ints(node: ir.Node, role: str, *values: int) -> ir.Value:
    return _constant(node, np.array(values, np.int64), role)


def _float(node: ir.Node, value: float, role: str) -> ir.Value:
    data = node.inputs[0]
    dtype = data.dtype.numpy() if data is not None and data.dtype is not None else np.float32
    return _constant(node, np.array(value, dtype), role)


def _swish(node: ir.Node) -> ir.Value:
    x = _required(node, 0)
    alpha = float(attribute(node, "alpha", 1.0))
    inner = x if alpha == 1.0 else emit(node, "Mul", [x, _float(node, alpha, "alpha")], like=x)
    return emit(node, "Mul", [x, emit(node, "Sigmoid", [inner], like=x)], like=node.outputs[0])


def _rms_norm(node: ir.Node) -> ir.Value:
    x, gain = _required(node, 0), _required(node, 1)
    rank = symbols.rank(x)
    if rank is None:
        raise _unsupported(node, "the rank of its input is not known")
    axis = int(attribute(node, "axis", -1)) % rank
    square = emit(node, "Mul", [x, x], like=x)
    mean = emit(node, "ReduceMean", [square, _ints(node, "axes", *range(axis, rank))], {"keepdims": 1})
    shifted = emit(node, "Add", [mean, _float(node, float(attribute(node, "epsilon", 1e-5)), "epsilon")])
    normal = emit(node, "Div", [x, emit(node, "Sqrt", [shifted])], like=x)
    return emit(node, "Mul", [normal, gain], like=node.outputs[0])


def _rotary(node: ir.Node) -> ir.Value:
    x, cos, sin = (_required(node, i) for i in range(3))
    shape = symbols.dims(x)
    if _input(node, 3) is not None or shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        raise _unsupported(node, "it is not on (batch, heads, positions, size) with tables by batch")
    size = int(attribute(node, "rotary_embedding_dim", 0)) or shape[3]
    interleaved = bool(attribute(node, "interleaved", 0))
    last, one = _ints(node, "last", -1), _ints(node, "heads", 1)

    def part(whole: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
        bounds = [_ints(node, "start", start), _ints(node, "end", end), last, _ints(node, "step", step)]
        return emit(node, "Slice", [whole, *bounds])

    turning = part(x, 0, size) if size < shape[3] else x
    half = size // 2
    parts = ((0, size, 2), (1, size, 2)) if interleaved else ((0, half, 1), (half, size, 1))
    a, b = (part(turning, *bounds) for bounds in parts)
    cos, sin = (emit(node, "Unsqueeze", [table, one]) for table in (cos, sin))
    products = {(p, t): emit(node, "Mul", [p, t]) for p in (a, b) for t in (cos, sin)}
    first = emit(node, "Sub", [products[a, cos], products[b, sin]])
    second = emit(node, "Add", [products[b, cos], products[a, sin]])
    if interleaved:
        pairs = emit(node, "Concat", [emit(node, "Unsqueeze", [p, last]) for p in (first, second)], {"axis": -1})
        turned = emit(node, "Reshape", [pairs, _ints(node, "shape", 0, 0, 0, size)])
    else:
        turned = emit(node, "Concat", [first, second], {"axis": -1})
    if size < shape[3]:
        turned = emit(node, "Concat", [turned, part(x, size, shape[3])], {"axis": -1})
    turned.type, turned.shape = x.type, x.shape
    return turned


def _attention(node: ir.Node) -> ir.Value:
    q, k, v = (_required(node, i) for i in range(3))
    mask = _input(node, 3)
    shapes = [symbols.dims(value) for value in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        raise _unsupported(node, "queries, keys and values are not (batch, heads, positions, size)")
    if any(value is not None for value in node.inputs[4:]) or any(o.uses() for o in node.outputs[1:]):
        raise _unsupported(node, "it keeps past keys and values")
    q_shape, k_shape, _ = (shape for shape in shapes if shape is not None)
    heads, kv_heads, size = q_shape[1], k_shape[1], q_shape[3]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not isinstance(size, int):
        raise _unsupported(node, "the number and size of heads are not known")
    if heads != kv_heads:
        k, v = (_repeat(node, value, heads, kv_heads) for value in (k, v))
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(size)
    scores = emit(node, "MatMul", [q, emit(node, "Transpose", [k], {"perm": [0, 1, 3, 2]})])
    scores = emit(node, "Mul", [scores, _float(node, scale, "scale")])
    if cap := float(attribute(node, "softcap", 0.0)):
        bound = _float(node, cap, "softcap")
        scores = emit(node, "Mul", [emit(node, "Tanh", [emit(node, "Div", [scores, bound])]), bound])
    if attribute(node, "is_causal", 0):
        scores = _masked(node, scores, _triangle(node, q, k))
    if mask is not None:
        scores = _masked(node, scores, mask) if mask.dtype == ir.DataType.BOOL else emit(node, "Add", [scores, mask])
    weights = emit(node, "Softmax", [scores], {"axis": -1})
    return emit(node, "MatMul", [weights, v], like=node.outputs[0])


def _masked(node: ir.Node, scores: ir.Value, keep: ir.Value) -> ir.Value:
    """A large negative number is added rather than put in place, so that a row without any key stays finite."""
    zero, low = _float(node, 0.0, "kept"), _float(node, float(MASKED) / 4, "masked")
    return emit(node, "Add", [scores, emit(node, "Where", [keep, zero, low])])


def _triangle(node: ir.Node, q: ir.Value, k: ir.Value) -> ir.Value:
    """``key <= query`` as (queries, keys)."""
    zero, one = (_constant(node, np.array(i, np.int64), f"count{i}") for i in (0, 1))
    axes = _ints(node, "axes", 0)
    ranges = []
    for value in (q, k):
        length = emit(node, "Squeeze", [emit(node, "Shape", [value], {"start": 2, "end": 3}), axes])
        ranges.append(emit(node, "Range", [zero, length, one]))
    rows = emit(node, "Unsqueeze", [ranges[0], _ints(node, "last", -1)])
    return emit(node, "LessOrEqual", [ranges[1], rows])


def _repeat(node: ir.Node, value: ir.Value, heads: int, kv_heads: int) -> ir.Value:
    groups = heads // kv_heads
    size = (symbols.dims(value) or (0,))[-1]
    if not isinstance(size, int):
        raise _unsupported(node, "the size of heads is not known")
    lifted = emit(node, "Unsqueeze", [value, _ints(node, "group", 2)])
    wide = emit(node, "Expand", [lifted, _ints(node, "groups", 1, 1, groups, 1, 1)])
    return emit(node, "Reshape", [wide, _ints(node, "joined", 0, heads, -1, size)])


KINDS: dict[str, Callable[[ir.Node], ir.Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "Swish": _swish,
}
