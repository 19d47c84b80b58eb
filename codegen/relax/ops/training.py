"""Dropout (which does nothing outside of training) and the optimizers of ``ai.onnx.preview.training``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.ops._kernels import elementwise
from qcompile.codegen.relax.ops.shape import full
from qcompile.codegen.relax.registry import converter

_PREVIEW = "ai.onnx.preview.training"


@converter("", "Dropout")
def _dropout(ctx: Context, node: ir.Node, x: relax.Expr, ratio: Any = None, training: Any = None) -> list[Any]:
    """The input, and a mask that keeps everything."""
    if training is not None:
        mode = ctx.constant(node.inputs[2])
        rate = np.array(0.5) if node.inputs[1] is None else ctx.constant(node.inputs[1])
        if mode is None or (mode.reshape(-1)[0] and (rate is None or rate.reshape(-1)[0] != 0)):
            raise ctx.unsupported(node, "training mode draws random numbers; give a constant training_mode of false")
    result: list[Any] = [ctx.known(node.inputs[0])]
    if len(node.outputs) > 1 and node.outputs[1].name:
        dtype = "bool" if ctx.version(node) >= 10 else ctx.storage(x)
        result.append(full(ctx, ctx.shape(x), True if dtype == "bool" else 1, dtype))
    return result


@converter(_PREVIEW, "Momentum")
def _momentum(ctx: Context, node: ir.Node, rate: relax.Expr, step: relax.Expr, *tensors: relax.Expr) -> list[Any]:
    """``v' = alpha v + beta g``, ``x' = x - r v'`` (or, Nesterov, ``x - r (g + alpha v')``); ``beta`` is 1 at step 0."""
    count = len(tensors) // 3
    alpha, beta, decay = attr(node, "alpha"), attr(node, "beta"), attr(node, "norm_coefficient")
    nesterov = attr(node, "mode") == "nesterov"

    def gradient(g: Any, x: Any) -> Any:
        return g + tirx.const(decay, str(g.ty.dtype)) * x

    def velocity(t: Any, x: Any, g: Any, v: Any) -> Any:
        dtype = str(v.ty.dtype)
        weight = tirx.Select(t > tirx.const(0, "int64"), tirx.const(beta, dtype), tirx.const(1, dtype))
        return tirx.const(alpha, dtype) * v + weight * gradient(g, x)

    def position(r: Any, x: Any, g: Any, v: Any) -> Any:
        dtype = str(v.ty.dtype)
        move = gradient(g, x) + tirx.const(alpha, dtype) * v if nesterov else v
        return x - r.astype(dtype) * move

    moved, speeds = [], []
    for x, g, v in zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :]):
        speed = elementwise(ctx, velocity, ctx.reshape(step, []), x, g, v, name="momentum_velocity")
        moved.append(elementwise(ctx, position, ctx.reshape(rate, []), x, g, speed, name="momentum_step"))
        speeds.append(speed)
    return [*moved, *speeds]


@converter(_PREVIEW, "Adagrad")
def _adagrad(ctx: Context, node: ir.Node, rate: relax.Expr, step: relax.Expr, *tensors: relax.Expr) -> list[Any]:
    """``h' = h + g^2``, ``x' = x - r / (1 + t decay) g / (sqrt(h') + epsilon)``."""
    count = len(tensors) // 3
    norm, decay, epsilon = (
        attr(node, "norm_coefficient", 0.0),
        attr(node, "decay_factor", 0.0),
        attr(node, "epsilon", 1e-6),
    )

    def total(x: Any, g: Any, h: Any) -> Any:
        g = g + tirx.const(norm, str(g.ty.dtype)) * x
        return h + g * g

    def position(r: Any, t: Any, x: Any, g: Any, h: Any) -> Any:
        dtype = str(x.ty.dtype)
        rate_now = r.astype(dtype) / (tirx.const(1, dtype) + t.astype(dtype) * tirx.const(decay, dtype))
        g = g + tirx.const(norm, dtype) * x
        return x - rate_now * g / (tirx.sqrt(h) + tirx.const(epsilon, dtype))

    moved, sums = [], []
    for x, g, h in zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :]):
        new = elementwise(ctx, total, x, g, h, name="adagrad_sum")
        scalars = [ctx.reshape(s, []) for s in (rate, step)]
        moved.append(elementwise(ctx, position, *scalars, x, g, new, name="adagrad_step"))
        sums.append(new)
    return [*moved, *sums]


@converter(_PREVIEW, "Adam")
def _adam(ctx: Context, node: ir.Node, rate: relax.Expr, step: relax.Expr, *tensors: relax.Expr) -> list[Any]:
    """Kingma and Ba 2015, with the bias corrections in the rate: ``r sqrt(1 - beta^t) / (1 - alpha^t)`` for ``t > 0``."""
    count = len(tensors) // 4
    alpha, beta = attr(node, "alpha", 0.9), attr(node, "beta", 0.999)
    epsilon, norm = attr(node, "epsilon", 1e-6), attr(node, "norm_coefficient", 0.0)
    post = attr(node, "norm_coefficient_post", 0.0)

    def moment(factor: float, power: int) -> Any:
        def update(x: Any, g: Any, m: Any) -> Any:
            dtype = str(x.ty.dtype)
            g = g + tirx.const(norm, dtype) * x
            return tirx.const(factor, dtype) * m + tirx.const(1 - factor, dtype) * (g * g if power == 2 else g)

        return update

    def position(r: Any, t: Any, x: Any, v: Any, h: Any) -> Any:
        dtype = str(x.ty.dtype)
        one, time = tirx.const(1, dtype), t.astype(dtype)
        corrected = (
            r.astype(dtype)
            * tirx.sqrt(one - tirx.power(tirx.const(beta, dtype), time))
            / (one - tirx.power(tirx.const(alpha, dtype), tirx.max(time, one)))
        )
        rate_now = tirx.Select(t > tirx.const(0, "int64"), corrected, r.astype(dtype))
        moved = x - rate_now * v / (tirx.sqrt(h) + tirx.const(epsilon, dtype))
        return (one - tirx.const(post, dtype)) * moved

    groups = [tensors[i * count : (i + 1) * count] for i in range(4)]
    scalars = [ctx.reshape(s, []) for s in (rate, step)]
    moved, firsts, seconds = [], [], []
    for x, g, v, h in zip(*groups):
        firsts.append(elementwise(ctx, moment(alpha, 1), x, g, v, name="adam_first"))
        seconds.append(elementwise(ctx, moment(beta, 2), x, g, h, name="adam_second"))
        moved.append(elementwise(ctx, position, *scalars, x, firsts[-1], seconds[-1], name="adam_step"))
    return [*moved, *firsts, *seconds]
