"""A fixed-point program: nodes in order, joined by streams. One description from which everything else is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np

from qcompile.codegen.fixed.nodes.base import Folding, Node
from qcompile.codegen.fixed.stream import Stream
from qcompile.errors import TargetError


@dataclass(frozen=True)
class Program:
    """A directed acyclic graph of nodes.

    Attributes:
        name: an identifier.
        inputs: streams from outside.
        nodes: in topological order; each writes a stream of its own name.
        outputs: names of the streams that leave.
    """

    name: str
    inputs: tuple[Stream, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        known = {s.name for s in self.inputs}
        for node in self.nodes:
            for stream in node.inputs:
                if stream.name not in known:
                    raise TargetError(f"{node.name} reads {stream.name!r}, which nothing before it writes")
            if node.name in known:
                raise TargetError(f"two streams are called {node.name!r}")
            known.add(node.name)
        if missing := set(self.outputs) - known:
            raise TargetError(f"no stream is called {sorted(missing)[0]!r}")

    @cached_property
    def streams(self) -> dict[str, Stream]:
        """Every stream by name."""
        return {s.name: s for s in [*self.inputs, *(n.output for n in self.nodes)]}

    @cached_property
    def graph(self) -> nx.MultiDiGraph:
        """Names of nodes and inputs; an edge per stream and reader, with its ``port``."""
        graph = nx.MultiDiGraph()
        graph.add_nodes_from(s.name for s in self.inputs)
        for node in self.nodes:
            graph.add_node(node.name, node=node)
            for port, stream in enumerate(node.inputs):
                graph.add_edge(stream.name, node.name, port=port)
        return graph

    def readers(self, stream: str) -> int:
        """How often a stream is read, the outside counted."""
        return self.graph.out_degree(stream) + self.outputs.count(stream)

    def reference(self, feeds: Mapping[str, np.ndarray], *, every: bool = False) -> dict[str, np.ndarray]:
        """Run frames ``(V, tokens, channels)`` of integers through the numpy definition of every node.

        Args:
            feeds: by input stream.
            every: return all streams, not only the outputs.

        Raises:
            FormatError: an input is out of range, or a node left its own: a fault of its interval analysis.
        """
        values = {s.name: s.check(feeds[s.name]) for s in self.inputs}
        for node in self.nodes:
            inputs = [values[s.name].reshape(-1, *s.shape) for s in node.inputs]
            values[node.name] = node.output.check(node.reference(*inputs))
        return values if every else {name: values[name] for name in self.outputs}

    def folded(self, foldings: Mapping[str, Folding]) -> Program:
        """A copy in which the named nodes are folded otherwise."""
        nodes = []
        for node in self.nodes:
            wanted = foldings.get(node.name)
            nodes.append(node if wanted is None else node.folded(wanted.pe, wanted.simd))
        return replace(self, nodes=tuple(nodes))
