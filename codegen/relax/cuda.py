"""CUDA's converters of the operators in ``qcompile.kernel``.

Linear operators, row kernels and attention are called by name and compiled apart from the rest of the program. Tensors
between kernels are float32 matrices ``(rows, channels)``, except that what only linear operators read is written as they
want it: float16, or int8 codes (signed, unlike on CPUs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cuda.attention import CudaAttention
from qcompile.codegen.kernels.cuda.kronecker import kronecker_rows
from qcompile.codegen.kernels.cuda.plan import Plan, family, make_plan
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise
from qcompile.codegen.relax import convolutions
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.kernels import (
    DOMAIN,
    LinearRecord,
    calls,
    convert_rowwise,
    quantized_operand,
    row_scale,
    rows,
    shaped,
)
from qcompile.codegen.relax.ops.attention import Heads, _biased, attention_scores, attention_values
from qcompile.codegen.relax.registry import converter
from qcompile.formats import parse_activation, parse_format

BUCKETS = (1, 16, 64, 512)
"""Numbers of rows a program has kernels for."""

WORKSPACE = "workspace."
"""Prefix of parameters that hold no weights: scratch, zero when the program is loaded."""


@dataclass
class CudaCalls:
    """What this file keeps during one conversion.

    Attributes:
        plans: kernels of linear operators, by the name they are called by.
        rowwise, attention: other kernels, likewise.
        workspaces: scratch parameters by graph.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    rowwise: dict[str, CudaRowwise] = field(default_factory=dict)
    attention: dict[str, CudaAttention] = field(default_factory=dict)
    workspaces: dict[int, tuple[relax.Var, relax.Var]] = field(default_factory=dict)


def cuda_calls(ctx: Context) -> CudaCalls:
    """The state of ``ctx``."""
    return ctx.state.setdefault(CudaCalls, CudaCalls())


def call(ctx: Context, name: str, tensors: list[Any], outputs: list[tuple[list[Any], str]]) -> list[Any]:
    """Call the kernel ``name`` on tensors and fresh outputs."""
    types = [relax.TensorType([as_expr(d) for d in shape], dtype) for shape, dtype in outputs]
    made = ctx.bb.emit(relax.call_dps_packed(name, tensors, types[0] if len(types) == 1 else types))
    if len(types) == 1:
        return [made]
    return [ctx.bb.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]


def plan_of(ctx: Context, node: ir.Node) -> Plan:
    """The kernels of a `Linear`."""
    activation = parse_activation(attr(node, "activation_format"))
    inputs = [*node.inputs, *[None] * 7]
    epilogue = Epilogue(inputs[5] is not None, attr(node, "epilogue"), inputs[6] is not None)
    weight = parse_format(attr(node, "weight_format"))
    problem = LinearProblem(attr(node, "k"), attr(node, "n"), weight, activation, epilogue)
    return make_plan(problem, ctx.target, "float16", "float32", BUCKETS, {BUCKETS[-1]: {"split": 1}})


@converter(DOMAIN, "Linear", kinds=("cuda",), priority=1)
def linear(ctx: Context, node: ir.Node, x: Any, scale: Any, *operands: Any) -> relax.Expr:
    """Pack the weight and call the kernels."""
    bias, residual = (*operands, *[None] * 5)[3:5]
    lead = ctx.shape(x)[:-1]
    if scale is not None:
        scale = row_scale(ctx, scale, ctx.dims.product(lead))
    out = product(ctx, node, rows(ctx, x), scale, bias, residual if residual is None else rows(ctx, residual))
    return shaped(ctx, out, lead, attr(node, "n"))


def product(
    ctx: Context, node: ir.Node, x: relax.Expr, scale: relax.Expr | None, bias: Any = None, residual: Any = None
) -> relax.Expr:
    """Rows ``(M, K)`` of int8 codes, with scales ``(M,)``, or of floats times the weight of ``node``: ``(M, N)``."""
    plan = plan_of(ctx, node)
    problem = plan.problem
    weight = quantized_operand(ctx, node, problem.weight)
    first = plan.entries[0]
    chosen = "; ".join(f"up to {e.rows} rows {e.family}" for e in plan.entries)
    record = LinearRecord(
        attr(node, "sites"), attr(node, "weights"), attr(node, "parts"), problem, family(first.family), first.config,
        chosen, {},
    )  # fmt: skip
    calls(ctx).linears.append(record)
    packed = []
    for part, array in plan.pack(weight).items():
        record.packed[part] = f"{node.inputs[2].name}.{part}"
        packed.append(ctx.param(record.packed[part], array))
    tensors = [_operand(ctx, x, plan), *([scale] if problem.activation.bits else []), *packed]
    if bias is not None:
        tensors.append(ctx.reshape(bias, [problem.n]))
    if residual is not None:
        tensors.append(residual)
    cuda_calls(ctx).plans[plan.name] = plan
    tensors += _workspace(ctx, node)
    (out,) = call(ctx, plan.name, tensors, [([ctx.shape(x)[0], problem.n], "float32")])
    return out


@converter(DOMAIN, "Conv", kinds=("cuda",), priority=1)
def convolution(ctx: Context, node: ir.Node, x: Any, scale: Any, *operands: Any) -> list[Any]:
    """The product of the unfolded input with the weight; with groups, generated loops."""

    def multiply(rows: relax.Expr, scales: relax.Expr | None, bias: Any, limits: Any) -> relax.Expr:
        assert limits is None  # asked of CPUs only, see `lower`
        return product(ctx, node, rows, scales, bias)

    return convolutions.convolve(ctx, node, x, scale, *operands, multiply=multiply)


def _operand(ctx: Context, x: relax.Expr, plan: Plan) -> relax.Expr:
    """Rows of x in the type and width the kernels take."""
    shape = plan.shape()
    dtype = "int8" if shape.integer else "float16"
    if ctx.storage(x) == dtype and shape.k == shape.x_width:
        return x

    def build(x: te.Tensor) -> te.Tensor:
        def element(i: Any, j: Any) -> Any:
            value = x[i, j].astype(dtype)
            return value if shape.k == shape.x_width else tirx.if_then_else(j < shape.k, value, tirx.const(0, dtype))

        return te.compute([x.shape[0], shape.x_width], element, name="operand")

    return ctx.te(build, x, name=f"to_{dtype}")


def _workspace(ctx: Context, node: ir.Node) -> list[relax.Var]:
    """Scratch all linear operators of a graph share: partial sums, and counters that are zero between calls."""
    state = cuda_calls(ctx)
    key = id(node.graph)
    if key not in state.workspaces:
        needs = [plan_of(ctx, n).scratch() for n in node.graph if _multiplies(n)]
        partial = np.zeros(max(n[0] for n in needs), np.float32)
        arrived = np.zeros(max(n[1] for n in needs), np.int32)
        state.workspaces[key] = (
            ctx.param(f"{WORKSPACE}partial", partial),
            ctx.param(f"{WORKSPACE}arrived", arrived),
        )
    return list(state.workspaces[key])


def _multiplies(node: ir.Node) -> bool:
    return node.domain == DOMAIN and (
        node.op_type == "Linear" or (node.op_type == "Conv" and attr(node, "group", 1) == 1)
    )


@converter(DOMAIN, "Rowwise", kinds=("cuda",), priority=1)
def rowwise(
    ctx: Context,
    node: ir.Node,
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    static: Any = None,
    factor: Any = None,
    *mixing: Any,
) -> list[Any]:
    """Norm, activation or gated product, with rotation or Kronecker product and the activation quantizer fused."""
    out = _float_output(node.outputs[0])
    sizes, packed = _packed_matrices(ctx, node) if mixing else (None, ())

    def run(options: dict[str, Any], floats: bool, operands: list[Any], outputs: list[Any]) -> list[Any]:
        kernel = CudaRowwise(**options, dtype=ctx.storage(x), out=out if floats else "")
        name = _named(cuda_calls(ctx).rowwise, kernel, f"rowwise_{attr(node, 'producer')}_{kernel.width}")
        return call(ctx, name, operands, outputs)

    return convert_rowwise(ctx, node, x, (gamma, beta, static), (out, "int8"), run, factor, packed, sizes)


def _packed_matrices(ctx: Context, node: ir.Node) -> tuple[tuple[int, int], tuple[relax.Var, ...]]:
    """Rows of the two matrices of a Kronecker product, and what its kernel takes of them."""
    left, right = (ctx.constant(value) for value in node.inputs[5:7])
    assert left is not None and right is not None
    sizes = len(left), len(right)
    rows = kronecker_rows(sizes[0] * sizes[1], sizes)  # packed the same for any number of blocks
    assert rows is not None
    packed = rows.pack(left, right)
    return sizes, tuple(ctx.param(f"{node.inputs[5].name}.{part}", array) for part, array in packed.items())


def _float_output(value: ir.Value) -> str:
    """float16 if linear operators with float activations are all that read it, and take rows of its width as they are."""
    readers = [use.node for use in value.uses()]
    only = all(
        n.domain == DOMAIN
        and n.op_type == "Linear"
        and attr(n, "activation_format") == "none"
        and use.idx == 0
        and attr(n, "k") % 8 == 0
        for n, use in zip(readers, value.uses())
    )
    return "float16" if only and not value.is_graph_output() else "float32"


@converter(DOMAIN, "Attention", kinds=("cuda",), priority=1)
def attention(ctx: Context, node: ir.Node, *operands: Any) -> relax.Expr:
    """Softmax attention: one kernel, or scores, softmax and product with the values where heads have odd sizes."""
    layout = attr(node, "layout")
    count = 1 if layout == "merged" else 3
    tensors, mask = list(operands[:count]), (*operands, None)[count]
    heads, kv_heads = attr(node, "heads"), attr(node, "kv_heads")
    head_dim, value_dim = attr(node, "head_dim"), attr(node, "value_dim")
    if mask is not None:
        shape = ctx.shape(mask)
        mask = ctx.reshape(mask, [1] * (4 - len(shape)) + list(shape))
    calls(ctx).uses["attention"] += 1
    shape = ctx.shape(tensors[0])
    batch, length = shape[0], shape[2 if layout == "heads" else 1]
    keys = length if layout == "merged" else ctx.shape(tensors[1])[2 if layout == "heads" else 1]
    whole = mask is None or ctx.dims.equal(ctx.shape(mask)[3], keys)
    if not (CudaAttention.takes(head_dim, value_dim) and whole):
        return _plain_attention(ctx, node, tensors, mask)
    kind, axes = "", (True, False, False)
    if mask is not None:
        kind = "bool" if ctx.storage(mask) == "bool" else "float"
        first, second, third = (not ctx.dims.equal(d, 1) for d in ctx.shape(mask)[:3])
        axes = (first, second, third)
    kernel = CudaAttention(
        heads, kv_heads, head_dim, value_dim, attr(node, "scale"), layout, kind, axes, bool(attr(node, "is_causal")),
        ctx.storage(tensors[0]),
    )  # fmt: skip
    name = _named(cuda_calls(ctx).attention, kernel, f"attention_{heads}x{head_dim}")
    if mask is not None:
        tensors.append(mask)
    (out,) = call(ctx, name, tensors, [([batch, length, heads * value_dim], "float32")])
    return out


def _named(known: dict[str, Any], kernel: Any, stem: str) -> str:
    """The name an equal kernel has, or a new one."""
    for name, other in known.items():
        if other == kernel:
            return name
    name = f"{stem}_{len(known)}"
    known[name] = kernel
    return name


def _plain_attention(ctx: Context, node: ir.Node, tensors: list[Any], mask: Any) -> relax.Expr:
    heads, kv_heads, head_dim = attr(node, "heads"), attr(node, "kv_heads"), attr(node, "head_dim")
    if len(tensors) == 1:
        tensors = _split(ctx, tensors[0], [heads * head_dim, kv_heads * head_dim, kv_heads * attr(node, "value_dim")])
    query, key, value = (Heads.of(ctx, t, n) for t, n in zip(tensors, (heads, kv_heads, kv_heads)))
    scores = attention_scores(ctx, query, key, attr(node, "scale"), "float32")
    scores = _biased(ctx, node, scores, query, key, mask, None, 0, "float32")
    weights = ctx.te(_softmax, scores, name="attention_softmax")
    return attention_values(ctx, weights, value, "float32", packed=True)


def _softmax(s: te.Tensor) -> te.Tensor:
    """Softmax over the last of four axes, by reductions the schedule rules know; a row of nothing but -inf gives zeros."""
    lowest = tirx.const(-3.0e38, "float32")
    j, k = (te.reduce_axis((0, s.shape[3]), name=n) for n in "jk")
    peak = te.compute(s.shape[:3], lambda b, h, i: te.max(s[b, h, i, j], axis=j), name="peak")
    powers = lambda b, h, i, j: tirx.exp(tirx.max(s[b, h, i, j], lowest) - tirx.max(peak[b, h, i], lowest))  # noqa: E731
    masked = lambda b, h, i, j: tirx.Select(s[b, h, i, j] < lowest, tirx.const(0.0, "float32"), powers(b, h, i, j))  # noqa: E731
    total = te.compute(s.shape[:3], lambda b, h, i: te.sum(masked(b, h, i, k), axis=k), name="total")
    least = tirx.const(1e-37, "float32")
    return te.compute(s.shape, lambda b, h, i, j: masked(b, h, i, j) / tirx.max(total[b, h, i], least), name="softmax")


def _split(ctx: Context, matrix: relax.Expr, widths: list[int]) -> list[relax.Expr]:
    """Columns of ``(batch, length, sum of widths)``."""
    found, start = [], 0
    for width in widths:

        def build(x: te.Tensor, start: int = start, width: int = width) -> te.Tensor:
            return te.compute([x.shape[0], x.shape[1], width], lambda b, i, c: x[b, i, c + start], name="columns")

        found.append(ctx.te(build, matrix, name="columns"))
        start += width
    return found
