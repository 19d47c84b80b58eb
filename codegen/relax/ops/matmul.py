"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops._kernels import compute_dtype, elementwise, matmul
from qcompile.codegen.relax.registry import converter


def numpy_matmul(ctx: Context, a: relax.Expr, b: relax.Expr, **options: str) -> relax.Expr:
    """:func:`matmul` that also takes vectors, as ``numpy.matmul``: their missing dimension is added and removed again."""
    a_vector, b_vector = ctx.rank(a) == 1, ctx.rank(b) == 1
    a2 = ctx.reshape(a, [1, *ctx.shape(a)]) if a_vector else a
    b2 = ctx.reshape(b, [*ctx.shape(b), 1]) if b_vector else b
    out = matmul(ctx, a2, b2, **options)
    shape = ctx.shape(out)
    if b_vector:
        shape = shape[:-1]
    if a_vector:
        shape = [*shape[:-2], shape[-1]] if not b_vector else shape[:-1]
    return ctx.reshape(out, shape)


@converter("", "MatMul")
def _matmul(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    return numpy_matmul(ctx, a, b)


@converter("", "Gemm")
def _gemm(ctx: Context, node: ir.Node, a: relax.Expr, b: relax.Expr, c: relax.Expr | None = None) -> relax.Expr:
    """``alpha * A' @ B' + beta * C``."""
    alpha, beta = attr(node, "alpha", 1.0), attr(node, "beta", 1.0)
    dtype = ctx.storage(a)
    acc = compute_dtype(dtype)
    product = matmul(
        ctx,
        a,
        b,
        transpose_a=bool(attr(node, "transA", 0)),
        transpose_b=bool(attr(node, "transB", 0)),
        acc_dtype=acc,
    )

    def scaled(v: tirx.Expr, factor: float) -> tirx.Expr:
        if factor == 1.0:
            return v
        if dtypes.is_float(acc):
            return v * tirx.const(factor, acc)
        return (v.astype("float64") * tirx.const(factor, "float64")).astype(acc)

    if c is None or beta == 0.0:
        if alpha == 1.0 and dtype == acc:
            return product
        return elementwise(ctx, lambda p: scaled(p, alpha), product, name="gemm_scale", dtype=dtype)
    return elementwise(
        ctx,
        lambda p, bias: scaled(p, alpha) + scaled(bias.astype(acc), beta),
        product,
        c,
        name="gemm_bias",
        dtype=dtype,
    )


@converter("", "Einsum")
def _einsum(ctx: Context, node: ir.Node, *args: relax.Expr) -> relax.Expr:
    """Any contraction of any number of operands, with ellipsis, repeated and implicit output indices."""
    equation = attr(node, "equation").replace(" ", "")
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    if len(operands) != len(args):
        raise ctx.unsupported(node, f"equation {equation!r} has {len(operands)} operands, the node {len(args)}")
    ellipsis_rank = 0
    for term, arg in zip(operands, args):
        if "..." in term:
            ellipsis_rank = max(ellipsis_rank, ctx.rank(arg) - (len(term) - 3))
    ellipsis = [f".{i}" for i in range(ellipsis_rank)]
    labels = [_labels(term, ellipsis, ctx.rank(arg)) for term, arg in zip(operands, args)]
    flat = [label for term in labels for label in term]
    if "->" in equation:
        out = _labels(result, ellipsis, None)
    else:
        out = ellipsis + sorted({label for label in flat if flat.count(label) == 1 and not label.startswith(".")})
    shapes = [ctx.shape(a) for a in args]
    size = {}
    for label in dict.fromkeys(flat):
        found = [[s[i]] for term, s in zip(labels, shapes) for i, name in enumerate(term) if name == label]
        size[label] = ctx.broadcast(*found)[0]
    dtype = ctx.storage(args[0])
    acc = compute_dtype(dtype)
    summed = [label for label in size if label not in out]

    def build(*xs: te.Tensor) -> te.Tensor:
        loops = {label: te.reduce_axis((as_expr(0), as_expr(size[label])), name="k") for label in summed}

        def body(*index: tirx.Expr) -> tirx.Expr:
            at = dict(zip(out, index)) | {label: loop.var for label, loop in loops.items()}
            product = None
            for x, term, shape in zip(xs, labels, shapes):
                position = tuple(
                    as_expr(0) if isinstance(d, int) and d == 1 else at[label] for label, d in zip(term, shape)
                )
                factor = x[position].astype(acc)
                product = factor if product is None else product * factor
            return te.sum(product, axis=list(loops.values())) if loops else product

        return te.compute([as_expr(size[label]) for label in out], body, name="einsum")

    return ctx.cast(ctx.te(build, *args, name="einsum"), dtype)


def _labels(term: str, ellipsis: list[str], rank: int | None) -> list[str]:
    """The index names of one operand; an ellipsis stands for the last of the broadcast dimensions it covers."""
    if "..." not in term:
        return list(term)
    before, _, after = term.partition("...")
    count = len(ellipsis) if rank is None else rank - len(before) - len(after)
    return [*before, *ellipsis[len(ellipsis) - count :], *after]
