"""Elementwise nodes, sums over tokens and movements in TIR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule

from qcompile.codegen.fixed.nodes import (
    Add,
    Affine,
    Concat,
    Lookup,
    Multiply,
    Node,
    Prepend,
    Select,
    TokenSum,
    Transpose,
)
from qcompile.codegen.fixed.tir import build
from qcompile.codegen.fixed.tir.expressions import machine_int, put_out

Tensors = Sequence[te.Tensor]
Named = Mapping[str, te.Tensor]


@build.compute.register
def _affine(node: Affine, inputs: Tensors, constants: Named) -> te.Tensor:
    x, offset = inputs[0], constants["offset"]
    work = machine_int(node.locals["product"].bits + 2)

    def out(t: Any, c: Any) -> Any:
        total = x[t, c].astype(work) * constants["multiplier"][c].astype(work)
        total = total + offset[t if len(node.offset) > 1 else 0, c].astype(work)
        return put_out(total, None, node.rounding, node.total_bounds, node.output.type)

    return te.compute(node.output.shape, out, name=build.OUTPUT)


@build.compute.register
def _lookup(node: Lookup, inputs: Tensors, constants: Named) -> te.Tensor:
    x, low = inputs[0], node.inputs[0].type.low
    return te.compute(
        node.output.shape,
        lambda t, c: constants["table"][x[t, c].astype("int32") - low].astype(node.output.type.dtype),
        name=build.OUTPUT,
    )


@build.compute.register
def _add(node: Add, inputs: Tensors, constants: Named) -> te.Tensor:
    work = machine_int(node.locals["product"].bits + 2)

    def out(t: Any, c: Any) -> Any:
        total = sum(x[t, c].astype(work) * tirx.const(m, work) for x, m in zip(inputs, node.multipliers, strict=True))
        return put_out(total, None, node.rounding, node.total_bounds, node.output.type)

    return te.compute(node.output.shape, out, name=build.OUTPUT)


@build.compute.register
def _multiply(node: Multiply, inputs: Tensors, constants: Named) -> te.Tensor:
    a, b = inputs
    low, high = node.total_bounds
    work = machine_int(max(abs(int(low.min())), abs(int(high.max()))).bit_length() + 1)

    def out(t: Any, c: Any) -> Any:
        total = a[t, c].astype(work) * b[t, c].astype(work)
        return put_out(total, constants["multiplier"][c], node.step, node.total_bounds, node.output.type)

    return te.compute(node.output.shape, out, name=build.OUTPUT)


@build.compute.register
def _concat(node: Concat, inputs: Tensors, constants: Named) -> te.Tensor:
    (a, b), first, kind = inputs, node.inputs[0].channels, node.output.type.dtype
    return te.compute(
        node.output.shape,
        lambda t, c: tirx.if_then_else(c < first, a[t, c].astype(kind), b[t, c - first].astype(kind)),
        name=build.OUTPUT,
    )


@build.compute.register
def _prepend(node: Prepend, inputs: Tensors, constants: Named) -> te.Tensor:
    x, rows, count, kind = inputs[0], constants["rows"], len(node.rows), node.output.type.dtype
    return te.compute(
        node.output.shape,
        lambda t, c: tirx.if_then_else(t < count, rows[t, c].astype(kind), x[t - count, c].astype(kind)),
        name=build.OUTPUT,
    )


@build.compute.register
def _select(node: Select, inputs: Tensors, constants: Named) -> te.Tensor:
    x, kind = inputs[0], node.output.type.dtype
    token, channel = node.tokens[0], node.channels[0]
    return te.compute(node.output.shape, lambda t, c: x[t + token, c + channel].astype(kind), name=build.OUTPUT)


@build.compute.register
def _transpose(node: Transpose, inputs: Tensors, constants: Named) -> te.Tensor:
    return te.compute(node.output.shape, lambda t, c: inputs[0][c, t], name=build.OUTPUT)


@build.compute.register
def _token_sum(node: TokenSum, inputs: Tensors, constants: Named) -> te.Tensor:
    x, sum_type = inputs[0], machine_int(node.accumulator.bits)
    k = te.reduce_axis((0, node.inputs[0].tokens), "k")
    accumulator = te.compute(
        (node.inputs[0].channels,), lambda c: te.sum(x[k, c].astype(sum_type), axis=k), name="accumulator"
    )
    return te.compute(
        node.output.shape,
        lambda t, c: put_out(
            accumulator[c], constants["multiplier"][c], node.requantize, node.accumulator_bounds, node.output.type
        ),
        name=build.OUTPUT,
    )


def _fold_channels(node: Node, sch: Schedule) -> None:
    channel = sch.get_loops(sch.get_sblock(build.OUTPUT))[-1]
    group, lane = sch.split(channel, [None, node.folding.pe])
    sch.annotate(group, "hls.pipeline", 1)
    sch.annotate(lane, "hls.unroll", 1)


for _kind in (Affine, Lookup, Add, Multiply, Concat, Prepend, Select, Transpose):
    build.schedule.register(_kind, _fold_channels)


@build.schedule.register
def _schedule_sum(node: TokenSum, sch: Schedule) -> None:
    block = sch.get_sblock("accumulator")
    c, k = sch.get_loops(block)
    group, lane = sch.split(c, [None, node.folding.pe])
    sch.reorder(k, group, lane)
    sch.annotate(group, "hls.pipeline", 1)
    sch.annotate(lane, "hls.unroll", 1)
    sch.decompose_reduction(block, k)
    _fold_channels(node, sch)
