"""Geometry of sliding windows, shared by convolutions and pooling: padding, output sizes, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from tvm import relax

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim


@dataclass(frozen=True)
class Windows:
    """Windows over the spatial axes of a tensor ``(batch, channels, *spatial)``.

    Attributes:
        kernel, strides, dilations: per spatial axis.
        before, after: padding at the two ends.
        out: number of windows.
    """

    kernel: tuple[Dim, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    out: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.strides)

    def padded(self) -> bool:
        """Whether any window reaches outside the tensor on purpose."""
        return any(not (isinstance(p, int) and p == 0) for p in (*self.before, *self.after))


def windows(
    ctx: Context, node: ir.Node, x: relax.Expr, kernel: Sequence[Dim], spatial: Sequence[Dim] | None = None
) -> Windows:
    """The windows a Conv or pooling node describes by ``strides``, ``pads``, ``auto_pad``, ``dilations``, ``ceil_mode``.

    ``spatial`` is the extent of ``x`` along the spatial axes; channels come first if it is not given.
    """
    rank = len(kernel)
    spatial = ctx.shape(x)[2:] if spatial is None else spatial
    strides = attr(node, "strides", None) or [1] * rank
    dilations = attr(node, "dilations", None) or [1] * rank
    auto_pad = attr(node, "auto_pad", "NOTSET")
    pads: list[Dim] = list(attr(node, "pads", None) or [0] * (2 * rank))
    ceil_mode = attr(node, "ceil_mode", 0)
    before, after, out = [], [], []
    for i in range(rank):
        reach = ctx.dims.simplify((kernel[i] - 1) * dilations[i] + 1)
        size = spatial[i]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            count = ctx.dims.ceildiv(size, strides[i])
            total = ctx.dims.maximum((count - 1) * strides[i] + reach - size, 0)
            small = ctx.dims.floordiv(total, 2)
            large = ctx.dims.simplify(total - small)
            first, last = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        else:
            first, last = (pads[i], pads[rank + i]) if auto_pad == "NOTSET" else (0, 0)
            span = ctx.dims.simplify(size + first + last - reach)
            if ceil_mode:
                count = ctx.dims.ceildiv(span, strides[i]) + 1
                # the last window must begin inside the tensor or its leading padding
                beyond = (count - 1) * strides[i] >= size + first
                count = ctx.dims.select(beyond, count - 1, count)
            else:
                count = ctx.dims.floordiv(span, strides[i]) + 1
            count = ctx.dims.maximum(ctx.dims.simplify(count), 0)
        before.append(first)
        after.append(last)
        out.append(count)
    return Windows(tuple(kernel), tuple(strides), tuple(dilations), tuple(before), tuple(after), tuple(out))
