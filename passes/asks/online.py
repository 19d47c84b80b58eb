"""What does not fold: an explicit operator on the activation before a linear layer, its inverse in the weight.

    x W = T(x) (T^-1 W)

It is exact wherever it is put and costs time in every run, so an ask reaches for it only where the analysis finds no
room. The operators are ``Mul``, ``Gather`` and functions with bodies of the domain ``qcompile``; kernels fuse them into
the quantizer that follows:

    Diagonal     x * d                       width multiplications per row
    Hadamard     x blockdiag(H, .., H)       about log2(block) additions per element
    Kronecker    x blockdiag(L (x) R, ..)    rows(L) + rows(R) multiplications per element

Sources: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (the rotation before the
down-projection); Sun et al., "FlatQuant: Flatness Matters for LLM Quantization", 2024 (Kronecker products).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError
from qcompile.formats.hadamard import factors, hadamard_matrix
from qcompile.passes.asks.base import Context, Entry, Rewrite, register_ask
from qcompile.passes.domain import DOMAIN, add_functions
from qcompile.passes.graph import add_initializer, float_type, insert_after_producer, remove_unused_initializers
from qcompile.passes.spaces import Reader, Space
from qcompile.passes.spaces.lazy import computed

LARGEST_DENSE = 256
"""Order up to which a Hadamard block is written as one matrix; larger ones as a Kronecker product of two."""


class OnlineMap(ABC):
    """T: what it inserts, and what a weight takes in exchange."""

    label: str

    @property
    def rows(self) -> int:
        """Width of ``T(x)``; 0 for that of x."""
        return 0

    @abstractmethod
    def insert(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        """Add the nodes that compute ``T(x)`` right behind ``x``; returns their result."""

    @abstractmethod
    def inverse(self, weight: np.ndarray) -> np.ndarray:
        """``T^-1 W`` of a float64 ``(K, N)`` weight."""


@dataclass(frozen=True)
class Diagonal(OnlineMap):
    """``x * factor``, channel by channel; ``factor`` has no zeros."""

    factor: np.ndarray
    label: str = "scaled"

    def insert(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        """One multiplication."""
        factor = add_initializer(graph, f"{x.name}.factor", self.factor.astype(float_type(x)))
        return append_node(x, ir.node("Mul", [x, factor]), self.label)

    def inverse(self, weight: np.ndarray) -> np.ndarray:
        """Rows divided by the factors."""
        return weight / self.factor[:, None]


@dataclass(frozen=True)
class Hadamard(OnlineMap):
    """Orthonormal Hadamard blocks of one order; a row is filled up with zeros to ``width`` first.

    Attributes:
        order: of the blocks; it divides ``width``.
        width: of the rotated row, at least that of the activation.
    """

    order: int
    width: int
    label: str = "rotated"

    @property
    def rows(self) -> int:
        """Width after padding."""
        return self.width

    def insert(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        """Padding if needed, then ``qcompile::BlockRotate`` or, for large orders, ``qcompile::Kronecker``."""
        assert x.shape is not None
        padding = self.width - int(x.shape[-1])  # type: ignore[arg-type]
        if padding:
            pads = _shared(graph, f"padding.{padding}", np.array([0, padding]))
            axis = _shared(graph, "last_axis", np.array([-1]))
            x = append_node(x, ir.node("Pad", [x, pads, None, axis]), "padded", width=self.width)
        kind, parts = (
            ("BlockRotate", (self.order,)) if self.order <= LARGEST_DENSE else ("Kronecker", split(self.order))
        )
        dtype = float_type(x)
        matrices = [_shared(graph, f"hadamard.{n}.{dtype}", hadamard_matrix(n).astype(dtype)) for n in parts]
        return append_node(x, ir.node(kind, [x, *matrices], domain=DOMAIN), self.label)

    def inverse(self, weight: np.ndarray) -> np.ndarray:
        """``H^T W``, block by block."""
        full = np.zeros((self.width, weight.shape[1]))
        full[: len(weight)] = weight
        blocks = full.reshape(-1, self.order, weight.shape[1])
        return np.einsum("ij,bin->bjn", hadamard_matrix(self.order), blocks).reshape(full.shape)


@dataclass(frozen=True)
class Kronecker(OnlineMap):
    """Blocks ``left (x) right``, both invertible; their sizes multiply to a divisor of the width."""

    left: np.ndarray
    right: np.ndarray
    label: str = "mixed"

    def insert(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        """``qcompile::Kronecker``."""
        matrices = [
            add_initializer(graph, f"{x.name}.{side}", matrix.astype(float_type(x)))
            for side, matrix in (("left", self.left), ("right", self.right))
        ]
        return append_node(x, ir.node("Kronecker", [x, *matrices], domain=DOMAIN), self.label)

    def inverse(self, weight: np.ndarray) -> np.ndarray:
        """``(left^-1 (x) right^-1) W``."""
        a, b = len(self.left), len(self.right)
        blocks = weight.reshape(-1, a, b, weight.shape[1])
        left, right = np.linalg.inv(self.left), np.linalg.inv(self.right)
        return np.einsum("ia,jb,xabn->xijn", left, right, blocks, optimize=True).reshape(weight.shape)


def split(order: int) -> tuple[int, int]:
    """Orders of two Hadamard matrices, as equal as possible, whose Kronecker product is the one of ``order``."""
    core, power = factors(order)
    return min(((core << i, 1 << (power - i)) for i in range(power + 1)), key=lambda pair: sum(pair))


def block_order(width: int, most: int = 0) -> int:
    """Largest divisor of ``width`` (up to ``most`` if positive) of which a Hadamard matrix is known."""
    for order in range(min(width, most or width), 1, -1):
        if width % order == 0 and has_hadamard(order):
            return order
    return 1


def has_hadamard(order: int) -> bool:
    """Whether a Hadamard matrix of that order is known."""
    try:
        factors(order)
    except FormatError:
        return False
    return True


def insert_online(model: ir.Model, jobs: Mapping[str, Iterable[str]], what: OnlineMap) -> None:
    """Apply ``what`` to activations before linear operators, and its inverse to their weights.

    Args:
        model: changed in place; weights are computed when read.
        jobs: names of the MatMul nodes by the activation they read; other readers of it are left alone.
        what: the map.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    by_weight: dict[ir.Value, list[ir.Node]] = {}
    for names in jobs.values():
        members = [nodes[name] for name in names]
        x = members[0].inputs[0]
        assert x is not None
        mapped = what.insert(graph, x)
        for node in members:
            node.replace_input_with(0, mapped)
            weight = node.inputs[1]
            assert weight is not None
            by_weight.setdefault(weight, []).append(node)
    for weight, members in by_weight.items():
        tensor = _compensated(weight, what)
        if {use.node for use in weight.uses()} <= set(members) and not weight.is_graph_output():
            weight.const_value, weight.shape = tensor, tensor.shape
            continue
        # Somebody else reads the weight as it is (a tied table, a layer that stays float).
        copy = add_initializer(graph, f"{weight.name}.{what.label}", tensor, like=weight)
        for node in members:
            node.replace_input_with(1, copy)
    add_functions(model)
    remove_unused_initializers(graph)


def _compensated(weight: ir.Value, what: OnlineMap) -> ir.LazyTensor:
    old = weight.const_value
    assert old is not None
    rows, *rest = (int(d) for d in old.shape)  # type: ignore[arg-type]
    return computed(lambda: what.inverse(old.numpy().astype(np.float64)), old, (what.rows or rows, *rest))


def append_node(x: ir.Value, node: ir.Node, label: str, width: int = 0, after: ir.Value | None = None) -> ir.Value:
    """Insert ``node`` behind ``x`` (or behind ``after``); its output is described like ``x``, with another width if given."""
    out = node.outputs[0]
    node.name, out.name, out.type, out.shape = f"{x.name}.{label}.node", f"{x.name}.{label}", x.type, x.shape
    if width and x.shape is not None:
        out.shape = ir.Shape([*list(x.shape)[:-1], width])  # type: ignore[list-item]
    insert_after_producer(after or x, node)
    return out


def _shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return graph.initializers[name] if name in graph.initializers else add_initializer(graph, name, array)


@register_ask("rotate-online")
@dataclass(frozen=True)
class RotateOnline(Rewrite):
    """Rotates inputs of quantized linear operators by Hadamard blocks at run time where no rotation folds.

    Attributes:
        block: largest order of the rotated blocks; 0 for whole rows where a Hadamard matrix of that order is known.
        everywhere: rotate also inputs that a folded rotation reaches.
        pad: fill rows up with zeros to the next width of which a Hadamard matrix is known, instead of smaller blocks.
        signs: multiply by random signs first, so that no block sums up the mean of its channels.
        seed: of the signs.
    """

    block: int = 0
    everywhere: bool = False
    pad: bool = False
    signs: bool = False
    seed: int = 0

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Insert the operators; the report says what was refused."""
        folds = {r.node for s in context.spaces if can_rotate(s, context) for r in context.readers(s)}
        jobs: dict[tuple[int, int, int], dict[str, list[str]]] = {}
        for node, width in plain_products(model, context).items():
            activation = node.inputs[0].name or ""  # type: ignore[union-attr]
            if node.name in folds and not self.everywhere:
                continue
            order, padded = self._order(width)
            if order < 4:
                reason = f"width {width} has no Hadamard block of order 4 or more; choose pad"
                context.report.entries.append(Entry(self.name, -1, False, f"{activation}: {reason}"))
                continue
            jobs.setdefault((width, order, padded), {}).setdefault(activation, []).append(node.name or "")
        for (width, order, padded), members in jobs.items():
            if self.signs:
                rng = np.random.default_rng([self.seed, width])
                insert_online(model, members, Diagonal(rng.choice([-1.0, 1.0], width), "signed"))
            insert_online(model, members, Hadamard(order, padded))
        done = sum(len(m) for m in jobs.values())
        counts: dict[int, int] = {}
        for (_, order, _), members in jobs.items():
            counts[order] = counts.get(order, 0) + len(members)
        orders = ", ".join(f"{count} by blocks of {order}" for order, count in counts.items())
        context.report.entries.append(
            Entry(self.name, -1, done > 0, f"{done} activations rotated at run time: {orders or 'none'}")
        )
        return done > 0

    def _order(self, width: int) -> tuple[int, int]:
        """Order of the blocks and width of the row they rotate."""
        if self.pad:
            wanted = self.block or next(n for n in range(width, 2 * width + 4) if has_hadamard(n))
            padded = -(-width // wanted) * wanted
            return block_order(padded, self.block or padded), padded
        return block_order(width, self.block), width


def can_rotate(space: Space, context: Context) -> bool:
    """Whether a rotation of this space folds: it mixes by itself or follows one that does."""
    return (space if space.leader is None else context.spaces[space.leader]).mixes


def product_readers(context: Context) -> list[Reader]:
    """The products ``x @ w`` with a quantized matrix as readers, whether or not the analysis knows their channels."""
    found = []
    for node, width in plain_products(context.model, context).items():
        x, weight = node.inputs[0], node.inputs[1]
        if x is not None and weight is not None:
            found.append(Reader(node.name or "", x.name or "", weight.name or "", 0, -1, np.arange(width)))
    return found


def plain_products(model: ir.Model, context: Context) -> dict[ir.Node, int]:
    """The products ``x @ w`` with a constant matrix that is quantized, and its rows, in graph order."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            continue
        if context.quantized is None or weight.name in context.quantized:
            found[node] = int(weight.shape[0])  # type: ignore[arg-type]
    return found
