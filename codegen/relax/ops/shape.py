"""Operators that rearrange elements without changing them: Reshape, Transpose, Concat, Slice, Expand, Pad ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._axes import Axes
from qcompile.codegen.relax.ops._kernels import index_of
from qcompile.codegen.relax.registry import converter


def constant_axes(ctx: Context, node: ir.Node, position: int = 1, name: str = "axes") -> list[int] | None:
    """Axes given by an input (opset 13) or an attribute; ``None`` where absent."""
    if len(node.inputs) > position and node.inputs[position] is not None:
        axes = ctx.constant(node.inputs[position])
        if axes is None:
            raise ctx.unsupported(node, f"the {name} must be constant: they determine the shape of the result")
        return [int(a) for a in axes.reshape(-1)]
    axes = attr(node, name, None)
    return None if axes is None else list(axes)


@converter("", "Identity")
def _identity(ctx: Context, node: ir.Node, x: Any) -> Any:
    return ctx.known(node.inputs[0])


@converter("", "Reshape")
def _reshape(ctx: Context, node: ir.Node, x: relax.Expr, shape_input: Any = None) -> relax.Expr:
    if shape_input is None:
        wanted: list[Dim] = list(attr(node, "shape"))
    else:
        wanted = ctx.symbolic_or_dynamic(node.inputs[1])
    old = ctx.shape(x)
    known = shape_input is None or ctx.symbolic(node.inputs[1]) is not None
    result: list[Dim] = []
    unknown = []
    allowzero = attr(node, "allowzero", 0)
    for i, d in enumerate(wanted):
        if isinstance(d, int):
            if d == 0 and not allowzero:
                d = old[i]
            elif d == -1:
                unknown.append(i)
                d = 1
        elif not known and not allowzero and i < len(old):  # 0 copies the dimension
            d = tirx.Select(tirx.EQ(d, as_expr(0)), as_expr(old[i]), d)
        result.append(d)
    total = ctx.dims.product(old)
    if unknown:
        rest = ctx.dims.product(result)
        result[unknown[0]] = _quotient(ctx, old, result, total, rest)
    elif not known:  # one of them may be -1 and stand for what remains
        rest = as_expr(1)
        for d in result:
            rest = rest * tirx.Select(tirx.EQ(as_expr(d), as_expr(-1)), as_expr(1), as_expr(d))
        inferred = tirx.floordiv(as_expr(total), tirx.max(rest, as_expr(1)))
        result = [
            d if isinstance(d, int) else ctx.new_dim(tirx.Select(tirx.EQ(d, as_expr(-1)), inferred, d), f"reshape_{i}")
            for i, d in enumerate(result)
        ]
    if not ctx.dims.equal(ctx.dims.product(result), total):
        ctx.require_equal(ctx.dims.product(result), total)
    return ctx.reshape(x, result)


def _quotient(ctx: Context, old: Sequence[Dim], new: Sequence[Dim], total: Dim, rest: Dim) -> Dim:
    """The dimension that makes the element counts agree: ``total / rest``, cancelling common factors first."""
    if isinstance(total, int) and isinstance(rest, int):
        return total // rest if rest else 0
    left, right = list(old), [d for d in new if not (isinstance(d, int) and d == 1)]
    for d in list(right):
        for candidate in left:
            if ctx.dims.equal(candidate, d):
                left.remove(candidate)
                right.remove(d)
                break
    numerator, denominator = ctx.dims.product(left), ctx.dims.product(right)
    if isinstance(denominator, int) and denominator == 1:
        return numerator
    return ctx.dims.floordiv(numerator, denominator)


@converter("", "Flatten")
def _flatten(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    axis, rank = attr(node, "axis", 1), ctx.rank(x)
    axis = axis + rank if axis < 0 else axis
    shape = ctx.shape(x)
    return ctx.reshape(x, [ctx.dims.product(shape[:axis]), ctx.dims.product(shape[axis:])])


@converter("", "Squeeze")
def _squeeze(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
    shape = ctx.shape(x)
    axes = Axes.of_node(ctx, node, len(shape))
    if axes is None:
        if any(not isinstance(d, int) for d in shape):
            raise ctx.unsupported(node, "without axes the dimensions of size 1 must be known; give the axes")
        axes = Axes.of(ctx, len(shape), [i for i, d in enumerate(shape) if d == 1])
    if axes.static:
        for i in axes.indices:
            ctx.require_equal(shape[i], 1)
    return ctx.reshape(x, axes.removed(shape))


@converter("", "Unsqueeze")
def _unsqueeze(ctx: Context, node: ir.Node, x: relax.Expr, axes_input: Any = None) -> relax.Expr:
    if len(node.inputs) > 1:
        count = ctx.dims.product(ctx.shape(axes_input))
    else:
        count = len(attr(node, "axes"))
    axes = Axes.of_node(ctx, node, ctx.rank(x) + count)
    return ctx.reshape(x, axes.inserted(ctx.shape(x)))


@converter("", "Transpose")
def _transpose(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    return transpose(ctx, x, attr(node, "perm", list(reversed(range(ctx.rank(x))))))


def transpose(ctx: Context, x: relax.Expr, perm: Sequence[int]) -> relax.Expr:
    """The tensor with its dimensions in the order ``perm``; a view where only dimensions of size 1 move."""
    perm = [p % len(perm) for p in perm]
    shape = ctx.shape(x)
    if perm == list(range(len(perm))):
        return x
    moving = [p for p in perm if not (isinstance(shape[p], int) and shape[p] == 1)]
    if moving == sorted(moving):
        return ctx.reshape(x, [shape[p] for p in perm])

    def build(t: te.Tensor) -> te.Tensor:
        inverse = np.argsort(perm)
        return te.compute([t.shape[p] for p in perm], lambda *i: t[tuple(i[int(k)] for k in inverse)], name="transpose")

    return ctx.te(build, x, name="transpose")


@converter("", "Concat")
def _concat(ctx: Context, node: ir.Node, *args: relax.Expr) -> relax.Expr:
    return concat(ctx, [a for a in args if a is not None], attr(node, "axis", 1))


def concat(ctx: Context, parts: Sequence[relax.Expr], axis: int) -> relax.Expr:
    """The tensors one after another along an axis."""
    if len(parts) == 1:
        return parts[0]
    axis %= ctx.rank(parts[0])
    shapes = [ctx.shape(p) for p in parts]
    shape = list(shapes[0])
    for other in shapes[1:]:
        for i, d in enumerate(other):
            if i != axis:
                ctx.require_equal(d, shape[i])
                shape[i] = d if isinstance(d, int) else shape[i]
    kept = [(p, s[axis]) for p, s in zip(parts, shapes) if not (isinstance(s[axis], int) and s[axis] == 0)]
    if not kept:
        return parts[0]
    if len(kept) == 1:
        return kept[0][0]
    starts: list[Dim] = [0]
    for _, size in kept:
        starts.append(ctx.dims.simplify(starts[-1] + size))
    shape[axis] = starts[-1]

    def build(*xs: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            position = index[axis]
            result = None
            for x, start, end in reversed(list(zip(xs, starts, starts[1:]))):
                at = list(index)
                at[axis] = position - as_expr(start)
                item = x[tuple(at)]
                result = item if result is None else tirx.if_then_else(position < as_expr(end), item, result)
            return result

        return te.compute([as_expr(d) for d in shape], body, name="concat")

    return ctx.te(build, *(p for p, _ in kept), name="concat")


@converter("", "Split")
def _split(ctx: Context, node: ir.Node, x: relax.Expr, split_input: Any = None) -> list[relax.Expr]:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    size = ctx.shape(x)[axis]
    count = len(node.outputs)
    if split_input is not None:
        sizes = ctx.symbolic_or_dynamic(node.inputs[1])
    elif "split" in node.attributes:
        sizes = list(attr(node, "split"))
    else:
        chunk = ctx.dims.ceildiv(size, attr(node, "num_outputs", count))
        sizes = [chunk] * (count - 1)
        sizes.append(ctx.dims.simplify(size - chunk * (count - 1)))
    total: Dim = 0
    parts = []
    for part in sizes:
        parts.append(slice_axis(ctx, x, axis, total, part))
        total = ctx.dims.simplify(total + part)
    ctx.require_equal(total, size)
    return parts


def slice_axis(ctx: Context, x: relax.Expr, axis: int, start: Dim, size: Dim, step: int = 1) -> relax.Expr:
    """``size`` elements along one axis from ``start`` on."""
    if step == 1 and ctx.dims.equal(size, ctx.shape(x)[axis]):
        return x
    shape = ctx.shape(x)
    shape[axis] = size

    def build(t: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            at = list(index)
            at[axis] = at[axis] * as_expr(step) + as_expr(start)
            return t[tuple(at)]

        return te.compute([as_expr(d) for d in shape], body, name="slice")

    return ctx.te(build, x, name="slice")


@converter("", "Slice")
def _slice(ctx: Context, node: ir.Node, x: relax.Expr, *inputs: Any) -> relax.Expr:
    rank, shape = ctx.rank(x), ctx.shape(x)
    if not inputs:
        starts, ends = list(attr(node, "starts")), list(attr(node, "ends"))
        axes, steps = attr(node, "axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = ctx.symbolic_or_dynamic(node.inputs[1]), ctx.symbolic_or_dynamic(node.inputs[2])
        given = len(inputs) > 2 and inputs[2] is not None
        axes = ctx.symbolic_or_dynamic(node.inputs[3]) if given else list(range(len(starts)))
        steps = [1] * len(starts)
        if len(inputs) > 3 and inputs[3] is not None:
            steps = ctx.symbolic_or_dynamic(node.inputs[4])
    begin: list[Dim] = [0] * rank
    stride: list[Dim] = [1] * rank
    out = list(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps):
        if isinstance(axis, int):
            axis %= rank
            begin[axis], out[axis] = _slice_range(ctx, start, end, step, shape[axis])
            stride[axis] = step
            continue
        for d in range(rank):  # known at run time only: any axis may be the one
            here = tirx.Or(tirx.EQ(axis, as_expr(d)), tirx.EQ(axis, as_expr(d - rank)))
            first, count = _slice_range(ctx, start, end, step, shape[d])
            begin[d] = tirx.Select(here, as_expr(first), as_expr(begin[d]))
            out[d] = tirx.Select(here, as_expr(count), as_expr(out[d]))
            stride[d] = tirx.Select(here, as_expr(step), as_expr(stride[d]))
    if any(not isinstance(a, int) for a in axes):
        out = [ctx.new_dim(d, "slice") for d in out]
    if all(isinstance(s, int) and s == 1 for s in stride) and all(ctx.dims.equal(a, b) for a, b in zip(out, shape)):
        return x

    def build(t: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            return t(*(i * as_expr(s) + as_expr(b) for i, s, b in zip(index, stride, begin)))

        return te.compute([as_expr(d) for d in out], body, name="slice")

    return ctx.te(build, x, name="slice")


def _slice_range(ctx: Context, start: Dim, end: Dim, step: Dim, size: Dim) -> tuple[Dim, Dim]:
    """First position and number of elements of ``start:end:step`` in a dimension, by the specification's clamping."""
    dims = ctx.dims
    if not isinstance(step, int):
        positive = _slice_range_sign(ctx, start, end, step, size, True)
        negative = _slice_range_sign(ctx, start, end, step, size, False)
        forward = step > 0
        first = tirx.Select(forward, as_expr(positive[0]), as_expr(negative[0]))
        count = tirx.Select(forward, as_expr(positive[1]), as_expr(negative[1]))
        return dims.simplify(first), ctx.new_dim(count, "slice")
    first, count = _slice_range_sign(ctx, start, end, step, size, step > 0)
    return first, count if isinstance(count, int) else dims.simplify(count)


def _slice_range_sign(ctx: Context, start: Dim, end: Dim, step: Dim, size: Dim, forward: bool) -> tuple[Dim, Dim]:
    dims = ctx.dims

    def clamp(position: Dim, low: Dim, high: Dim) -> Dim:
        if isinstance(position, int):
            if position < 0:
                position = size + max(position, -(1 << 40))
                if not isinstance(position, int):
                    position = dims.simplify(position)
            elif position >= 1 << 40:
                return high
        else:
            position = dims.select(as_expr(position) >= 0, position, position + size)
        return dims.maximum(dims.minimum(position, high), low)

    if forward:
        first, last = clamp(start, 0, size), clamp(end, 0, size)
        span = dims.simplify(last - first)
    else:
        first, last = clamp(start, 0, dims.simplify(size - 1)), clamp(end, -1, dims.simplify(size - 1))
        span = dims.simplify(first - last)
    magnitude = abs(step) if isinstance(step, int) else tirx.max(step if forward else -step, as_expr(1))
    count = dims.maximum(dims.ceildiv(span, magnitude), 0)
    return first, count


@converter("", "Expand")
def _expand(ctx: Context, node: ir.Node, x: relax.Expr, shape_input: Any) -> relax.Expr:
    return broadcast_to(ctx, x, ctx.symbolic_or_dynamic(node.inputs[1]))


def broadcast_to(ctx: Context, x: relax.Expr, wanted: Sequence[Dim]) -> relax.Expr:
    """The tensor broadcast with a shape, both ways, as Expand does."""
    old = ctx.shape(x)
    out = ctx.broadcast(old, wanted)
    if len(out) == len(old) and all(ctx.dims.equal(a, b) for a, b in zip(out, old)):
        return x
    if all(isinstance(d, int) and d == 1 for d in out[: len(out) - len(old)]) and all(
        ctx.dims.equal(a, b) for a, b in zip(out[len(out) - len(old) :], old)
    ):
        return ctx.reshape(x, out)

    def build(t: te.Tensor) -> te.Tensor:
        return te.compute([as_expr(d) for d in out], lambda *i: t[index_of(old, out, i, ctx)], name="expand")

    return ctx.te(build, x, name="expand")


@converter("", "ConstantOfShape")
def _constant_of_shape(ctx: Context, node: ir.Node, shape_input: Any) -> relax.Expr:
    tensor = attr(node, "value", None)
    value = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    return full(ctx, ctx.symbolic_or_dynamic(node.inputs[0]), value.reshape(-1)[0], str(value.dtype))


def full(ctx: Context, shape: Sequence[Dim], value: Any, dtype: str) -> relax.Expr:
    """A tensor filled with one value."""
    if dtype == "bool":
        immediate = tirx.const(bool(value), "bool")
    elif dtype in ("float16", "bfloat16"):
        immediate = tirx.const(float(value), "float32").astype(dtype)
    else:
        immediate = tirx.const(value.item() if hasattr(value, "item") else value, dtype)
    return ctx.te(lambda: te.compute([as_expr(d) for d in shape], lambda *i: immediate, name="full"), name="full")


@converter("", "Tile")
def _tile(ctx: Context, node: ir.Node, x: relax.Expr, repeats: Any, axis_input: Any = None) -> relax.Expr:
    shape = ctx.shape(x)
    if axis_input is not None:  # opset 1: one axis and one count
        axis = int(ctx.constant(node.inputs[2]))
        counts: list[Dim] = [1] * len(shape)
        counts[axis] = ctx.symbolic_or_dynamic(node.inputs[1])[0]
    else:
        counts = ctx.symbolic_or_dynamic(node.inputs[1])
    out = [ctx.dims.simplify(d * r) for d, r in zip(shape, counts)]

    def build(t: te.Tensor) -> te.Tensor:
        def body(*index: Any) -> Any:
            return t[
                tuple(
                    i if isinstance(r, int) and r == 1 else tirx.floormod(i, as_expr(d))
                    for i, d, r in zip(index, shape, counts)
                )
            ]

        return te.compute([as_expr(d) for d in out], body, name="tile")

    return ctx.te(build, x, name="tile")


@converter("", "Shape")
def _shape(ctx: Context, node: ir.Node, x: Any) -> Known:
    raise ctx.unsupported(node, "the shape of a sequence is not defined")


@converter("", "Range")
def _range(ctx: Context, node: ir.Node, start: relax.Expr, limit: relax.Expr, step: relax.Expr) -> relax.Expr:
    """``start + i * step`` for ``i < ceil((limit - start) / step)``."""
    dtype = ctx.storage(start)
    known = [ctx.symbolic(v) for v in node.inputs]
    if all(k is not None for k in known):
        first, last, by = (k.reshape(-1)[0] for k in known)
        if not isinstance(by, int) or by > 0:
            span = ctx.dims.simplify(last - first)
        else:
            span, by = ctx.dims.simplify(first - last), -by
        if isinstance(by, int) and by > 0:
            count = ctx.dims.maximum(ctx.dims.ceildiv(span, by), 0)
            sign = known[2].reshape(-1)[0]
            return ctx.te(
                lambda: te.compute(
                    [as_expr(count)],
                    lambda i: as_expr(first).astype(dtype) + i.astype(dtype) * tirx.const(sign, dtype),
                    name="range",
                ),
                name="range",
            )
    scalars = [ctx.reshape(v, [1]) for v in (start, limit, step)]
    wide = "float64" if dtype.startswith("float") else "int64"

    def length(a: te.Tensor, b: te.Tensor, c: te.Tensor) -> te.Tensor:
        zero = as_expr(0)

        def count(_: Any) -> Any:
            span, by = b[zero].astype(wide) - a[zero].astype(wide), c[zero].astype(wide)
            if wide == "float64":
                return tirx.max(tirx.ceil(span / by).astype("int64"), zero)
            up = tirx.floordiv(span + by - 1, tirx.Select(tirx.EQ(by, zero), as_expr(1), by))
            down = tirx.floordiv(-span - by - 1, tirx.Select(by < 0, -by, as_expr(1)))
            return tirx.max(tirx.Select(by > 0, up, down), zero)

        return te.compute((as_expr(1),), count, name="range_length")

    size = ctx.dims_from_tensor(ctx.te(length, *scalars, name="range_length"), "range")[0]
    zero = as_expr(0)
    acc = "float32" if dtype in ("float16", "bfloat16") else dtype
    return ctx.te(
        lambda a, c: te.compute(
            (size,), lambda i: (a[zero].astype(acc) + i.astype(acc) * c[zero].astype(acc)).astype(dtype), name="range"
        ),
        scalars[0],
        scalars[2],
        name="range",
    )
