"""The fused tail of a GEMM tile: scales, bias, activation, residual, and the codes of a static quantizer.

y = tile * scale[n] * activation_scale[m] + bias[n];  out = activation(y) + residual
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu import vmath

MAGIC = 1.5 * 2.0**23
"""Its bits are 0x4B400000; see `quantized`."""

TAIL_VECTORS = 2
"""Registers the tail of a tile handles together: constants of polynomials are loaded once for all of them."""


def tail_params(problem: LinearProblem, padded: int) -> list[v.Param]:
    """The last parameters of a PrimFunc, those `finish` reads: scales of ``padded`` columns, epilogue, output."""
    params = [v.Param("scale", (padded,))]
    if problem.epilogue.bias:
        params.append(v.Param("bias", (problem.n,)))
    if problem.epilogue.residual:
        params.append(v.Param("residual", ("m", problem.n)))
    if problem.epilogue.codes:
        params.append(v.Param("limits", (3,)))
    return [*params, v.Param("out", ("m", problem.n), "uint8" if problem.epilogue.codes else "float32", output=True)]


def finish(
    problem: LinearProblem,
    names: dict[str, Any],
    tile: Any,
    panels: Any,
    lanes: int,
    panel: Any,
    first: Any,
    rows: Any,
    begin: Any = 0,
) -> None:
    """Emit scale, bias, activation, residual and store of a tile; of the last panel only the columns that exist.

    Args:
        problem, names: the operator and the parameters of its PrimFunc; where each row goes, if ``out_row`` is among them.
        tile: ``(>= rows, width)``, int32 or float32.
        panels: geometry: ``width`` and ``count``.
        lanes: of a float32 register.
        panel, first, rows: which panel; the tile's first row in the output, and how many it has.
        begin: the panel's first column in the tile.
    """

    def columns(count: int) -> None:
        _finish(problem, names, tile, lanes, v.let(panel * panels.width), first, rows, count, begin)

    tail = problem.n % panels.width
    if not tail:
        columns(panels.width)
    elif panels.count == 1:
        columns(tail)
    else:
        with T.If(panel == panels.count - 1):
            with T.Then():
                columns(tail)
            with T.Else():
                columns(panels.width)


def _finish(
    problem: LinearProblem,
    names: dict[str, Any],
    tile: Any,
    lanes: int,
    start: Any,
    first: Any,
    rows: Any,
    columns: int,
    begin: Any,
) -> None:
    epilogue = problem.epilogue
    wide = TAIL_VECTORS * lanes
    with T.serial(rows) as row:
        at = v.let(first + row)
        to = v.let(names["out_row"][at]) if "out_row" in names else at
        factor = v.let(names["x_scale"][at]) if problem.activation.bits else None
        for column in range(0, columns, wide):
            here = min(wide, columns - column)
            n = start + column
            value = v.let(v.load(tile, [row, begin + column], here))
            if str(tile.dtype) != "float32":
                value = v.cast(value, "float32", here)
            scale = v.load(names["scale"], [n], here)
            if factor is not None:
                scale = scale * v.splat(factor, here)
            if epilogue.bias:
                value = vmath.fma(value, scale, v.load(names["bias"], [n], here))
            else:
                value = value * scale
            value = vmath.ACTIVATIONS[epilogue.activation](v.let(value))
            if epilogue.residual:
                value = value + v.load(names["residual"], [to, n], here)
            if epilogue.codes:
                value = quantized(v.let(value), names["limits"], here)
            v.store(names["out"], [to, n], value, here)


def quantized(value: Any, limits: Any, lanes: int) -> Any:
    """``clip(round_half_even(value / step), lowest, highest) + 128`` as uint8; ``limits`` holds the three numbers.

    Adding 1.5 * 2^23 leaves the rounded number in the low bits of the mantissa.
    """
    step, lowest, highest = (v.splat(v.let(limits[i]), lanes) for i in range(3))
    within = v.let(T.max(T.min(value / step, highest), lowest))
    bits = v.bits_of(v.add_exactly(within, v.const(MAGIC, lanes), lanes), "int32", lanes)
    return v.cast(bits + v.const(128 - 0x4B400000, lanes, "int32"), "uint8", lanes)
