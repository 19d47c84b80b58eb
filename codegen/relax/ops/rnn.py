"""Recurrent layers: RNN, GRU, LSTM, of any (also dynamic) sequence length.

The products with the input do not depend on the recurrence: one matrix product computes them for all steps, and a loop
kernel adds the recurrent part step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops._kernels import compute_dtype
from qcompile.codegen.relax.ops._loops import grid, load, loop, loops, scalar, scratch, store, when
from qcompile.codegen.relax.ops.shape import transpose
from qcompile.codegen.relax.registry import converter

Activation = Callable[[Any], Any]

#: Gates per cell, and the default activations of one direction.
_CELLS = {
    "RNN": (1, ("Tanh",)),
    "GRU": (3, ("Sigmoid", "Tanh")),
    "LSTM": (4, ("Sigmoid", "Tanh", "Tanh")),
}

#: Default alpha and beta of the activations that have them.
_ALPHA = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "HardSigmoid": 0.2, "Elu": 1.0, "ScaledTanh": 1.0, "Affine": 1.0}
_BETA = {"HardSigmoid": 0.5, "ScaledTanh": 1.0, "Affine": 0.0}


def _activation(ctx: Context, node: ir.Node, name: str, alpha: float, beta: float, acc: str) -> Activation:
    def c(value: float) -> Any:
        return tirx.const(value, acc)

    functions: dict[str, Activation] = {
        "relu": lambda x: tirx.max(x, c(0)),
        "tanh": tirx.tanh,
        "sigmoid": lambda x: c(1) / (c(1) + tirx.exp(-x)),
        "affine": lambda x: c(alpha) * x + c(beta),
        "leakyrelu": lambda x: tirx.Select(x < c(0), c(alpha) * x, x),
        "thresholdedrelu": lambda x: tirx.Select(x >= c(alpha), x, c(0)),
        "scaledtanh": lambda x: c(alpha) * tirx.tanh(c(beta) * x),
        "hardsigmoid": lambda x: tirx.min(tirx.max(c(alpha) * x + c(beta), c(0)), c(1)),
        "elu": lambda x: tirx.Select(x < c(0), c(alpha) * (tirx.exp(x) - c(1)), x),
        "softsign": lambda x: x / (c(1) + tirx.abs(x)),
        "softplus": lambda x: tirx.max(x, c(0)) + tirx.log1p(tirx.exp(-tirx.abs(x))),
    }
    if name.lower() not in functions:
        raise ctx.unsupported(node, f"activation {name!r}")
    return functions[name.lower()]


def _clipped(function: Activation, limit: Any) -> Activation:
    return lambda x: function(tirx.max(tirx.min(x, limit), -limit))


def _activations(ctx: Context, node: ir.Node, directions: int, acc: str) -> list[list[Activation]]:
    """The activation functions of each direction, with clipping of their input."""
    default = _CELLS[node.op_type][1]
    names = attr(node, "activations", None) or list(default) * directions
    alphas: Iterator[float] = iter(attr(node, "activation_alpha", None) or [])
    betas: Iterator[float] = iter(attr(node, "activation_beta", None) or [])
    clip = attr(node, "clip", None)
    canonical = {name.lower(): name for name in (*_ALPHA, *_BETA)}
    made = []
    for name in names:
        known = canonical.get(name.lower(), name)
        alpha = next(alphas, _ALPHA[known]) if known in _ALPHA else 0.0
        beta = next(betas, _BETA[known]) if known in _BETA else 0.0
        function = _activation(ctx, node, name, alpha, beta, acc)
        if clip:
            made.append(_clipped(function, tirx.const(clip, acc)))
        else:
            made.append(function)
    return [made[i * len(default) : (i + 1) * len(default)] for i in range(directions)]


@converter("", "RNN", "GRU", "LSTM")
def _recurrent(
    ctx: Context,
    node: ir.Node,
    x: relax.Expr,
    w: relax.Expr,
    r: relax.Expr,
    bias: relax.Expr | None = None,
    lengths: relax.Expr | None = None,
    h0: relax.Expr | None = None,
    c0: relax.Expr | None = None,
    peephole: relax.Expr | None = None,
) -> list[relax.Expr]:
    dtype = ctx.storage(x)
    acc = compute_dtype(dtype)
    batch_first = attr(node, "layout", 0)
    if batch_first:
        x = transpose(ctx, x, [1, 0, 2])
        h0, c0 = (None if s is None else transpose(ctx, s, [1, 0, 2]) for s in (h0, c0))
    steps, batch, _ = ctx.shape(x)
    directions, _, hidden = ctx.shape(r)
    direction = attr(node, "direction", "forward")
    if not isinstance(directions, int):
        raise ctx.unsupported(node, "the number of directions must be known")
    projected = _project(ctx, x, w, acc)
    activations = _activations(ctx, node, directions, acc)
    optional = {"bias": bias, "lengths": lengths, "h0": h0, "c0": c0, "peephole": peephole}
    present = [name for name, value in optional.items() if value is not None]
    outputs = [([steps, directions, batch, hidden], dtype), ([directions, batch, hidden], dtype)]
    if node.op_type == "LSTM":
        outputs.append(([directions, batch, hidden], dtype))

    def body(xw: Any, rec: Any, *buffers: Any) -> None:
        given = dict(zip(present, buffers))
        results = buffers[len(present) :]
        for d in range(directions):
            cell = _Cell(node, acc, dtype, d, hidden, xw, rec, given, activations[d])
            cell.run(results, steps, batch, reverse=direction == "reverse" or d == 1)

    args = [projected, r, *(optional[name] for name in present)]
    made = loops(ctx, body, args, outputs, name=node.op_type.lower())
    if batch_first:
        made = [transpose(ctx, made[0], [2, 0, 1, 3]), *(transpose(ctx, s, [1, 0, 2]) for s in made[1:])]
    return made


def _project(ctx: Context, x: relax.Expr, w: relax.Expr, acc: str) -> relax.Expr:
    """``x @ W^T`` of every direction: ``(directions, steps, batch, gates * hidden)``."""
    steps, batch, size = ctx.shape(x)
    directions, rows, columns = ctx.shape(w)
    ctx.require_equal(size, columns)

    def build(t: te.Tensor, weight: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((as_expr(0), as_expr(columns)), name="k")
        return te.compute(
            [as_expr(n) for n in (directions, steps, batch, rows)],
            lambda d, s, b, g: te.sum(t(s, b, k).astype(acc) * weight(d, g, k).astype(acc), axis=k),
            name="projected",
        )

    return ctx.te(build, x, w, name="rnn_projection")


class _Cell:
    """Builds the recurrence of one direction inside a loop kernel."""

    def __init__(
        self,
        node: ir.Node,
        acc: str,
        dtype: str,
        d: int,
        hidden: Any,
        xw: Any,
        rec: Any,
        given: dict[str, Any],
        activations: list[Activation],
    ) -> None:
        self.kind = node.op_type
        self.node, self.acc, self.dtype, self.d, self.hidden = node, acc, dtype, d, hidden
        self.xw, self.rec, self.given, self.activations = xw, rec, given, activations
        self.gates = _CELLS[self.kind][0]
        self.sum = scalar(acc)
        self.pre = scratch([self.gates, hidden], acc)

    def bias(self, gate: int, j: Any, *, recurrent: bool) -> Any:
        """One element of the input or recurrent bias."""
        if "bias" not in self.given:
            return tirx.const(0, self.acc)
        row = (self.gates if recurrent else 0) + gate
        return load(self.given["bias"], [self.d, as_expr(row) * as_expr(self.hidden) + j]).astype(self.acc)

    def peephole(self, gate: int, j: Any, cell: Any) -> Any:
        """The peephole's contribution to a gate of an LSTM."""
        if "peephole" not in self.given:
            return tirx.const(0, self.acc)
        at = as_expr(gate) * as_expr(self.hidden) + j
        return load(self.given["peephole"], [self.d, at]).astype(self.acc) * cell

    def product(self, gate: int, j: Any, vector: Callable[[Any], Any]) -> Any:
        """Leaves ``sum over k of vector(k) * R[gate, j, k]`` in the local sum and returns a read of it."""
        store(self.sum, [0], tirx.const(0, self.acc))
        with loop(0, self.hidden) as k:
            weight = load(self.rec, [self.d, as_expr(gate) * as_expr(self.hidden) + j, k]).astype(self.acc)
            store(self.sum, [0], load(self.sum, [0]) + vector(k) * weight)
        return load(self.sum, [0])

    def run(self, results: Any, steps: Any, batch: Any, *, reverse: bool) -> None:
        """All steps of all samples."""
        y, y_h = results[0], results[1]
        h = scratch([batch, self.hidden], self.acc)
        c = scratch([batch, self.hidden], self.acc) if self.kind == "LSTM" else None
        zero = tirx.const(0, self.acc)
        for state, name in ((h, "h0"), (c, "c0")):
            if state is None:
                continue
            with grid(batch, self.hidden) as (b, j):
                start = load(self.given[name], [self.d, b, j]).astype(self.acc) if name in self.given else zero
                store(state, [b, j], start)
        with grid(steps, batch) as (s, b):
            if "lengths" in self.given:
                length = tirx.min(load(self.given["lengths"], [b]).astype("int64"), as_expr(steps))
                with loop(0, self.hidden) as j, when(s >= length):
                    store(y, [s, self.d, b, j], zero.astype(self.dtype))
                with when(s < length):
                    self.step(y, h, c, length - 1 - s if reverse else s, b)
            else:
                self.step(y, h, c, as_expr(steps) - 1 - s if reverse else s, b)
        with grid(batch, self.hidden) as (b, j):
            store(y_h, [self.d, b, j], load(h, [b, j]).astype(self.dtype))
            if c is not None:
                store(results[2], [self.d, b, j], load(c, [b, j]).astype(self.dtype))

    def step(self, y: Any, h: Any, c: Any, t: Any, b: Any) -> None:
        """One step of one sample."""
        {"RNN": self.rnn, "GRU": self.gru, "LSTM": self.lstm}[self.kind](h, c, t, b)
        with loop(0, self.hidden) as j:
            store(y, [t, self.d, b, j], load(h, [b, j]).astype(self.dtype))

    def input(self, gate: int, t: Any, b: Any, j: Any) -> Any:
        """The input's part of a gate."""
        return load(self.xw, [self.d, t, b, as_expr(gate) * as_expr(self.hidden) + j]) + self.bias(
            gate, j, recurrent=False
        )

    def linear(self, gate: int, h: Any, t: Any, b: Any) -> None:
        """Fills the gate's row of ``pre`` with input, recurrent and bias terms."""
        with loop(0, self.hidden) as j:
            total = self.product(gate, j, lambda k: load(h, [b, k]))
            store(self.pre, [gate, j], self.input(gate, t, b, j) + total + self.bias(gate, j, recurrent=True))

    def rnn(self, h: Any, c: Any, t: Any, b: Any) -> None:
        self.linear(0, h, t, b)
        with loop(0, self.hidden) as j:
            store(h, [b, j], self.activations[0](load(self.pre, [0, j])))

    def gru(self, h: Any, c: Any, t: Any, b: Any) -> None:
        f, g = self.activations
        for gate in (0, 1):
            self.linear(gate, h, t, b)
            with loop(0, self.hidden) as j:
                store(self.pre, [gate, j], f(load(self.pre, [gate, j])))
        before = attr(self.node, "linear_before_reset", 0)
        with loop(0, self.hidden) as j:
            if before:
                total = self.product(2, j, lambda k: load(h, [b, k])) + self.bias(2, j, recurrent=True)
                total = load(self.pre, [1, j]) * total
            else:
                total = self.product(2, j, lambda k: load(self.pre, [1, k]) * load(h, [b, k]))
                total = total + self.bias(2, j, recurrent=True)
            store(self.pre, [2, j], g(self.input(2, t, b, j) + total))
        with loop(0, self.hidden) as j:
            z = load(self.pre, [0, j])
            store(h, [b, j], (tirx.const(1, self.acc) - z) * load(self.pre, [2, j]) + z * load(h, [b, j]))

    def lstm(self, h: Any, c: Any, t: Any, b: Any) -> None:
        f, g, last = self.activations
        for gate in range(4):
            self.linear(gate, h, t, b)
        coupled = attr(self.node, "input_forget", 0)
        with loop(0, self.hidden) as j:
            old = load(c, [b, j])
            i = f(load(self.pre, [0, j]) + self.peephole(0, j, old))
            if coupled:
                forget = tirx.const(1, self.acc) - i
            else:
                forget = f(load(self.pre, [2, j]) + self.peephole(2, j, old))
            store(c, [b, j], forget * old + i * g(load(self.pre, [3, j])))
            out = f(load(self.pre, [1, j]) + self.peephole(1, j, load(c, [b, j])))
            store(h, [b, j], out * last(load(c, [b, j])))
