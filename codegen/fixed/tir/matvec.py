"""`MatVec` in TIR, and the loops of all products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm import te
from tvm.s_tir import Schedule

from qcompile.codegen.fixed.nodes import MatMul, MatVec
from qcompile.codegen.fixed.tir import build
from qcompile.codegen.fixed.tir.expressions import machine_int, put_out


@build.compute.register
def _compute(node: MatVec, inputs: Sequence[te.Tensor], constants: Mapping[str, te.Tensor]) -> te.Tensor:
    (x,), weight, bias = inputs, constants["weight"], constants["bias"]
    sum_type = machine_int(node.accumulator.bits + 1)
    k = te.reduce_axis((0, node.k), "k")
    accumulator = te.compute(
        (node.inputs[0].tokens, node.n),
        lambda t, n: te.sum(weight[k, n].astype(sum_type) * x[t, k].astype(sum_type), axis=k),
        name="accumulator",
    )

    def out(t: te.Var, n: te.Var) -> te.Expr:
        total = accumulator[t, n] + bias[n].astype(sum_type)
        return put_out(total, constants["multiplier"][n], node.requantize, node.accumulator_bounds, node.output.type)

    return te.compute(node.output.shape, out, name=build.OUTPUT)


@build.schedule.register
def _schedule(node: MatVec | MatMul, sch: Schedule) -> None:
    accumulator, y = sch.get_sblock("accumulator"), sch.get_sblock(build.OUTPUT)
    t, n, k = sch.get_loops(accumulator)
    column, lane = sch.split(n, [None, node.folding.pe])
    row, element = sch.split(k, [None, node.folding.simd])
    sch.reorder(t, column, row, lane, element)
    sch.annotate(row, "hls.pipeline", 1)
    sch.annotate(lane, "hls.unroll", 1)
    sch.annotate(element, "hls.unroll", 1)
    sch.split(sch.get_loops(y)[-1], [None, node.folding.pe])
    sch.reverse_compute_at(y, column)
    sch.annotate(sch.get_loops(y)[-1], "hls.unroll", 1)
    sch.decompose_reduction(accumulator, row)
