"""Where a model holds quantizable weights: linear operators, experts, convolutions and embedding tables, found by structure alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import attribute, constant_shape, is_op, module_path


@dataclass(frozen=True)
class LinearSite:
    """``y = x @ w`` with a constant ``w`` of shape ``(K, N)``.

    Attributes:
        node: the MatMul.
        x: its activation input.
        weight: the initializer.
        name: where it came from in the source model.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        shape = constant_shape(self.weight)
        assert shape is not None
        return shape[0], shape[1]

    def matrix(self) -> np.ndarray:
        """The float weight, loaded now."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy().astype(np.float32, copy=False)


@dataclass(frozen=True)
class ConvSite:
    """``y = Conv(x, w)`` with a constant ``w`` of shape ``(O, C / groups, *kernel)``.

    As a matrix the weight is ``(K, N)`` = (kernel positions x channels of a group, output channels): a convolution without
    groups is this matrix times the unfolded input.

    Attributes:
        node: the Conv.
        x: its activation input ``(batch, channels, *spatial)``.
        weight: the initializer.
        name: where it came from in the source model.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    name: str

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per spatial axis."""
        shape = constant_shape(self.weight)
        assert shape is not None
        return shape[2:]

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        shape = constant_shape(self.weight)
        assert shape is not None
        return math.prod(shape[1:]), shape[0]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(attribute(self.node, "group", 1))  # type: ignore[call-overload]

    def matrix(self) -> np.ndarray:
        """The float weight as ``(K, N)``, kernel positions outermost; loaded now."""
        assert self.weight.const_value is not None
        weight = self.weight.const_value.numpy().astype(np.float32, copy=False)
        return np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-1, -2)).reshape(self.shape))


@dataclass(frozen=True)
class ExpertSite:
    """``y[s] = x[s // repeat] @ w[ids[s]]`` with a constant stack of matrices ``w`` of shape ``(E, K, N)``.

    As a matrix the weight is ``(K, E * N)``: the columns of all experts side by side.

    Attributes:
        node: the MatMul of rows ``(..., 1, K)`` by the matrices that a Gather picks.
        x: its activation, rows of K channels: one for every ``repeat`` of ``ids``.
        ids: which matrix each row is multiplied with, any shape.
        repeat: rows in a row that share an activation.
        weight: the initializer.
        name: where it came from in the source model.
    """

    node: ir.Node
    x: ir.Value
    ids: ir.Value
    repeat: int
    weight: ir.Value
    name: str

    @property
    def experts(self) -> int:
        """E."""
        shape = constant_shape(self.weight)
        assert shape is not None
        return shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, E * N)``."""
        shape = constant_shape(self.weight)
        assert shape is not None
        return shape[1], shape[0] * shape[2]

    def matrix(self) -> np.ndarray:
        """The float weight as ``(K, E * N)``, loaded now."""
        assert self.weight.const_value is not None
        weight = self.weight.const_value.numpy().astype(np.float32, copy=False)
        return np.ascontiguousarray(weight.swapaxes(0, 1)).reshape(self.shape)


Site = LinearSite | ConvSite | ExpertSite
"""A weight that is a matrix to quantize."""


@dataclass(frozen=True)
class EmbeddingSite:
    """``y = table[ids]`` with a constant float table of shape ``(V, D)``."""

    node: ir.Node
    ids: ir.Value
    table: ir.Value
    name: str


_SINGLE = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (*_SINGLE, ir.DataType.DOUBLE)


def _float_initializer(value: ir.Value | None, rank: int, types: tuple[ir.DataType, ...] = _SINGLE) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and value.const_value.dtype in types
        and len(value.const_value.shape) == rank
    )


def linear_sites(model: ir.Model) -> list[LinearSite]:
    """All MatMuls whose second input is a constant float matrix, in graph order."""
    found = []
    for node in model.graph:
        if is_op(node, "MatMul") and _float_initializer(node.inputs[1], 2) and node.inputs[0] is not None:
            weight = node.inputs[1]
            assert weight is not None
            found.append(LinearSite(node, node.inputs[0], weight, site_name(node, weight)))
    return found


def conv_sites(model: ir.Model) -> list[ConvSite]:
    """All convolutions with a constant float weight, in graph order."""
    found = []
    for node in model.graph:
        if not is_op(node, "Conv") or node.inputs[0] is None:
            continue
        weight = node.inputs[1]
        if any(_float_initializer(weight, rank) for rank in (3, 4, 5)):
            assert weight is not None
            found.append(ConvSite(node, node.inputs[0], weight, site_name(node, weight)))
    return found


def expert_sites(model: ir.Model) -> list[ExpertSite]:
    """All products of rows with matrices that indices pick from a constant stack, in graph order."""
    found = []
    for node in model.graph:
        gather = node.inputs[1].producer() if is_op(node, "MatMul") and node.inputs[1] is not None else None
        if not is_op(gather, "Gather") or attribute(gather, "axis", 0) != 0 or node.inputs[0] is None:
            continue
        assert gather is not None
        stack, ids = gather.inputs
        rows, picked = _dims(node.inputs[0]), _dims(node.inputs[1])
        if not _float_initializer(stack, 3) or ids is None or rows is None or picked is None:
            continue
        assert stack is not None
        if len(picked) < 3 or rows != (*picked[:-2], 1, picked[-2]):
            continue
        x, repeat = _one_per_token(node.inputs[0])
        name = site_name(node, stack)
        inside = (stack.name or "").startswith(f"{name}.")
        found.append(ExpertSite(node, x, ids, repeat, stack, stack.name or "" if inside else f"{name}.{stack.name}"))
    return found


# What stands between the scores of a router and the indices: choices, masks and shapes of scores, no further layers.
_CHOOSING = ("TopK", "Softmax", "Sigmoid", "LogSoftmax", "Tanh", "Add", "Sub", "Mul", "Div", "Clip", "Cast", "Reshape", "Flatten",
             "Transpose", "Squeeze", "Unsqueeze", "Expand", "Concat", "Slice", "Split", "Gather", "GatherElements", "GatherND",
             "ScatterElements", "ScatterND", "Where", "Not", "ReduceMax", "ReduceSum", "ArgMax")  # fmt: skip


def router_sites(model: ir.Model) -> list[LinearSite]:
    """Linear operators whose outputs choose the experts of a row: rounded, they would choose others."""
    linear = {site.node: site for site in linear_sites(model)}
    found: list[LinearSite] = []
    todo, seen = [site.ids for site in expert_sites(model)], set()
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in linear:
            found.append(linear[node])
        elif is_op(node, *_CHOOSING):
            todo += [value for value in node.inputs if value is not None]
    return found


def _one_per_token(rows: ir.Value) -> tuple[ir.Value, int]:
    """What rows ``(..., 1, K)`` are repetitions of, and how often each row follows itself."""
    repeat, width = 1, _last(rows)
    while (node := rows.producer()) is not None and node.inputs and (source := node.inputs[0]) is not None:
        before, after = _dims(source), _dims(rows)
        if before is None or after is None or _last(source) != width:
            break
        if is_op(node, "Expand") and len(before) == len(after) and before[-2] == 1 and before[:-2] == after[:-2]:
            if not isinstance(after[-2], int) or repeat != 1:
                break
            repeat = after[-2]
        elif not is_op(node, "Reshape", "Unsqueeze", "Squeeze"):
            break
        rows = source
    return rows, repeat


def _last(value: ir.Value) -> int | None:
    dims = _dims(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else None


def _dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    return (
        None
        if value is None or value.shape is None
        else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    )


def matrix_sites(model: ir.Model) -> list[Site]:
    """Everything whose weight is a matrix to quantize: linear sites, experts, then convolutions."""
    return [*linear_sites(model), *expert_sites(model), *conv_sites(model)]


def embedding_sites(model: ir.Model) -> list[EmbeddingSite]:
    """All row gathers from a constant float table, in graph order."""
    found = []
    for node in model.graph:
        if is_op(node, "Gather") and attribute(node, "axis", 0) == 0 and _float_initializer(node.inputs[0], 2):
            table, ids = node.inputs
            assert table is not None and ids is not None
            found.append(EmbeddingSite(node, ids, table, site_name(node, table)))
    return found


_TRAINED = ("ConvTranspose", "DeformConv", "LSTM", "GRU", "RNN")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum", "Gather", "GatherND")
_MIN_FLOAT = 1024  # a product with a smaller constant is arithmetic (a rotation, a table of masks), no layer


def other_weights(model: ir.Model) -> list[tuple[ir.Node, ir.Value]]:
    """Float weights that are no site, with the node that reads them: float64, in branches and loops, transposed convolutions ..."""
    sites = {site.weight for site in matrix_sites(model)} | {site.table for site in embedding_sites(model)}
    found: dict[ir.Value, ir.Node] = {}
    for node in model.graph.all_nodes():
        if not is_op(node, *_TRAINED, *_PRODUCTS):
            continue
        least = 2 if node.op_type in _TRAINED else _MIN_FLOAT
        for value in node.inputs[:1] if node.op_type.startswith("Gather") else node.inputs:
            shape = constant_shape(value) if value is not None else None
            if value is None or value in sites or shape is None or not _float_initializer(value, len(shape), _FLOATS):
                continue
            if math.prod(shape) >= least and sum(d > 1 for d in shape) > 1:
                found.setdefault(value, node)
    return [(node, value) for value, node in found.items()]


def site_name(node: ir.Node, weight: ir.Value) -> str:
    """A name a person recognises: the weight's own if the exporter kept it, else the module path or node name."""
    path = module_path(node)
    if path.startswith("["):
        # torch.onnx writes the chain of scopes as a list: the last one that is not the node itself is the module.
        parts = [p.strip(" '\"[]") for p in path.split(",")]
        inner = [p for p in parts if p]
        return inner[-2] if len(inner) > 1 else inner[-1]
    return path or weight.name or "unnamed"
