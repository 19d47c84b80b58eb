"""Resize and Upsample: interpolation along one axis after the other.

An output position ``o`` lies at ``x`` in the input (the coordinate transformation), between ``b = ceil(x) - 1`` and ``b + 1`` with
``r = x - b`` in (0, 1]. Linear and cubic interpolation are a weighted sum of the ``n`` elements around it, where the weights
depend on ``r`` and, with antialiasing, on the scale. The cubic kernel is Keys' (1981) with coefficient ``a``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops.cast import convert
from qcompile.codegen.relax.registry import converter

_F64 = "float64"


def _f(value: float) -> Any:
    return tirx.const(float(value), _F64)


def _float(value: Any) -> Any:
    return _f(value) if isinstance(value, int | float) else value.astype(_F64)


@dataclass
class _Axis:
    """How one axis is resized.

    Attributes:
        axis: its number.
        old, new: its length before and after.
        scale: a float, a float64 expression, or the position of the scale in the tensor of scales.
        roi: positions of the region's begin and end in the tensor of regions.
    """

    axis: int
    old: Dim
    new: Dim
    scale: Any
    roi: tuple[int, int]


@dataclass
class _Sampling:
    """The attributes that say where and how to sample.

    Attributes:
        mode: nearest, linear or cubic.
        transform: the coordinate transformation.
        nearest: how nearest rounds.
        a: coefficient of the cubic kernel.
        exclude: whether elements outside of the input get weight 0.
        antialias: whether the kernel widens when shrinking.
        extrapolation: the value outside of the region of tf_crop_and_resize.
    """

    mode: str
    transform: str
    nearest: str
    a: float
    exclude: bool
    antialias: bool
    extrapolation: float


@converter("", "Resize", "Upsample")
def _resize(ctx: Context, node: ir.Node, x: relax.Expr, *inputs: Any) -> relax.Expr:
    version, rank = ctx.version(node), ctx.rank(x)
    if node.op_type == "Upsample" or version < 11:
        sampling = _Sampling(attr(node, "mode", "nearest"), "asymmetric", "floor", -0.75, False, False, 0.0)
        if version < 9 and node.op_type == "Upsample":
            scales: Any = list(attr(node, "scales"))
            roi = None
        else:
            roi, scales = None, node.inputs[1]
        sizes = None
        axes = list(range(rank))
    else:
        sampling = _Sampling(
            attr(node, "mode", "nearest"),
            attr(node, "coordinate_transformation_mode", "half_pixel"),
            attr(node, "nearest_mode", "round_prefer_floor"),
            attr(node, "cubic_coeff_a", -0.75),
            bool(attr(node, "exclude_outside", 0)),
            bool(attr(node, "antialias", 0)),
            attr(node, "extrapolation_value", 0.0),
        )
        padded = [*node.inputs[1:], None, None, None][:3]
        roi, scales, sizes = (_nonempty(ctx, v) for v in padded)
        axes = [a % rank for a in attr(node, "axes", None) or range(rank)]
    if scales is not None:
        plan = _plan_scales(ctx, x, axes, scales)
    elif sizes is not None:
        plan = _plan_sizes(ctx, node, x, axes, sizes)
    else:
        raise ctx.unsupported(node, "neither scales nor sizes")
    regions = None
    if sampling.transform == "tf_crop_and_resize":
        regions = ctx.cast(ctx.expr(roi), _F64)
    tensor = None
    if any(isinstance(p.scale, int) for p in plan):
        tensor = ctx.cast(ctx.expr(scales), _F64)
    for p in plan:
        if isinstance(p.scale, float) and p.scale == 1.0 and regions is None:
            continue
        x = _resize_axis(ctx, x, p, sampling, tensor if isinstance(p.scale, int) else None, regions)
    return x


def _nonempty(ctx: Context, value: ir.Value | None) -> ir.Value | None:
    """The input unless it is absent or has no elements, which means the same here."""
    if value is None:
        return None
    return None if ctx.dims.product(ctx.shape(ctx.expr(value))) == 0 else value


def _plan_scales(ctx: Context, x: relax.Expr, axes: list[int], scales: Any) -> list[_Axis]:
    known = scales if isinstance(scales, list) else ctx.constant(scales)
    shape = ctx.shape(x)
    count = len(axes)
    if known is None:
        f = ctx.cast(ctx.expr(scales), _F64)

        def lengths(s: te.Tensor) -> te.Tensor:
            def length(i: Any) -> Any:
                size = _float(as_expr(shape[axes[-1]]))
                for k in range(count - 1):
                    size = tirx.Select(tirx.EQ(i, as_expr(k)), _float(as_expr(shape[axes[k]])), size)
                return tirx.floor(size * s(i)).astype("int64")

            return te.compute((as_expr(count),), length, name="resized")

        found = ctx.dims_from_tensor(ctx.te(lengths, f, name="resized_lengths"), "resized")
        return [_Axis(a, shape[a], n, i, (i, count + i)) for i, (a, n) in enumerate(zip(axes, found))]
    plan = []
    for i, (axis, scale) in enumerate(zip(axes, known)):
        scale, old = float(scale), shape[axis]
        if isinstance(old, int):
            new: Dim = int(old * scale)
        elif scale.is_integer():
            new = ctx.dims.simplify(old * int(scale))
        else:
            new = ctx.new_dim(tirx.floor(_float(old) * _f(scale)).astype("int64"), "resized")
        plan.append(_Axis(axis, old, new, scale, (i, count + i)))
    return plan


def _plan_sizes(ctx: Context, node: ir.Node, x: relax.Expr, axes: list[int], sizes: ir.Value) -> list[_Axis]:
    wanted = ctx.symbolic_or_dynamic(sizes)
    shape = ctx.shape(x)
    policy = attr(node, "keep_aspect_ratio_policy", "stretch")
    ratios = [_ratio(n, shape[a]) for a, n in zip(axes, wanted)]
    if policy != "stretch":
        best = ratios[0]
        for r in ratios[1:]:
            if isinstance(best, float) and isinstance(r, float):
                best = min(best, r) if policy == "not_larger" else max(best, r)
            else:
                combine = tirx.min if policy == "not_larger" else tirx.max
                best = combine(_float(best), _float(r))
        ratios = [best] * len(axes)
        wanted = [
            int(best * shape[a] + 0.5)
            if isinstance(best, float) and isinstance(shape[a], int)
            else ctx.new_dim(tirx.floor(_float(best) * _float(as_expr(shape[a])) + _f(0.5)).astype("int64"), "resized")
            for a in axes
        ]
    return [_Axis(a, shape[a], n, r, (i, len(axes) + i)) for i, (a, n, r) in enumerate(zip(axes, wanted, ratios))]


def _ratio(new: Dim, old: Dim) -> Any:
    if isinstance(new, int) and isinstance(old, int):
        return new / old
    return _float(as_expr(new)) / _float(as_expr(old))


def _coordinate(p: _Axis, s: _Sampling, o: Any, scale: Any, region: tuple[Any, Any] | None) -> Any:
    """Where output position ``o`` lies in the input."""
    o, old = _float(o), _float(as_expr(p.old))
    width = scale * old
    one = tirx.EQ(width, _f(1))
    safe = tirx.Select(one, _f(2), width)
    half = (o + _f(0.5)) / scale - _f(0.5)
    if s.transform == "half_pixel":
        return half
    if s.transform == "asymmetric":
        return o / scale
    if s.transform == "pytorch_half_pixel":
        return tirx.Select(one, _f(-0.5), half)
    if s.transform == "align_corners":
        return tirx.Select(one, _f(0), o * (old - _f(1)) / (safe - _f(1)))
    if s.transform == "half_pixel_symmetric":
        offset = old / _f(2) * (_f(1) - _float(as_expr(p.new)) / width)
        return offset + half
    if s.transform == "tf_half_pixel_for_nn":
        return (o + _f(0.5)) / scale
    assert region is not None
    begin, end = region
    span = (end - begin) * (old - _f(1))
    return tirx.Select(one, span / _f(2), o * span / (safe - _f(1))) + begin * (old - _f(1))


def _weight(s: _Sampling, offset: Any) -> Any:
    """The interpolation kernel at a distance from the sampling point."""
    d = tirx.abs(offset)
    if s.mode == "linear":
        return tirx.max(_f(1) - d, _f(0))
    a = _f(s.a)
    near = ((a + _f(2)) * d - (a + _f(3))) * d * d + _f(1)
    far = ((a * d - _f(5) * a) * d + _f(8) * a) * d - _f(4) * a
    return tirx.Select(d <= _f(1), near, tirx.Select(d < _f(2), far, _f(0)))


def _resize_axis(
    ctx: Context, x: relax.Expr, p: _Axis, s: _Sampling, scales: relax.Expr | None, regions: relax.Expr | None
) -> relax.Expr:
    shape, dtype = ctx.shape(x), ctx.storage(x)
    shape[p.axis] = p.new
    extra = [t for t in (scales, regions) if t is not None]

    def parts(rest: tuple[te.Tensor, ...]) -> tuple[Any, Any]:
        tensors = list(rest)
        scale = tensors.pop(0)(as_expr(p.scale)) if scales is not None else _float(p.scale)
        region = (tensors[0](as_expr(p.roi[0])), tensors[0](as_expr(p.roi[1]))) if regions is not None else None
        return scale, region

    if s.mode == "nearest":

        def nearest(t: te.Tensor, *rest: te.Tensor) -> te.Tensor:
            scale, region = parts(rest)

            def body(*i: Any) -> Any:
                at = list(i)
                position = _coordinate(p, s, i[p.axis], scale, region)
                at[p.axis] = _clamped(_nearest(position, s.nearest), p.old)
                return _extrapolated(t(*at), position, p, s, region, dtype)

            return te.compute([as_expr(d) for d in shape], body, name="resize_nearest")

        return ctx.te(nearest, x, *extra, name="resize_nearest")

    taps = _taps(ctx, p, s, scales)

    def interpolate(t: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        scale, region = parts(rest)
        stretch = tirx.min(scale, _f(1)) if s.antialias else _f(1)
        start = as_expr(1) - tirx.floordiv(as_expr(taps), as_expr(2))

        def raw(o: Any, k: Any) -> Any:
            position = _coordinate(p, s, o, scale, region)
            base = tirx.ceil(position) - _f(1)
            weight = _weight(s, (_float(start + k) - (position - base)) * stretch)
            if s.exclude:
                index = base.astype("int64") + start + k
                inside = tirx.And(index >= as_expr(0), index < as_expr(p.old))
                weight = tirx.Select(inside, weight, _f(0))
            return weight

        weights = te.compute((as_expr(p.new), as_expr(taps)), raw, name="weights")
        j = te.reduce_axis((as_expr(0), as_expr(taps)), name="j")
        total = te.compute((as_expr(p.new),), lambda o: te.sum(weights(o, j), axis=j), name="total")
        k = te.reduce_axis((as_expr(0), as_expr(taps)), name="k")

        def body(*i: Any) -> Any:
            o = i[p.axis]
            base = (tirx.ceil(_coordinate(p, s, o, scale, region)) - _f(1)).astype("int64")
            at = list(i)
            at[p.axis] = _clamped(base + start + k, p.old)
            return te.sum(t(*at).astype(_F64) * weights(o, k) / total(o), axis=k)

        out = te.compute([as_expr(d) for d in shape], body, name="resized")

        def finish(*i: Any) -> Any:
            position = _coordinate(p, s, i[p.axis], scale, region)
            return _extrapolated(convert(out(*i), dtype), position, p, s, region, dtype)

        return te.compute([as_expr(d) for d in shape], finish, name="resize")

    return ctx.te(interpolate, x, *extra, name=f"resize_{s.mode}")


def _taps(ctx: Context, p: _Axis, s: _Sampling, scales: relax.Expr | None) -> Dim:
    """The number of elements that take part in one result."""
    reach = 1 if s.mode == "linear" else 2
    if not s.antialias:
        return 2 * reach

    def count(scale: Any) -> Any:
        start = tirx.floor(_f(-reach) / tirx.min(scale, _f(1))).astype("int64") + 1
        return as_expr(2) - start * 2

    if scales is None:
        if isinstance(p.scale, float):
            return 2 - 2 * (int(-reach / min(p.scale, 1.0) // 1) + 1)
        return ctx.new_dim(count(p.scale), "taps")
    made = ctx.te(
        lambda t: te.compute((as_expr(1),), lambda i: count(t(as_expr(p.scale))), name="taps"),
        scales,
        name="resize_taps",
    )
    return ctx.dims_from_tensor(made, "taps")[0]


def _nearest(position: Any, mode: str) -> Any:
    base = tirx.ceil(position) - _f(1)
    ratio = position - base
    if mode == "round_prefer_floor":
        upper = ratio > _f(0.5)
    elif mode == "round_prefer_ceil":
        upper = ratio >= _f(0.5)
    elif mode == "floor":
        upper = ratio >= _f(1)
    else:
        upper = ratio > _f(0)
    return base.astype("int64") + tirx.Select(upper, as_expr(1), as_expr(0))


def _clamped(index: Any, size: Dim) -> Any:
    return tirx.max(tirx.min(index, as_expr(size) - 1), as_expr(0))


def _extrapolated(value: Any, position: Any, p: _Axis, s: _Sampling, region: Any, dtype: str) -> Any:
    """The value, or the extrapolation value where the position lies outside of the input (tf_crop_and_resize only)."""
    if region is None:
        return value
    outside = tirx.Or(position < _f(0), position > _float(as_expr(p.old)) - _f(1))
    return tirx.Select(outside, convert(_f(s.extrapolation), dtype), value)
