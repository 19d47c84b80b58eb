"""Where a model can be cut: values that everything downstream depends on alone.

Block-wise methods work on a part of a model, on values recorded at its borders. A border is a place in graph order where
exactly one value is still needed later that depends on what a quantized operator reads; what does not (masks, rotary
tables, embeddings) is simply computed again from the graph's inputs. Residual streams have a border
after every residual addition; nothing about layers or names is known here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Block:
    """Nodes between two borders.

    Attributes:
        source: the value that enters; empty for the first block, which begins at the graph's inputs.
        target: the value that leaves.
        nodes: names of the nodes from one to the other.
        constants: initializers these nodes read.
    """

    source: str
    target: str
    nodes: tuple[str, ...]
    constants: frozenset[str]


def blocks(model: ir.Model, sites: Collection[str], span: int = 1) -> list[Block]:
    """Cut a model into blocks in graph order.

    Args:
        model: the graph.
        sites: names of the quantized nodes; every block has at least one.
        span: how many neighbouring blocks to join.
    """
    cuts, nodes = borders(model, sites), list(model.graph)
    position = {node: i for i, node in enumerate(nodes)}
    found: list[Block] = []
    source, first, count = "", 0, 0
    previous = 0
    for k, cut in enumerate(cuts):
        last = position[cut.producer()] + 1  # type: ignore[index]
        count += any((n.name or "") in sites for n in nodes[previous:last])
        if count == span or (count and k == len(cuts) - 1):
            inside = nodes[first:last]
            constants = frozenset(
                v.name or "" for n in inside for v in n.inputs if v is not None and v.is_initializer()
            )
            found.append(Block(source, cut.name or "", tuple(n.name or "" for n in inside), constants))
            source, first, count = cut.name or "", last, 0
        previous = last
    return found


def borders(model: ir.Model, sites: Collection[str]) -> list[ir.Value]:
    """Values that cut the graph in two, in graph order; a result that nothing reads may be the last."""
    depends: set[ir.Value] = set()
    left: dict[ir.Value, int] = {}
    found: list[ir.Value] = []
    for node in model.graph:
        read = [v for v in node.inputs if v is not None]
        # What a site reads counts already, so that its readers stay together.
        feeds = any((use.node.name or "") in sites for v in node.outputs for use in v.uses())
        data = feeds or (node.name or "") in sites or any(v in depends for v in read)
        for v in read:
            if v in left:
                left[v] -= 1
                if not left[v]:
                    del left[v]
        if not data:
            continue
        for v in node.outputs:
            depends.add(v)
            if v.uses():
                left[v] = len(v.uses())
        alive = list(left) or [v for v in node.outputs if v.is_graph_output()]
        if len(alive) == 1 and (not found or found[-1] is not alive[0]):
            found.append(alive[0])
    return found
