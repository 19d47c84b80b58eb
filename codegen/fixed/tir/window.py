"""Windowed nodes in TIR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule

from qcompile.codegen.fixed.nodes import Depthwise, Geometry, MaxPool, Window
from qcompile.codegen.fixed.tir import build
from qcompile.codegen.fixed.tir.expressions import const, machine_int, put_out


def tap(x: te.Tensor, g: Geometry, outside: int) -> Callable[[Any, Any, Any], Any]:
    """A function from (window, tap, channel) to an element of the image, or ``outside``."""
    columns = g.out_shape[1]

    def element(window: Any, position: Any, channel: Any) -> Any:
        row = window // columns * g.stride[0] - g.pads[0] + position // g.kernel[1] * g.dilation[0]
        column = window % columns * g.stride[1] - g.pads[1] + position % g.kernel[1] * g.dilation[1]
        if not g.padded:
            return x[row * g.width + column, channel]
        inside = tirx.all(row >= 0, row < g.height, column >= 0, column < g.width)
        return tirx.if_then_else(inside, x[row * g.width + column, channel], const(outside, x.dtype))

    return element


@build.compute.register
def _window(node: Window, inputs: Sequence[te.Tensor], constants: Mapping[str, te.Tensor]) -> te.Tensor:
    element, c = tap(inputs[0], node.geometry, 0), node.channels
    kind = node.output.type.dtype
    return te.compute(node.output.shape, lambda w, j: element(w, j // c, j % c).astype(kind), name=build.OUTPUT)


@build.schedule.register
def _schedule_window(node: Window, sch: Schedule) -> None:
    _, j = sch.get_loops(sch.get_sblock(build.OUTPUT))
    outer, lane = sch.split(j, [None, node.folding.pe])
    sch.annotate(outer, "hls.pipeline", 1)
    sch.annotate(lane, "hls.unroll", 1)


@build.compute.register
def _depthwise(node: Depthwise, inputs: Sequence[te.Tensor], constants: Mapping[str, te.Tensor]) -> te.Tensor:
    element, weight, bias = tap(inputs[0], node.geometry, 0), constants["weight"], constants["bias"]
    sum_type = machine_int(node.accumulator.bits + 1)
    k = te.reduce_axis((0, node.geometry.taps), "k")
    accumulator = te.compute(
        (node.geometry.windows, node.channels),
        lambda w, c: te.sum(weight[k, c].astype(sum_type) * element(w, k, c).astype(sum_type), axis=k),
        name="accumulator",
    )

    def out(w: Any, c: Any) -> Any:
        total = accumulator[w, c] + bias[c].astype(sum_type)
        return put_out(total, constants["multiplier"][c], node.requantize, node.accumulator_bounds, node.output.type)

    return te.compute(node.output.shape, out, name=build.OUTPUT)


@build.compute.register
def _maxpool(node: MaxPool, inputs: Sequence[te.Tensor], constants: Mapping[str, te.Tensor]) -> te.Tensor:
    element = tap(inputs[0], node.geometry, int(node.inputs[0].low.min()))
    k = te.reduce_axis((0, node.geometry.taps), "k")
    largest = te.compute(node.output.shape, lambda w, c: te.max(element(w, k, c), axis=k), name="largest")
    return te.compute(node.output.shape, lambda w, c: largest[w, c], name=build.OUTPUT)


def _fold_reduction(node: Depthwise | MaxPool, sch: Schedule, name: str) -> None:
    block, y = sch.get_sblock(name), sch.get_sblock(build.OUTPUT)
    w, c, k = sch.get_loops(block)
    group, lane = sch.split(c, [None, node.folding.pe])
    sch.reorder(w, group, k, lane)
    sch.annotate(k, "hls.pipeline", 1)
    sch.annotate(lane, "hls.unroll", 1)
    sch.split(sch.get_loops(y)[-1], [None, node.folding.pe])
    sch.reverse_compute_at(y, group)
    sch.annotate(sch.get_loops(y)[-1], "hls.unroll", 1)
    sch.decompose_reduction(block, k)


@build.schedule.register
def _schedule_depthwise(node: Depthwise, sch: Schedule) -> None:
    _fold_reduction(node, sch, "accumulator")


@build.schedule.register
def _schedule_maxpool(node: MaxPool, sch: Schedule) -> None:
    _fold_reduction(node, sch, "largest")
