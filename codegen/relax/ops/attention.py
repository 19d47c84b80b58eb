"""Scaled dot-product attention and rotary position embedding (opset 23 and later).

    Y = softmax(softcap(scale * Q @ K^T) + bias) @ V

as three kernels (scores with bias, softmax, product with the values), with query heads sharing key/value heads in groups.
The bias joins the mask input, the causal frontier, the sliding window and the number of valid cached keys; a query that may
attend nothing gives a zero row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops import _kernels as kernels
from qcompile.codegen.relax.ops._loops import grid, load, loops, store
from qcompile.codegen.relax.ops.gather import checked
from qcompile.codegen.relax.ops.shape import concat, transpose
from qcompile.codegen.relax.registry import converter


@dataclass(frozen=True)
class Heads:
    """A query, key or value tensor seen as ``(batch, heads, length, size)``, whatever its own layout.

    Attributes:
        expr: a 4-D tensor in that order, or a 3-D tensor ``(batch, length, heads * size)``.
        batch, heads, length, size: its dimensions.
    """

    expr: relax.Expr
    batch: Dim
    heads: Dim
    length: Dim
    size: Dim

    @staticmethod
    def of(ctx: Context, expr: relax.Expr, heads: int | None) -> Heads:
        """The view of a tensor; a 3-D one needs the number of heads."""
        shape = ctx.shape(expr)
        if len(shape) == 4:
            return Heads(expr, *shape)
        return Heads(expr, shape[0], heads, shape[1], ctx.dims.floordiv(shape[2], heads))

    @property
    def packed(self) -> bool:
        """Whether the heads lie side by side in the last dimension."""
        return len(self.expr.ty.shape.values) == 3

    def at(self, tensor: te.Tensor, b: Any, h: Any, i: Any, d: Any) -> Any:
        """One element of the tensor expression that stands for :attr:`expr`."""
        return tensor[b, i, h * as_expr(self.size) + d] if self.packed else tensor[b, h, i, d]

    def unpacked(self, ctx: Context) -> relax.Expr:
        """The tensor as 4-D."""
        if not self.packed:
            return self.expr
        return transpose(ctx, ctx.reshape(self.expr, [self.batch, self.length, self.heads, self.size]), [0, 2, 1, 3])


@converter("", "Attention")
def _attention(
    ctx: Context,
    node: ir.Node,
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    mask: relax.Expr | None = None,
    past_key: relax.Expr | None = None,
    past_value: relax.Expr | None = None,
    valid: relax.Expr | None = None,
) -> list[relax.Expr | None]:
    query = Heads.of(ctx, q, attr(node, "q_num_heads", None))
    key = Heads.of(ctx, k, attr(node, "kv_num_heads", None))
    value = Heads.of(ctx, v, attr(node, "kv_num_heads", None))
    dtype = ctx.storage(q)
    wanted = [output.name != "" for output in node.outputs] + [False] * 4
    past: Dim = 0
    if past_key is not None:
        past = ctx.shape(past_key)[2]
        key = Heads.of(ctx, concat(ctx, [past_key, key.unpacked(ctx)], 2), None)
        value = Heads.of(ctx, concat(ctx, [past_value, value.unpacked(ctx)], 2), None)
    ctx.require_equal(query.batch, key.batch)
    ctx.require_equal(query.size, key.size)
    ctx.require_equal(key.length, value.length)
    scale = attr(node, "scale", None)
    if scale is None:
        if not isinstance(query.size, int):
            raise ctx.unsupported(node, "the head size must be known to scale by its square root; give the scale")
        scale = 1 / math.sqrt(query.size)
    acc = "float64" if dtype == "float64" else "float32"
    mode = attr(node, "qk_matmul_output_mode", 0)
    softcap = attr(node, "softcap", 0.0)
    scores = attention_scores(ctx, query, key, scale, acc)
    stages = {0: scores}
    if softcap:
        scores = kernels.elementwise(
            ctx,
            lambda s: tirx.tanh(s / tirx.const(softcap, acc)) * tirx.const(softcap, acc),
            scores,
            name="softcap",
        )
    stages[1] = scores
    scores = _biased(ctx, node, scores, query, key, mask, valid, past, acc)
    stages[2] = scores
    weights = masked_softmax(ctx, scores, dtype if dtype in kernels.HALF else acc)
    stages[3] = weights
    out = attention_values(ctx, weights, value, dtype, packed=query.packed)
    present_key = key.unpacked(ctx) if wanted[1] else None
    present_value = value.unpacked(ctx) if wanted[2] else None
    return [out, present_key, present_value, ctx.cast(stages[mode], dtype) if wanted[3] else None]


def attention_scores(ctx: Context, query: Heads, key: Heads, scale: float, acc: str) -> relax.Expr:
    """``scale * Q @ K^T`` as ``(batch, query heads, queries, keys)``, accumulated in ``acc``."""
    group = ctx.dims.floordiv(query.heads, key.heads)
    size = query.size if isinstance(query.size, int) else key.size

    def build(q: te.Tensor, k: te.Tensor) -> te.Tensor:
        shape = [as_expr(d) for d in (query.batch, query.heads, query.length, key.length)]
        r = te.reduce_axis((as_expr(0), as_expr(size)), name="d")

        def product(b: Any, h: Any, i: Any, j: Any) -> Any:
            kv = h if isinstance(group, int) and group == 1 else tirx.floordiv(h, as_expr(group))
            return te.sum(query.at(q, b, h, i, r).astype(acc) * key.at(k, b, kv, j, r).astype(acc), axis=r)

        dot = te.compute(shape, product, name="attention_scores")
        return te.compute(shape, lambda *i: dot[i] * tirx.const(scale, acc), name="scaled")

    return ctx.te(build, query.expr, key.expr, name="attention_scores")


def _biased(
    ctx: Context,
    node: ir.Node,
    scores: relax.Expr,
    query: Heads,
    key: Heads,
    mask: relax.Expr | None,
    valid: relax.Expr | None,
    past: Dim,
    acc: str,
) -> relax.Expr:
    """The scores plus everything that keeps a query from attending a key."""
    causal = attr(node, "is_causal", 0)
    left, right = attr(node, "left_window_size", -1), attr(node, "right_window_size", -1)
    if mask is None and valid is None and not causal and left < 0 and right < 0:
        return scores
    shape = ctx.shape(scores)
    extra = [t for t in (mask, valid) if t is not None]
    mask_shape = ctx.shape(mask) if mask is not None else []
    short = mask is not None and not ctx.dims.equal(mask_shape[-1], key.length) and mask_shape[-1] != 1

    def build(s: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        tensors = list(rest)
        m = tensors.pop(0) if mask is not None else None
        n = tensors.pop(0) if valid is not None else None

        def biased(b: Any, h: Any, i: Any, j: Any) -> Any:
            result = s[b, h, i, j]
            masked = -tirx.infinity(acc)
            allowed = []
            if m is not None:
                full = [*shape[:3], mask_shape[-1]] if short else shape
                at = kernels.index_of(mask_shape, full, [b, h, i, j], ctx)
                inside = j < as_expr(mask_shape[-1])
                if ctx.storage(mask) == "bool":
                    allowed.append(tirx.if_then_else(inside, m[at], tirx.const(False, "bool")) if short else m[at])
                else:
                    bias = m[at].astype(acc)
                    result = result + (tirx.if_then_else(inside, bias, masked) if short else bias)
            if n is not None:
                offset = n[b].astype("int64") - as_expr(query.length)
            else:
                offset = as_expr(past)
            position = i + offset
            if causal:
                allowed.append(j <= position)
            if left >= 0:
                allowed.append(position - j <= as_expr(left))
            if right >= 0:
                allowed.append(j - position <= as_expr(right))
            if n is not None:
                allowed.append(j < n[b].astype("int64"))
            if not allowed:
                return result
            condition = allowed[0]
            for other in allowed[1:]:
                condition = tirx.And(condition, other)
            return tirx.Select(condition, result, masked)

        return te.compute([as_expr(d) for d in shape], biased, name="attention_bias")

    return ctx.te(build, scores, *extra, name="attention_bias")


def masked_softmax(ctx: Context, scores: relax.Expr, dtype: str) -> relax.Expr:
    """Softmax over the last axis; a row of nothing but -inf gives zeros."""
    acc = ctx.storage(scores)

    def build(s: te.Tensor) -> te.Tensor:
        shape = list(s.shape)
        last = len(shape) - 1
        infinity = tirx.infinity(acc)

        def pick(index: Any) -> tuple[Any, ...]:
            return tuple(as_expr(0) if n == last else i for n, i in enumerate(index))

        peak = kernels.reduce_te(ctx, s, [last], kernels.MAX, keepdims=True, name="peak")

        def power(*i: Any) -> Any:
            p = peak[pick(i)]
            return tirx.Select(tirx.EQ(p, -infinity), tirx.const(0, acc), tirx.exp(s[i] - p))

        powers = te.compute(shape, power, name="powers")
        total = kernels.reduce_te(ctx, powers, [last], kernels.SUM, keepdims=True, name="total")

        def normal(*i: Any) -> Any:
            t = total[pick(i)]
            return (powers[i] / tirx.Select(tirx.EQ(t, tirx.const(0, acc)), tirx.const(1, acc), t)).astype(dtype)

        return te.compute(shape, normal, name="softmax")

    return ctx.te(build, scores, name="attention_softmax")


def attention_values(ctx: Context, weights: relax.Expr, value: Heads, dtype: str, *, packed: bool) -> relax.Expr:
    """``weights @ V``, as ``(batch, heads, queries, size)`` or packed ``(batch, queries, heads * size)``."""
    batch, heads, queries, keys = ctx.shape(weights)
    group = ctx.dims.floordiv(heads, value.heads)
    acc = kernels.compute_dtype(ctx.storage(weights))
    size = value.size

    def build(w: te.Tensor, v: te.Tensor) -> te.Tensor:
        r = te.reduce_axis((as_expr(0), as_expr(keys)), name="j")

        def product(b: Any, h: Any, i: Any, d: Any) -> Any:
            kv = h if isinstance(group, int) and group == 1 else tirx.floordiv(h, as_expr(group))
            return te.sum(w[b, h, i, r].astype(acc) * value.at(v, b, kv, r, d).astype(acc), axis=r)

        if packed:
            shape = [batch, queries, ctx.dims.simplify(heads * size)]
            out = te.compute(
                [as_expr(d) for d in shape],
                lambda b, i, c: product(b, tirx.floordiv(c, as_expr(size)), i, tirx.floormod(c, as_expr(size))),
                name="attention_values",
            )
        else:
            out = te.compute([as_expr(d) for d in (batch, heads, queries, size)], product, name="attention_values")
        if dtype == acc:
            return out
        return te.compute(out.shape, lambda *i: out[i].astype(dtype), name="rounded")

    return ctx.te(build, weights, value.expr, name="attention_values")


@converter("", "RotaryEmbedding")
def _rotary_embedding(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    cos: relax.Expr,
    sin: relax.Expr,
    position_ids: relax.Expr | None = None,
) -> relax.Expr:
    """Rotates pairs of the first ``rotary_embedding_dim`` features by the angle of their position.

    A pair is (i, i + half), or (2i, 2i + 1) when interleaved. The caches are ``(positions, half)`` with position ids,
    ``(batch or 1, length, half)`` without.
    """
    heads = Heads.of(ctx, x, attr(node, "num_heads", 0) or None)
    dtype = ctx.storage(x)
    acc = kernels.compute_dtype(dtype)
    rotated = attr(node, "rotary_embedding_dim", 0) or heads.size
    half = ctx.dims.floordiv(rotated, 2)
    interleaved = attr(node, "interleaved", 0)
    cache = ctx.shape(cos)
    if position_ids is None and len(cache) != 3:
        raise ctx.unsupported(node, f"without position ids the caches must have three dimensions, not {len(cache)}")

    if position_ids is not None:
        position_ids = _checked_positions(ctx, position_ids, cache[0])

    def build(t: te.Tensor, c: te.Tensor, s: te.Tensor, *ids: te.Tensor) -> te.Tensor:
        def angle(table: te.Tensor, b: Any, i: Any, d: Any) -> Any:
            if ids:
                at = kernels.index_of(ctx.shape(position_ids), [heads.batch, heads.length], [b, i], ctx)
                return table(ids[0](*at), d).astype(acc)
            at = kernels.index_of(cache, [heads.batch, heads.length, half], [b, i, d], ctx)
            return table[at].astype(acc)

        def rotate(b: Any, h: Any, i: Any, d: Any) -> Any:
            if interleaved:
                pair, second = tirx.floordiv(d, as_expr(2)), tirx.EQ(tirx.floormod(d, as_expr(2)), as_expr(1))
                partner = tirx.Select(second, d - 1, d + 1)
            else:
                second = d >= as_expr(half)
                pair = tirx.Select(second, d - as_expr(half), d)
                partner = tirx.Select(second, d - as_expr(half), d + as_expr(half))
            inside = d < as_expr(rotated)
            plain = heads.at(t, b, h, i, d).astype(acc)

            def turned() -> Any:
                other = heads.at(t, b, h, i, partner).astype(acc)
                cosine, sine = angle(c, b, i, pair), angle(s, b, i, pair)
                return plain * cosine + tirx.Select(second, other, -other) * sine

            if ctx.dims.equal(rotated, heads.size):
                return turned().astype(dtype)
            return tirx.if_then_else(inside, turned(), plain).astype(dtype)

        if heads.packed:
            size = as_expr(heads.size)
            return te.compute(
                t.shape, lambda b, i, n: rotate(b, tirx.floordiv(n, size), i, tirx.floormod(n, size)), name="rope"
            )
        return te.compute(t.shape, rotate, name="rope")

    extra = [position_ids] if position_ids is not None else []
    return ctx.te(build, x, cos, sin, *extra, name="rotary_embedding")


def _checked_positions(ctx: Context, ids: relax.Expr, size: Dim) -> relax.Expr:
    """The position ids as int64; one outside of the caches stops the program."""

    def body(given: Any, out: Any) -> None:
        with grid(*ctx.shape(ids)) as i:
            store(out, i, checked(load(given, i), size, "RotaryEmbedding"))

    return loops(ctx, body, [ids], [(ctx.shape(ids), "int64")], name="check_indices")[0]
