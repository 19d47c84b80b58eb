"""Channel disassembly and assembly: an outlier channel becomes several smaller ones, alike channels become one.

    split   x_j w_j = sum over T copies of (x_j / T) w_j,   T = ceil(max|x_j| / threshold)            exact
    merge   x_i w_i + x_j w_j  ->  (x_i + x_j) / 2 (w_i + w_j),  short of it by (x_i - x_j)(w_i - w_j) / 2

The element is no square matrix: x' = E x has more channels, and weights that read x take a left inverse of E. It folds
where nothing but linear operators and functions of single channels see the space (between the projections of a
feed-forward layer); elsewhere a Gather and a multiplication do it at run time. Merging makes room for the new channels
and is the one thing here that changes the function; the report says by how much.

Source: Liu et al., "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.asks.base import Context, Entry, Refusal, Rewrite, register_ask
from qcompile.passes.asks.online import OnlineMap, append_node, insert_online, plain_products
from qcompile.passes.graph import add_initializer, float_type
from qcompile.passes.spaces import Reader, Space, Spaces, fold
from qcompile.passes.spaces.act import Actor
from qcompile.passes.spaces.lazy import computed
from qcompile.passes.spaces.request import scale

_ANY_COUNT = {
    "MatMul",
    "Gemm",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Relu",
    "LeakyRelu",
    "Gelu",
    "Swish",
    "Silu",
    "Sigmoid",
    "Tanh",
}
_ANY_COUNT |= {"Erf", "Clip", "Max", "Min", "Softplus", "HardSwish", "HardSigmoid", "Elu", "Identity"}
"""Operators that do not care how many channels there are."""


@dataclass(frozen=True)
class Split(OnlineMap):
    """``x'_k = x_{source_k} factor_k (+ x_{second_k} factor_k)``, weights ``W'_k`` given.

    Attributes:
        source: channel that each new channel takes.
        factor: what it is multiplied by.
        second: a channel to add, -1 for none.
    """

    source: np.ndarray
    factor: np.ndarray
    second: np.ndarray
    label: str = "split"

    @property
    def rows(self) -> int:
        """Width of the result."""
        return len(self.source)

    def insert(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        """Gather, add what is merged, multiply."""
        y = self._gather(graph, x, self.source, "split", x)
        if (self.second >= 0).any():
            other = self._gather(graph, x, np.maximum(self.second, 0), "merged", y)
            mask = self._vector(graph, x, self.second >= 0, "mask")
            chosen = append_node(other, ir.node("Mul", [other, mask]), "masked")
            y = append_node(chosen, ir.node("Add", [y, chosen]), "sum")
        return append_node(y, ir.node("Mul", [y, self._vector(graph, x, self.factor, "share")]), "shared")

    def _gather(self, graph: ir.Graph, x: ir.Value, index: np.ndarray, label: str, after: ir.Value) -> ir.Value:
        where = add_initializer(graph, f"{x.name}.{label}", index.astype(np.int64))
        node = ir.node("Gather", [x, where], attributes={"axis": -1})
        return append_node(x, node, label, width=self.rows, after=after)

    def _vector(self, graph: ir.Graph, x: ir.Value, array: np.ndarray, label: str) -> ir.Value:
        return add_initializer(graph, f"{x.name}.{label}", array.astype(float_type(x)))

    def inverse(self, weight: np.ndarray) -> np.ndarray:
        """Rows of the channels taken; the sum of both for merged ones."""
        result = weight[self.source]
        merged = self.second >= 0
        result[merged] += weight[self.second[merged]]
        return result


@register_ask("split-channels")
@dataclass(frozen=True)
class SplitChannels(Rewrite):
    """Splits channels with outliers into several smaller ones (QLLM), folded where possible.

    Attributes:
        threshold: a channel is split if its range exceeds this multiple of the median range.
        extra: new channels at most, as a share of the width.
        online: split at run time what does not fold.
        merge: merge alike channels so that the width stays (online only; changes the function slightly).
    """

    threshold: float = 4.0
    extra: float = 0.1
    online: bool = False
    merge: bool = False

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Split space by space."""
        done = 0
        products = {node.name or "" for node in plain_products(model, context)}
        for space in context.spaces:
            readers = context.readers(space)
            if not readers:
                continue
            try:
                copies = split_counts(context.activation_range(space), self.threshold, self.extra, self.merge)
                if copies.max() == 1:
                    continue
                text = f"{int((copies > 1).sum())} channels split, {copies.sum() - space.size} more"
                reason = why_not_folded(context.spaces, space)
                if not reason and not self.merge:
                    duplicate(context.spaces.rebase(model), space, copies)
                elif self.online:
                    text += self._online(model, context, readers, copies, products)
                else:
                    raise Refusal(f"{reason}; choose online")
            except Refusal as refusal:
                context.report.entries.append(Entry(self.name, space.index, False, str(refusal)))
                continue
            context.report.entries.append(Entry(self.name, space.index, True, text))
            done += 1
        return done > 0

    def _online(
        self, model: ir.Model, context: Context, readers: list[Reader], copies: np.ndarray, products: set[str]
    ) -> str:
        if any(r.node not in products for r in readers) or len({r.activation for r in readers}) > 1:
            raise Refusal("something else than matrix products of one activation reads it")
        channels = readers[0].channels
        if len(channels) != len(copies) or (channels != np.arange(len(channels))).any():
            raise Refusal("the activation holds channels of several spaces")
        source = np.repeat(np.arange(len(copies)), copies)
        factor = 1.0 / copies[source]
        second = np.full(len(source), -1)
        text = " at run time"
        if self.merge:
            weight = np.concatenate([context.weight_rows(r) for r in readers], 1)
            moment = context.statistics(moments=True)[readers[0].activation].hessian
            assert moment is not None
            pairs, error = alike_pairs(moment, weight, np.flatnonzero(copies == 1), len(source) - len(copies))
            keep = np.ones(len(source), bool)
            place = np.cumsum(copies) - 1
            for i, j in pairs:
                second[place[i]], factor[place[i]], keep[place[j]] = j, 0.5, False
            source, factor, second = source[keep], factor[keep], second[keep]
            text += f", {len(pairs)} pairs merged with a relative error of {error:.1e}"
        insert_online(model, {readers[0].activation: [r.node for r in readers]}, Split(source, factor, second))
        return text


def split_counts(ranges: np.ndarray, threshold: float, extra: float, merge: bool = False) -> np.ndarray:
    """Number of channels that each channel becomes; the threshold rises until the new ones fit into ``extra``.

    With ``merge`` there must be a pair of other channels for each new one.
    """
    limit = threshold * float(np.median(ranges[ranges > 0])) if (ranges > 0).any() else np.inf
    while True:
        copies = np.maximum(1, np.ceil(ranges / limit)).astype(int)
        new = copies.sum() - len(copies)
        if new <= extra * len(copies) and (not merge or new <= (copies == 1).sum() // 2):
            return copies
        limit *= 1.1


def alike_pairs(
    moment: np.ndarray, weight: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[list[tuple[int, int]], float]:
    """Disjoint pairs whose merging costs least, and the relative squared error of the output, square-rooted.

    The cost of (i, j) is ``E(x_i - x_j)^2 |w_i - w_j|^2 / 4``.
    """
    h = moment[np.ix_(candidates, candidates)]
    w = weight[candidates] @ weight[candidates].T
    apart = lambda g: np.diagonal(g)[:, None] + np.diagonal(g)[None] - 2 * g  # noqa: E731
    cost = np.maximum(apart(h), 0) * np.maximum(apart(w), 0) / 4
    upper = np.triu_indices(len(candidates), 1)
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    total = 0.0
    for k in np.argsort(cost[upper], kind="stable"):
        i, j = int(upper[0][k]), int(upper[1][k])
        if len(pairs) == count:
            break
        if i in used or j in used:
            continue
        used |= {i, j}
        total += float(cost[i, j])
        pairs.append((int(candidates[i]), int(candidates[j])))
    whole = float(np.einsum("ij,ik,jk->", moment, weight, weight, optimize=True))
    return pairs, (total / whole) ** 0.5 if whole > 0 else 0.0


def why_not_folded(spaces: Spaces, space: Space) -> str:
    """Why the number of channels of the space's family cannot change in the constants alone; empty if it can."""
    solution = spaces.solution
    if not space.scalable or len(space.columns) > 1:
        return f"its group {space.group} has no free scales"
    inside = np.zeros(len(solution.cell_of), bool)
    inside[solution.families[space.family].classes] = True
    for node in spaces.model.graph:
        for value in (*node.inputs, *node.outputs):
            maps = (
                (*spaces.layouts.get(value.name or "", ()), *spaces.constants.get(value.name or "", ()))
                if value
                else ()
            )
            touched = [inside[solution.class_of[m.flat]] for m in maps]
            if any(t.any() for t in touched) and (
                node.op_type not in _ANY_COUNT or not all(t.all() or not t.any() for t in touched)
            ):
                return f"{node.op_type} {node.name!r} depends on the number of channels"
    return ""


def duplicate(spaces: Spaces, space: Space, copies: np.ndarray) -> None:
    """Split the channels of a space in the constants of ``spaces.model``, in place: scales first, then copies."""
    solution, graph = spaces.solution, spaces.model.graph
    element = spaces.identity()
    scale(spaces, element, space, 1.0 / copies)
    folded = fold(spaces, element)
    family = solution.families[space.family]
    row_copies = np.ones(len(family.classes), int)
    row_copies[solution.row_of[space.classes]] = copies
    inside = np.zeros(len(solution.cell_of), bool)
    inside[family.classes] = True
    touched = {n for n, maps in spaces.constants.items() if any(inside[solution.class_of[m.flat]].any() for m in maps)}
    actor = Actor(element, lambda c: np.ones(len(c)))
    for name in spaces.constants:
        if name in touched or any(actor.touches(m) for m in spaces.constants[name]):
            graph.initializers[name].const_value = folded.graph.initializers[name].const_value
    values = {v.name: v for node in graph for v in node.outputs} | dict(graph.initializers)
    for name, maps in (spaces.layouts | spaces.constants).items():
        for m in maps:
            classes = solution.class_of[m.flat]
            if not inside[classes].any() or name not in values:
                continue
            (axis,) = m.axes
            index = np.repeat(np.arange(m.size), row_copies[solution.row_of[classes]])
            value = values[name]
            if value.const_value is not None:
                share = np.where(solution.parity[m.flat] < 0, 1.0 / row_copies[solution.row_of[classes]], 1.0)
                value.const_value = _copied(value.const_value, axis, index, share)
                value.shape = value.const_value.shape  # type: ignore[assignment]
            elif value.shape is not None:
                dims = list(value.shape)
                dims[axis] = len(index)
                value.shape = ir.Shape(dims)


def _copied(old: ir.TensorProtocol, axis: int, index: np.ndarray, share: np.ndarray) -> ir.LazyTensor:
    shape = [int(d) for d in old.shape]  # type: ignore[arg-type]
    shape[axis] = len(index)
    factor = share.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return computed(lambda: np.take(old.numpy().astype(np.float64) * factor, index, axis), old, shape)
