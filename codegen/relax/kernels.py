"""Converters of the operators in ``qcompile.kernel``: which kernel computes each, and with what.

Tensors between kernels are matrices ``(rows, channels)``; the view with the model's leading axes exists only where an
operator outside this file reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.kernels import CPUS, Choice, select
from qcompile.codegen.kernels.base import Epilogue, LinearKernel, LinearProblem, Support
from qcompile.codegen.kernels.cpu.append import Append
from qcompile.codegen.kernels.cpu.attention import Attention
from qcompile.codegen.kernels.cpu.embedding import Embedding, Table
from qcompile.codegen.kernels.cpu.rope import Rope
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import OPAQUE_PATTERN, Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.registry import converter
from qcompile.codegen.tune.database import database_for
from qcompile.errors import TargetError
from qcompile.formats import DualInt4, Format, NvFp4, Quantized, SuperBlock, parse_activation, parse_format

DOMAIN = "qcompile.kernel"


@dataclass
class LinearRecord:
    """One use of a linear kernel.

    Attributes:
        sites: names of the merged sites.
        weights: names of their code initializers.
        parts: their widths along N.
        problem, family, config, reason, refused: what was chosen and why.
        packed: name of every packed array in the program's parameters, by the packer's own name.
        experts: number of matrices that are stacked in the packed arrays; 0 for one that is not.
    """

    sites: tuple[str, ...]
    weights: tuple[str, ...]
    parts: tuple[int, ...]
    problem: LinearProblem
    family: LinearKernel
    config: dict[str, Any]
    reason: str
    refused: dict[str, str]
    packed: dict[str, str] = field(default_factory=dict)
    experts: int = 0

    def store(self, ctx: Context, prefix: str | None, arrays: dict[str, np.ndarray]) -> list[Any]:
        """Make packed arrays parameters of the program; returns them."""
        variables = []
        for part, array in arrays.items():
            variable = ctx.param(f"{prefix}.{part}", array)
            position = next(i for i, v in enumerate(ctx.param_vars) if v.same_as(variable))
            self.packed[part] = list(ctx.params)[position]
            variables.append(variable)
        return variables


@dataclass
class KernelCalls:
    """What this file keeps during one conversion.

    Attributes:
        linears: one record per linear kernel.
        uses: calls of the other kernels.
        refusals: what was left to general code: (what, where, reason).
        matrices: the matrix behind a view with leading axes.
    """

    linears: list[LinearRecord] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[str, str, str]] = field(default_factory=list)
    matrices: dict[Any, Any] = field(default_factory=dict)


def calls(ctx: Context) -> KernelCalls:
    """The state of ``ctx``."""
    return ctx.state.setdefault(KernelCalls, KernelCalls())


def call(
    ctx: Context,
    key: Any,
    build: Callable[[], Any],
    name: str,
    tensors: list[Any],
    outputs: list[tuple[list[Any], str]],
) -> list[Any]:
    """Call the PrimFunc that ``build`` makes, built once per ``key``."""
    function = ctx.once(key, lambda: ctx.bb.add_func(build().without_attr("global_symbol"), name))
    types = [relax.TensorType([as_expr(d) for d in shape], dtype) for shape, dtype in outputs]
    made = ctx.bb.emit(relax.call_tir(function, tensors, types[0] if len(types) == 1 else types))
    if len(types) == 1:
        return [made]
    return [ctx.bb.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]


def rows(ctx: Context, expr: relax.Expr) -> relax.Expr:
    """``expr`` as a matrix: all leading axes flattened. The matrix a kernel wrote is taken as it is."""
    known = calls(ctx).matrices.get(expr)
    if known is not None:
        return known
    shape = ctx.shape(expr)
    flat = ctx.reshape(expr, [ctx.dims.product(shape[:-1]), shape[-1]])
    calls(ctx).matrices[expr] = flat
    return flat


def shaped(ctx: Context, matrix: relax.Expr, lead: list[Any], width: Any) -> relax.Expr:
    """A matrix a kernel wrote, with the model's leading axes; remembers where it came from."""
    view = ctx.reshape(matrix, [*lead, width])
    calls(ctx).matrices[view] = matrix
    return view


@converter(DOMAIN, "Linear")
def linear(ctx: Context, node: ir.Node, x: Any, scale: Any, *operands: Any) -> relax.Expr:
    """Pack the weight for the chosen kernel and call it."""
    bias, residual = (*operands, *[None] * 5)[3:5]
    lead = ctx.shape(x)[:-1]
    m = ctx.dims.product(lead)
    steps = None if scale is None else row_scale(ctx, scale, m)
    out = product(ctx, node, rows(ctx, x), steps, bias, None if residual is None else rows(ctx, residual))
    return shaped(ctx, out, lead, attr(node, "n"))


def product(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    scale: relax.Expr | None,
    bias: Any = None,
    residual: Any = None,
    limits: Any = None,
) -> relax.Expr:
    """Rows ``(M, K)`` times the quantized weight in inputs 2 to 4 of ``node``, by the kernel chosen for it: ``(M, N)``.

    Args:
        ctx: the conversion.
        node: a `Linear`, or another operator with its attributes and weight.
        x: codes as uint8, or float rows if the activation is not quantized.
        scale: ``(M,)`` of the codes.
        bias: N values.
        residual: ``(M, N)``.
        limits: step, lowest and highest code, if codes are to be stored instead of floats.
    """
    k, n = attr(node, "k"), attr(node, "n")
    weight_format = parse_format(attr(node, "weight_format"))
    activation = parse_activation(attr(node, "activation_format"))
    epilogue = Epilogue(bias is not None, attr(node, "epilogue"), residual is not None, limits is not None)
    problem = LinearProblem(k, n, weight_format, activation, epilogue, threads=ctx.target.cores)
    choice = selected(ctx, node, problem)
    name = node.inputs[2].name
    record = LinearRecord(
        attr(node, "sites"),
        attr(node, "weights"),
        attr(node, "parts"),
        problem,
        choice.family,
        choice.config,
        choice.reason,
        choice.refused,
    )
    stored = tuple(id(node if v is None else v.const_value or node) for v in node.inputs[2:4])
    arrays = ctx.once(
        ("packed", stored, problem, choice.family.name, repr(choice.config)),
        lambda: choice.family.pack(problem, choice.config, quantized_operand(ctx, node, weight_format)),
    )
    packed = record.store(ctx, name, arrays)
    calls(ctx).linears.append(record)
    tensors = [x, *([scale] if activation.bits else []), *packed]
    if bias is not None:
        tensors.append(ctx.reshape(bias, [n]))
    if residual is not None:
        tensors.append(residual)
    if limits is not None:
        tensors.append(limits)
    (out,) = call(
        ctx,
        ("linear", choice.family.name, problem, repr(choice.config)),
        lambda: choice.family.build(problem, choice.config, ctx.target, choice.family.name),
        f"linear_{n}x{k}",
        tensors,
        [([ctx.shape(x)[0], n], "float32" if limits is None else "uint8")],
    )
    return out


def selected(ctx: Context, node: ir.Node, problem: LinearProblem, *accept: Callable[[LinearKernel], Support]) -> Choice:
    """The kernel of ``node``.

    Raises:
        TargetError: no family takes it; the message names its sites.
    """
    try:
        return select(problem, ctx.target, database_for(ctx.target), *accept)
    except TargetError as error:
        raise TargetError(f"{', '.join(attr(node, 'sites'))}: {error}") from None


def quantized_operand(
    ctx: Context, node: ir.Node, fmt: Format, view: Callable[[np.ndarray], np.ndarray] = lambda array: array
) -> Quantized:
    """The weight of a `Linear`, `Experts` or `Conv`: inputs 2 to 4, and those from 7 on that the attribute `weight_aux` names.

    ``view`` makes matrices of arrays of another shape.
    """

    def known(value: ir.Value | None) -> np.ndarray:
        assert value is not None
        return view(ctx.constant(value))

    codes, scale = known(node.inputs[2]), known(node.inputs[3])
    zero = known(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    aux = {name: known(value) for name, value in zip(attr(node, "weight_aux", ()), node.inputs[7:])}
    steps = np.atleast_2d(scale).astype(np.float32)
    signed = codes.dtype.name.startswith("int")
    narrow = codes.astype(np.int16).astype(np.int8 if signed else np.uint8)
    if isinstance(fmt, SuperBlock):
        return fmt.assemble(narrow, {"block_scale": steps, **aux})
    if isinstance(fmt, NvFp4):
        steps = steps * aux["tensor_scale"]
    if isinstance(fmt, DualInt4):
        aux["group_scale"] = aux["group_scale"].astype(np.uint8)
    return Quantized(narrow, steps, None if zero is None else np.atleast_2d(zero).astype(np.uint8), aux)


def row_scale(ctx: Context, scale: relax.Expr, m: Any) -> relax.Expr:
    """Scales as a vector over rows; a static per-tensor scale is repeated."""
    known = calls(ctx).matrices.get(scale)
    if known is not None:
        return known
    if ctx.rank(scale) == 0:
        return ctx.emit(relax.op.broadcast_to(ctx.reshape(scale, [1]), relax.ShapeExpr([m])))
    return ctx.reshape(scale, [m])


def convert_rowwise(
    ctx: Context,
    node: ir.Node,
    x: Any,
    vectors: tuple[Any, Any, Any],
    types: tuple[str, str],
    run: Callable[[dict[str, Any], bool, list[Any], list[tuple[list[Any], str]]], list[Any]],
    factor: Any = None,
    mixing: tuple[Any, ...] = (),
    sizes: tuple[int, int] | None = None,
) -> list[Any]:
    """The three results of a `Rowwise` node, None where nobody reads them.

    Args:
        ctx: the conversion.
        node: norm, activation or gated product, with the activation quantizer fused.
        x: its rows.
        vectors: gamma, beta and the static scale, None where there is none.
        types: of the float result and of the codes.
        run: calls a kernel; takes the options kernels of all targets share, whether the float result is wanted,
            operands, and shapes and types of the results.
        factor: of each channel, before the quantizer, for targets whose kernels have the option `factor`.
        mixing: two matrices whose Kronecker product mixes channels there, for targets with the option `kronecker`; or what their
            kernels take instead, then with `sizes`, rows of the matrices.
    """
    gamma, beta, static = vectors
    producer = attr(node, "producer")
    shape = ctx.shape(x)
    gated = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
    norm = {"layernorm": "layer", "rmsnorm": "rms"}.get(producer, "")
    width = int(shape[-1]) // (2 if producer in gated else 1)
    wanted = [bool(v.uses()) or v.is_graph_output() for v in node.outputs]
    quantize = wanted[1] or wanted[2]
    static = ctx.reshape(static, [1]) if static is not None and quantize else None
    options = {
        "width": width,
        "norm": norm,
        "gamma": gamma is not None,
        "beta": beta is not None,
        "epsilon": attr(node, "epsilon", 1e-5),
        "activation": gated.get(producer, producer if not norm and producer != "identity" else ""),
        "gated": producer in gated,
        "quantize": ("token" if static is None else "tensor") if quantize else "",
        "bits": attr(node, "bits", 8),
        "clip": attr(node, "clip", 1.0) if quantize else 1.0,
        "hadamard": attr(node, "hadamard", 0) if quantize else 0,
    }
    if factor is not None:
        options["factor"] = True
    if mixing:
        options["kronecker"] = sizes or tuple(int(ctx.shape(m)[0]) for m in mixing)
    lead = shape[:-1]
    m = ctx.dims.product(lead)
    outputs = [([m, width], types[0])] if wanted[0] else []
    if quantize:
        outputs += [([m, width], types[1]), ([m], "float32")]
    made = run(
        options,
        wanted[0],
        [rows(ctx, x), *(v for v in (gamma, beta, factor, *mixing, static) if v is not None)],
        outputs,
    )
    calls(ctx).uses[f"row-wise {producer}" + (", Kronecker" if mixing else "")] += 1
    y = shaped(ctx, made.pop(0), lead, width) if wanted[0] else None
    if not quantize:
        return [y, None, None]
    codes, scale = made
    view = ctx.reshape(scale, [*lead, 1])
    calls(ctx).matrices[view] = scale
    return [y, shaped(ctx, codes, lead, width), view]


@converter(DOMAIN, "Rowwise")
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
    """Norm, activation or gated product, with the activation quantizer fused."""

    def run(options: dict[str, Any], floats: bool, operands: list[Any], outputs: list[Any]) -> list[Any]:
        kernel = Rowwise(**options, f32_output=floats)
        name = f"{attr(node, 'producer')}_{kernel.width}"
        return call(ctx, kernel, lambda: kernel.build(ctx.target), name, operands, outputs)

    return convert_rowwise(ctx, node, x, (gamma, beta, static), ("float32", "uint8"), run, factor, mixing)


@converter(DOMAIN, "Append")
def append(ctx: Context, node: ir.Node, cache: Any, new: Any, total: Any) -> relax.Expr:
    """The cache itself, with what is new in it."""
    _, heads, _, width = ctx.shape(cache)
    kernel = Append(heads, width, ctx.rank(total), attr(node, "axis"), ctx.storage(total))

    def build() -> Any:
        function = kernel.build(ctx.target).without_attr("global_symbol").with_attr("op_pattern", OPAQUE_PATTERN)
        return ctx.bb.add_func(function, f"append_{heads}x{width}")

    calls(ctx).uses["append"] += 1
    return ctx.bb.emit(relax.op.call_tir_inplace(ctx.once(kernel, build), [cache, new, total], 0, cache.ty))


@converter(DOMAIN, "Attention")
def attention(ctx: Context, node: ir.Node, *operands: Any) -> relax.Expr:
    """Softmax attention over rows of projections."""
    layout = attr(node, "layout")
    count = 1 if layout == "merged" else 3
    tensors, mask = list(operands[:count]), (*operands, None)[count]
    shape = ctx.shape(tensors[0])
    batch, length = shape[0], shape[2 if layout in ("heads", "cache") else 1]
    heads, kv_heads, head_dim = attr(node, "heads"), attr(node, "kv_heads"), attr(node, "head_dim")
    kind, axes = "", (True, False, False)
    if mask is not None:
        shape = ctx.shape(mask)
        mask = ctx.reshape(mask, [1] * (4 - len(shape)) + list(shape))
        kind = "bool" if ctx.storage(mask) == "bool" else "float"
        first, second, third = (not ctx.dims.equal(d, 1) for d in ctx.shape(mask)[:3])
        axes = (first, second, third)
        tensors.append(mask)
    kernel = Attention(
        heads,
        head_dim,
        kv_heads,
        attr(node, "value_dim"),
        scale=attr(node, "scale"),
        layout=layout,
        mask=kind,
        mask_axes=axes,
        causal="upper_left" if attr(node, "is_causal") else "",
    )
    outputs = [([batch, length, heads * attr(node, "value_dim")], "float32")]
    (out,) = call(ctx, kernel, lambda: kernel.build(ctx.target), f"attention_{heads}x{head_dim}", tensors, outputs)
    calls(ctx).uses["attention"] += 1
    return out


@converter(DOMAIN, "Embedding", kinds=CPUS, priority=1)
def embedding_kernel(ctx: Context, node: ir.Node, codes: Any, scale: Any, ids: Any) -> relax.Expr:
    """The same as `embedding`, by the kernel all processors share."""
    size, width = (int(d) for d in ctx.shape(codes))
    kernel = Embedding(width, tables=(Table(size),), ids_dtype=ctx.storage(ids))
    lead = ctx.shape(ids)
    m = ctx.dims.product(lead)
    operands = [codes, scale, ctx.reshape(ids, [m])]
    (out,) = call(
        ctx, kernel, lambda: kernel.build(ctx.target), f"embedding_{width}", operands, [([m, width], "float32")]
    )
    calls(ctx).uses["embedding"] += 1
    return shaped(ctx, out, list(lead), width)


@converter(DOMAIN, "Embedding")
def embedding(ctx: Context, node: ir.Node, codes: Any, scale: Any, ids: Any) -> relax.Expr:
    """Rows of an int8 table times their scales; a negative id counts from the end, as in ONNX Gather."""
    shape, (size, width) = ctx.shape(ids), ctx.shape(codes)

    def rows_of(table: te.Tensor, steps: te.Tensor, index: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            raw = index[at[:-1]].astype("int64")
            row = tirx.Select(raw < 0, raw + size, raw)
            return table[row, at[-1]].astype("float32") * steps[row, 0]

        return te.compute([*(as_expr(d) for d in shape), width], element, name="embedding")

    calls(ctx).uses["embedding"] += 1
    return ctx.te(rows_of, codes, scale, ids, name="embedding")


@converter(DOMAIN, "Rope", kinds=CPUS, priority=1)
def rope_kernel(ctx: Context, node: ir.Node, x: Any, cos: Any, sin: Any) -> relax.Expr:
    """The same as `rope`, by the kernel all processors share."""
    shape = ctx.shape(x)
    kernel = Rope(
        int(shape[-1]),
        attr(node, "heads"),
        attr(node, "head_dim"),
        attr(node, "rotary"),
        interleaved=bool(attr(node, "interleaved")),
        shared=ctx.dims.equal(ctx.shape(cos)[0], 1),
    )
    name = f"rope_{kernel.heads}x{kernel.head_dim}"
    (out,) = call(ctx, kernel, lambda: kernel.build(ctx.target), name, [x, cos, sin], [(list(shape), "float32")])
    calls(ctx).uses["rope"] += 1
    return out


@converter(DOMAIN, "Rope")
def rope(ctx: Context, node: ir.Node, x: Any, cos: Any, sin: Any) -> relax.Expr:
    """Rotate the leading heads of every row; what follows them is copied."""
    heads, head_dim, rotary = attr(node, "heads"), attr(node, "head_dim"), attr(node, "rotary")
    interleaved = bool(attr(node, "interleaved"))
    half = rotary // 2
    one_batch = ctx.dims.equal(ctx.shape(cos)[0], 1)

    def rotated(x: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        def element(b: Any, s: Any, c: Any) -> Any:
            d = tirx.indexmod(c, head_dim)
            pair = tirx.indexdiv(d, 2) if interleaved else tirx.indexmod(d, half)
            first = tirx.indexmod(d, 2) == 0 if interleaved else d < half
            row = 0 if one_batch else b
            p = tirx.min(pair, half - 1)
            other = c + (1 if interleaved else half) * tirx.Select(first, 1, -1)
            inside = tirx.all(c < heads * head_dim, d < rotary)
            sign = tirx.Select(first, tirx.const(-1.0, "float32"), tirx.const(1.0, "float32"))
            turned = x[b, s, c] * cos[row, s, p] + sign * x[b, s, tirx.Select(inside, other, c)] * sin[row, s, p]
            return tirx.Select(inside, turned, x[b, s, c])

        return te.compute(x.shape, element, name="rope")

    calls(ctx).uses["rope"] += 1
    return ctx.te(rotated, x, cos, sin, name="rope")
