"""A rule: which operator it starts from, when it applies, what it puts in place. And the loop that applies rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import add_initializer, module_path
from qcompile.passes.recognise.result import Found, Recognised, Refused


class Rule(ABC):
    """Raises one kind of subgraph.

    Attributes:
        kind: name of the composite (or of the simplification) in reports.
        anchors: operator types of the node that computes the result of the subgraph.
    """

    kind: str
    anchors: tuple[str, ...]

    @abstractmethod
    def apply(self, node: ir.Node) -> Found | Refused | None:
        """Try the rule on the subgraph that ends in ``node``.

        Returns:
            None if the subgraph is something else, `Refused` if it looks like the composite but differs, `Found` after
            the graph was changed.
        """

    def found(self, node: ir.Node, detail: str = "") -> Found:
        """The record of a rewrite."""
        return Found(self.kind, place(node), detail)

    def refused(self, node: ir.Node, reason: str) -> Refused:
        """The record of a near miss."""
        return Refused(self.kind, place(node), reason)


def place(node: ir.Node) -> str:
    """Where a node is, for people: module path and the name of its result."""
    path, value = module_path(node), node.outputs[0].name or ""
    return f"{path} ({value})" if path and path not in (value, node.name) else value


def apply_rules(model: ir.Model, rules: Sequence[Rule], report: Recognised, rounds: int = 20) -> int:
    """Apply rules in order, over and over, until none applies; return how often one did.

    Refusals are recorded for the state in which the loop ends: what a later round raised after all is not reported.
    """
    total = 0
    for _ in range(rounds):
        changes, refusals = 0, []
        for rule in rules:
            for node in [n for n in model.graph.all_nodes() if n.op_type in rule.anchors and n.domain == ""]:
                if node.graph is None or not is_live(node):
                    continue
                outcome = rule.apply(node)
                if isinstance(outcome, Found):
                    report.found.append(outcome)
                    changes += 1
                elif isinstance(outcome, Refused):
                    refusals.append(outcome)
        total += changes
        if not changes:
            known = set(report.refused)
            report.refused += [r for r in dict.fromkeys(refusals) if r not in known]
            break
    return total


def is_live(node: ir.Node) -> bool:
    """Whether anything reads a result of ``node``."""
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def emit(
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    like: ir.Value | None = None,
) -> ir.Value:
    """Insert a node before ``anchor`` and return its result, typed and shaped ``like`` another value if given."""
    node = ir.node(op_type, inputs, attributes=attributes or {})
    node.metadata_props.update(anchor.metadata_props)
    if like is not None:
        node.outputs[0].type = like.type
        node.outputs[0].shape = like.shape
    assert anchor.graph is not None
    anchor.graph.insert_before(anchor, node)
    return node.outputs[0]


def emit_constant(anchor: ir.Node, array: np.ndarray, name: str) -> ir.Value:
    """A new initializer of the graph of ``anchor`` (of the main graph if that one holds none)."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, name, np.ascontiguousarray(array))


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Make readers of ``old`` read ``new``, then delete what computed ``old`` as far as nothing else needs it.

    A graph output keeps its name; where ``new`` cannot take the name (it is a graph input, an initializer or an output
    itself), an Identity does.
    """
    node = old.producer()
    if old.is_graph_output():
        assert node is not None and node.graph is not None
        if new.producer() is None or new.is_graph_output():
            new = emit(node, "Identity", [new], like=old)
        name = old.name
        old.name = None
        new.name = name
        if new.shape is None:
            new.shape = old.shape
        if new.type is None:
            new.type = old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if node is not None:
        remove_dead([node])


def remove_dead(nodes: Iterable[ir.Node]) -> None:
    """Remove nodes whose results nobody reads, and then their producers for which that became true."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.graph is None or is_live(node):
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        todo += [producer for producer in producers if producer is not None]
