"""Products of streams, softmax and normalisation in TIR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule

from qcompile.codegen.fixed.nodes import MatMul, Normalize, Softmax
from qcompile.codegen.fixed.nodes.attention import ROOT_TWO
from qcompile.codegen.fixed.nodes.normalize import F, R, Z
from qcompile.codegen.fixed.tir import build
from qcompile.codegen.fixed.tir.expressions import const, machine_int, put_out

Tensors = Sequence[te.Tensor]
Named = Mapping[str, te.Tensor]


@build.compute.register
def _matmul(node: MatMul, inputs: Tensors, constants: Named) -> te.Tensor:
    a, b = inputs
    rows, columns, sum_type = node.rows, node.columns, machine_int(node.accumulator.bits + 1)
    k = te.reduce_axis((0, rows), "k")

    def left(t: Any, h: Any) -> Any:
        value = a[t, h * rows + k].astype(sum_type)
        return value if node.exponent is None else const(1, sum_type) << (const(node.exponent, sum_type) - value)

    def right(h: Any, j: Any) -> Any:
        return (b[j, h * rows + k] if node.transposed else b[k, h * columns + j]).astype(sum_type)

    accumulator = te.compute(
        node.output.shape,
        lambda t, c: te.sum(left(t, c // columns) * right(c // columns, c % columns), axis=k),
        name="accumulator",
    )
    return te.compute(
        node.output.shape,
        lambda t, c: put_out(
            accumulator[t, c], constants["multiplier"][c], node.requantize, node.accumulator_bounds, node.output.type
        ),
        name=build.OUTPUT,
    )


@build.compute.register
def _softmax(node: Softmax, inputs: Tensors, constants: Named) -> te.Tensor:
    x, n, heads, tokens = inputs[0], node.length, node.heads, node.inputs[0].tokens
    k, m = te.reduce_axis((0, n), "k"), te.reduce_axis((0, n), "m")
    largest = te.compute((tokens, heads), lambda t, h: te.max(x[t, h * n + k], axis=k), name="largest")
    exponential = te.compute(
        (tokens, heads * n),
        lambda t, c: constants["table"][largest[t, c // n].astype("int32") - x[t, c].astype("int32")].astype("int32"),
        name="exponential",
    )
    total = te.compute((tokens, heads), lambda t, h: te.sum(exponential[t, h * n + m], axis=m), name="total")

    def code(t: Any, c: Any) -> Any:
        # Bisection over the number of doublings that keep e below sum(e) / sqrt(2).
        whole = tirx.Var("whole", "int64")
        scaled = [tirx.Var(f"scaled{b}", "int64") for b in range(node.bits + 1)]
        bits = [tirx.Var(f"bit{b}", "int64") for b in range(node.bits)]
        doublings = [1 << b for b in reversed(range(node.bits))]
        result = sum((x * const(d, "int64") for x, d in zip(bits, doublings)), start=const(0, "int64"))
        result = result.astype(node.output.type.dtype)
        for b, d in reversed(list(enumerate(doublings))):
            grown = scaled[b] << (bits[b] * const(d, "int64"))
            result = tirx.Let(scaled[b + 1], grown, result) if d > 1 else result
            below = (scaled[b] << const(d - 1, "int64")) < whole
            result = tirx.Let(bits[b], below.astype("int64"), result)
        result = tirx.Let(scaled[0], exponential[t, c].astype("int64") * const(ROOT_TWO, "int64"), result)
        return tirx.Let(whole, total[t, c // n].astype("int64") << const(15, "int64"), result)

    return te.compute(node.output.shape, code, name=build.OUTPUT)


@build.compute.register
def _normalize(node: Normalize, inputs: Tensors, constants: Named) -> te.Tensor:
    x, (tokens, channels) = inputs[0], node.inputs[0].shape
    k, m = te.reduce_axis((0, channels), "k"), te.reduce_axis((0, channels), "m")
    wide = machine_int(node.square_bound.bit_length() + F + 2)

    def word(value: int) -> Any:
        return const(value, wide)

    squares = te.compute(
        (tokens,), lambda t: te.sum(x[t, m].astype(wide) * x[t, m].astype(wide), axis=m), name="squares"
    )
    if node.centred:
        total = te.compute((tokens,), lambda t: te.sum(x[t, k].astype(wide), axis=k), name="total")
    else:
        total = te.compute((tokens,), lambda t: word(0), name="zero")
    variance = te.compute(
        (tokens,), lambda t: squares[t] * word(channels) - total[t] * total[t] + word(node.epsilon), name="variance"
    )
    half_log = te.compute(
        (tokens,),
        lambda t: sum(
            ((variance[t] >= word(1 << (2 * j))).astype(wide) for j in range(1, node.largest_k + 1)), start=word(0)
        ),
        name="half_log",
    )
    root = te.compute(
        (tokens,),
        lambda t: constants["roots"][((variance[t] << word(F)) >> (half_log[t] * word(2))) - word(1 << F)].astype(
            "int64"
        ),
        name="root",
    )

    def out(t: Any, c: Any) -> Any:
        one, scaled = const(1, "int64"), tirx.Var("scaled", "int64")
        shift = half_log[t].astype("int64") + const(R - Z, "int64")
        rounded = (scaled + ((one << (shift - one)) - one) + ((scaled >> shift) & one)) >> shift
        deviation = x[t, c].astype("int64") * const(channels, "int64") - total[t].astype("int64")
        return tirx.Let(scaled, deviation * root[t], rounded.astype(node.output.type.dtype))

    return te.compute(node.output.shape, out, name=build.OUTPUT)


def _schedule_rows(node: Softmax | Normalize, sch: Schedule) -> None:
    sums = ("largest", "total") if isinstance(node, Softmax) else ("squares", "total")
    for name in sums[: 1 if isinstance(node, Normalize) and not node.centred else 2]:
        loops = sch.get_loops(sch.get_sblock(name))
        outer, lane = sch.split(loops[-1], [None, node.folding.pe])
        sch.annotate(outer, "hls.pipeline", 1)
        sch.annotate(lane, "hls.unroll", 1)
    for name in (*(("exponential",) if isinstance(node, Softmax) else ()), build.OUTPUT):
        outer, lane = sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, node.folding.pe])
        sch.annotate(outer, "hls.pipeline", 1)
        sch.annotate(lane, "hls.unroll", 1)


build.schedule.register(Softmax, _schedule_rows)
build.schedule.register(Normalize, _schedule_rows)
