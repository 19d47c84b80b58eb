"""The converter of `qcompile.kernel` `Experts`: products with matrices that are picked at run time, see `kernels.cpu.experts`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from qcompile.codegen.kernels import CPUS
from qcompile.codegen.kernels.base import LinearKernel, LinearProblem, Support
from qcompile.codegen.kernels.cpu.experts import ExpertFamily, ExpertProduct, SortSlots
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.kernels import (
    DOMAIN,
    LinearRecord,
    call,
    calls,
    quantized_operand,
    row_scale,
    rows,
    selected,
    shaped,
)
from qcompile.codegen.relax.registry import converter
from qcompile.formats import parse_activation, parse_format, separated


@dataclass
class SortedSlots:
    """Slots in order of their experts, by the ids and the number of experts."""

    known: dict[Any, list[Any]] = field(default_factory=dict)


@converter(DOMAIN, "Experts", kinds=CPUS)
def experts(ctx: Context, node: ir.Node, x: Any, scale: Any, *operands: Any) -> relax.Expr:
    """Sort the slots, then one product for each expert that any slot wants."""
    ids = operands[3]
    k, n, count, repeat = (attr(node, name) for name in ("k", "n", "experts", "repeat"))
    activation = parse_activation(attr(node, "activation_format"))
    fmt = parse_format(attr(node, "weight_format"))
    problem = LinearProblem(k, n, fmt, activation, threads=ctx.target.cores)
    choice = selected(ctx, node, problem, _takes_experts)
    product = ExpertProduct(choice.family, problem, choice.config, count, repeat)  # type: ignore[arg-type]
    record = LinearRecord(
        attr(node, "sites"), attr(node, "weights"), (n,), problem, choice.family, choice.config, choice.reason,
        choice.refused, experts=count,
    )  # fmt: skip
    weight = quantized_operand(ctx, node, fmt, _matrices)
    packed = record.store(ctx, node.inputs[2].name, product.pack(separated(weight, count)))
    calls(ctx).linears.append(record)

    lead = list(ctx.shape(ids))
    slots = ctx.dims.product(lead)
    tokens = [rows(ctx, x)]
    if activation.bits:
        tokens.append(row_scale(ctx, scale, ctx.shape(tokens[0])[0]))
    outputs = [([slots, n], "float32"), *(([slots, *shape], dtype) for shape, dtype in product.scratch)]
    made = call(
        ctx,
        ("experts", choice.family.name, problem, repr(choice.config), count, repeat),
        lambda: product.build(ctx.target, choice.family.name),
        f"experts_{count}x{n}x{k}",
        [*tokens, *_sorted(ctx, ids, slots, count), *packed],
        outputs,
    )
    return shaped(ctx, made[0], lead, n)


def _sorted(ctx: Context, ids: relax.Expr, slots: Any, count: int) -> list[Any]:
    """``order`` and ``start``, computed once for all products with the same ids."""
    known = ctx.state.setdefault(SortedSlots, SortedSlots()).known
    if (ids, count) not in known:
        kernel = SortSlots(count, ctx.storage(ids))
        flat = ctx.reshape(ids, [slots])
        outputs = [([slots], "int32"), ([count + 1], "int32")]
        known[ids, count] = call(ctx, kernel, kernel.build, f"sort_{count}", [flat], outputs)
    return known[ids, count]


def _matrices(array: np.ndarray) -> np.ndarray:
    """``(..., experts, N)`` as ``(..., experts * N)``; what has one axis is the same for all experts."""
    return array.reshape(*array.shape[:-2], -1) if array.ndim > 1 else array


def _takes_experts(family: LinearKernel) -> Support:
    if isinstance(family, ExpertFamily):
        return Support(True)
    return Support(False, f"{family.name} cannot begin anywhere in its operands, as experts ask for")
