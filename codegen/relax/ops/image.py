"""Sampling and rearranging images: GridSample, RoiAlign, Col2Im, SpaceToDepth, DepthToSpace."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._kernels import compute_dtype
from qcompile.codegen.relax.ops._loops import check, grid, load, loop, loops, scalar, store, when
from qcompile.codegen.relax.ops.shape import transpose
from qcompile.codegen.relax.registry import converter


@converter("", "SpaceToDepth")
def _space_to_depth(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """Blocks of pixels become channels, in either order of :func:`_depth_to_space`."""
    block = attr(node, "blocksize")
    n, c, h, w = ctx.shape(x)
    high, wide = ctx.dims.floordiv(h, block), ctx.dims.floordiv(w, block)
    split = ctx.reshape(x, [n, c, high, block, wide, block])
    moved = transpose(ctx, split, [0, 3, 5, 1, 2, 4] if attr(node, "mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4])
    return ctx.reshape(moved, [n, ctx.dims.simplify(c * block * block), high, wide])


@converter("", "DepthToSpace")
def _depth_to_space(ctx: Context, node: ir.Node, x: relax.Expr) -> relax.Expr:
    """Blocks of channels become blocks of pixels; ``DCR`` has the block's position before the channel, ``CRD`` after."""
    block = attr(node, "blocksize")
    n, c, h, w = ctx.shape(x)
    depth = ctx.dims.floordiv(c, block * block)
    if attr(node, "mode", "DCR") == "DCR":
        moved = transpose(ctx, ctx.reshape(x, [n, block, block, depth, h, w]), [0, 3, 4, 1, 5, 2])
    else:
        moved = transpose(ctx, ctx.reshape(x, [n, depth, block, block, h, w]), [0, 1, 4, 2, 5, 3])
    return ctx.reshape(moved, [n, depth, ctx.dims.simplify(h * block), ctx.dims.simplify(w * block)])


@converter("", "Col2Im")
def _col2im(ctx: Context, node: ir.Node, x: relax.Expr, image_input: Any, block_input: Any) -> relax.Expr:
    """Adds overlapping blocks ``(batch, channels * block, positions)`` up to an image."""
    image = ctx.symbolic_or_dynamic(node.inputs[1])
    block = ctx.symbolic_or_dynamic(node.inputs[2])
    rank = len(image)
    strides = attr(node, "strides", None) or [1] * rank
    dilations = attr(node, "dilations", None) or [1] * rank
    pads = attr(node, "pads", None) or [0] * (2 * rank)
    batch, columns, _ = ctx.shape(x)
    taps = ctx.dims.product(block)
    channels = ctx.new_dim(ctx.dims.floordiv(columns, taps), "channels")
    counts: list[Dim] = [
        ctx.dims.floordiv(size + pads[i] + pads[rank + i] - dilations[i] * (block[i] - 1) - 1, strides[i]) + 1
        for i, size in enumerate(image)
    ]
    dtype = ctx.storage(x)
    ctx.require_equal(ctx.dims.product(counts), ctx.shape(x)[2])

    def body(data: Any, out: Any) -> None:
        with grid(batch, channels, *image) as i:
            store(out, i, tirx.const(0, "float32").astype(dtype))
        with grid(batch, channels, *block, *counts) as (n, c, *rest):
            tap, at = rest[:rank], rest[rank:]
            row, column = c, as_expr(0)
            for i in range(rank):
                row = row * as_expr(block[i]) + tap[i]
                column = column * as_expr(counts[i]) + at[i]
            position = [at[i] * strides[i] - pads[i] + tap[i] * dilations[i] for i in range(rank)]
            inside = tirx.const(True, "bool")
            for p, size in zip(position, image):
                inside = tirx.And(inside, tirx.And(p >= as_expr(0), p < as_expr(size)))
            with when(inside):
                store(out, [n, c, *position], load(out, [n, c, *position]) + load(data, [n, row, column]))

    return loops(ctx, body, [x], [([batch, channels, *image], dtype)], name="col2im")[0]


@converter("", "GridSample")
def _grid_sample(ctx: Context, node: ir.Node, x: relax.Expr, points: relax.Expr) -> relax.Expr:
    """Values at positions given in [-1, 1] per axis, innermost axis first; linear, cubic (a = -0.75) or nearest."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(*[attr(node, "mode", "linear")] * 2)
    padding, corners = attr(node, "padding_mode", "zeros"), attr(node, "align_corners", 0)
    batch, channels, *spatial = ctx.shape(x)
    rank = len(spatial)
    out = ctx.shape(points)[1:-1]
    dtype = ctx.storage(x)
    acc = compute_dtype(dtype)
    taps = {"nearest": 1, "linear": 2, "cubic": 4}[mode]

    def c(value: float) -> Any:
        return tirx.const(value, acc)

    def reflect(v: Any, size: Dim) -> Any:
        """The coordinate mirrored at the borders until it is inside."""
        low = c(0.0 if corners else -0.5)
        high = as_expr(size).astype(acc) - c(1.0 if corners else 0.5)
        span = tirx.max(high - low, c(1e-6))
        distance = tirx.max(tirx.max(low - v, v - high), c(0))
        turns = tirx.floor(distance / span)
        rest = distance - turns * span
        even = tirx.EQ(tirx.floormod(turns.astype("int64"), as_expr(2)), as_expr(0))
        below = tirx.Select(even, low + rest, high - rest)
        above = tirx.Select(even, high - rest, low + rest)
        return tirx.Select(v < low, below, tirx.Select(v > high, above, v))

    def build(t: te.Tensor, g: te.Tensor) -> te.Tensor:
        def coordinate(n: Any, *rest: Any) -> Any:
            *o, d = rest
            given = g(n, *o, as_expr(rank - 1) - d).astype(acc)
            size = as_expr(spatial[-1])
            for k in range(rank - 1):
                size = tirx.Select(tirx.EQ(d, as_expr(k)), as_expr(spatial[k]), size)
            length = size.astype(acc)
            if corners:
                v = (given + c(1)) / c(2) * (length - c(1))
            else:
                v = ((given + c(1)) * length - c(1)) / c(2)
            if mode == "nearest":
                v = tirx.nearbyint(v)
            if padding == "border":
                v = tirx.min(tirx.max(v, c(0)), length - c(1))
            elif padding == "reflection":
                v = reflect(v, size)
            return v

        where = te.compute([as_expr(d) for d in (batch, *out, rank)], coordinate, name="coordinates")
        loops_ = [te.reduce_axis((as_expr(0), as_expr(taps)), name=f"k{i}") for i in range(rank)]

        def body(n: Any, ch: Any, *o: Any) -> Any:
            weight, inside, at = c(1), tirx.const(True, "bool"), []
            for d in range(rank):
                v = where(n, *o, as_expr(d))
                if mode == "nearest":
                    index = v.astype("int64")
                else:
                    base = tirx.floor(v)
                    tap = loops_[d].var - as_expr(taps // 2 - 1)
                    index = base.astype("int64") + tap
                    weight = weight * _tap_weight(mode, v - base, tap, acc)
                size = as_expr(spatial[d])
                if padding == "zeros":
                    inside = tirx.And(inside, tirx.And(index >= as_expr(0), index < size))
                elif padding == "border":
                    index = tirx.max(tirx.min(index, size - 1), as_expr(0))
                else:
                    index = reflect(index.astype(acc), spatial[d]).astype("int64")
                    index = tirx.max(tirx.min(index, size - 1), as_expr(0))
                at.append(index)
            value = t(n, ch, *at).astype(acc)
            if padding == "zeros":
                value = tirx.if_then_else(inside, value, c(0))
            return te.sum(value * weight, axis=loops_)

        sampled = te.compute([as_expr(d) for d in (batch, channels, *out)], body, name="sampled")
        return sampled if acc == dtype else te.compute(sampled.shape, lambda *i: sampled(*i).astype(dtype), name="out")

    return ctx.te(build, x, points, name="grid_sample")


def _tap_weight(mode: str, ratio: Any, tap: Any, acc: str) -> Any:
    """The weight of the element ``tap`` steps right of the one at or left of the sampling point."""

    def c(value: float) -> Any:
        return tirx.const(value, acc)

    if mode == "linear":
        return tirx.Select(tirx.EQ(tap, as_expr(0)), c(1) - ratio, ratio)
    a = c(-0.75)
    d = tirx.abs(tap.astype(acc) - ratio)
    near = ((a + c(2)) * d - (a + c(3))) * d * d + c(1)
    far = ((a * d - c(5) * a) * d + c(8) * a) * d - c(4) * a
    return tirx.Select(d <= c(1), near, far)


@converter("", "RoiAlign")
def _roi_align(ctx: Context, node: ir.Node, x: relax.Expr, rois: relax.Expr, batches: relax.Expr) -> relax.Expr:
    """Pools regions into a fixed grid, each cell the mean (or maximum) of bilinear samples."""
    images, channels, height, width = ctx.shape(x)
    count = ctx.shape(rois)[0]
    rows, columns = attr(node, "output_height", 1), attr(node, "output_width", 1)
    ratio, scale = attr(node, "sampling_ratio", 0), attr(node, "spatial_scale", 1.0)
    mode = attr(node, "mode", "avg").lower()
    default = "half_pixel" if ctx.version(node) >= 16 else "output_half_pixel"
    half = attr(node, "coordinate_transformation_mode", default) == "half_pixel"
    dtype = ctx.storage(x)
    acc = compute_dtype(dtype)

    def c(value: float) -> Any:
        return tirx.const(value, acc)

    def body(data: Any, regions: Any, owners: Any, out: Any) -> None:
        total, samples = scalar(acc), scalar("int64")
        with grid(count, channels, rows, columns) as (n, ch, ph, pw):
            offset = c(0.5 if half else 0.0)
            x1, y1, x2, y2 = (load(regions, [n, k]).astype(acc) * c(scale) - offset for k in range(4))
            wide, high = x2 - x1, y2 - y1
            if not half:
                wide, high = tirx.max(wide, c(1)), tirx.max(high, c(1))
            cell_w, cell_h = wide / c(columns), high / c(rows)
            owner = load(owners, [n]).astype("int64")
            check(tirx.And(owner >= as_expr(0), owner < as_expr(images)), "a region names an image that is not there")
            grid_w = as_expr(ratio) if ratio > 0 else tirx.ceil(cell_w).astype("int64")
            grid_h = as_expr(ratio) if ratio > 0 else tirx.ceil(cell_h).astype("int64")
            store(total, [0], c(0))
            store(samples, [0], as_expr(0))
            with loop(0, grid_h) as i, loop(0, grid_w) as j:
                fy = (i.astype(acc) + c(0.5)) * cell_h / grid_h.astype(acc)
                fx = (j.astype(acc) + c(0.5)) * cell_w / grid_w.astype(acc)
                y, z = y1 + ph.astype(acc) * cell_h + fy, x1 + pw.astype(acc) * cell_w + fx
                size_h, size_w = as_expr(height), as_expr(width)
                outside = tirx.Or(
                    tirx.Or(y < c(-1), y > size_h.astype(acc)), tirx.Or(z < c(-1), z > size_w.astype(acc))
                )
                terms = _corner_terms(data, owner, ch, y, z, size_h, size_w, acc)
                if mode == "avg":
                    value = terms[0] + terms[1] + terms[2] + terms[3]
                else:
                    value = tirx.max(tirx.max(terms[0], terms[1]), tirx.max(terms[2], terms[3]))
                with when(tirx.Not(outside)):
                    if mode == "avg":
                        store(total, [0], load(total, [0]) + value)
                    else:
                        first = tirx.EQ(load(samples, [0]), as_expr(0))
                        store(total, [0], tirx.Select(first, value, tirx.max(load(total, [0]), value)))
                if mode != "avg":
                    with when(
                        tirx.And(outside, tirx.Or(tirx.EQ(load(samples, [0]), as_expr(0)), load(total, [0]) < c(0)))
                    ):
                        store(total, [0], c(0))
                store(samples, [0], load(samples, [0]) + 1)
            result = load(total, [0])
            if mode == "avg":
                result = result / tirx.max(grid_h * grid_w, as_expr(1)).astype(acc)
            store(out, [n, ch, ph, pw], result.astype(dtype))

    return loops(ctx, body, [x, rois, batches], [([count, channels, rows, columns], dtype)], name="roi_align")[0]


def _corner_terms(data: Any, n: Any, ch: Any, y: Any, x: Any, height: Any, width: Any, acc: str) -> list[Any]:
    """The four weighted elements around a position; a position beyond the last row or column takes that."""
    zero, one = tirx.const(0, acc), tirx.const(1, acc)

    def axis(v: Any, size: Any) -> tuple[Any, Any, Any]:
        v = tirx.max(v, zero)
        low = tirx.max(tirx.min(v.astype("int64"), size - 1), as_expr(0))
        last = low >= size - 1
        high = tirx.Select(last, low, low + 1)
        return low, high, tirx.Select(last, zero, v - low.astype(acc))

    y0, y1, fy = axis(y, height)
    x0, x1, fx = axis(x, width)
    corners = [
        (y0, x0, (one - fy) * (one - fx)),
        (y0, x1, (one - fy) * fx),
        (y1, x0, fy * (one - fx)),
        (y1, x1, fy * fx),
    ]
    return [weight * load(data, [n, ch, i, j]).astype(acc) for i, j, weight in corners]
