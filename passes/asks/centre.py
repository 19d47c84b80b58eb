"""LayerNorm to RMSNorm: subtract the mean where it is written instead of where it is read.

    LN(x) = g * RMS(P x) + b,   P = 1 - 11^T / n          W_out' = P W_out,  x' = P x,  LN(x) = g * RMS(x') + b

Legal only if everything that reads the stream subtracts the mean itself: then the component along the ones vector is
seen by nobody, and P may be put into the writers. A stream that an RMSNorm or a linear layer reads directly keeps its
mean; taking it out there, as tools that decide by module names do, changes the function. Afterwards the group of the
stream is O(n) instead of the matrices that fix the ones vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.asks.base import Context, Entry, Rewrite, register_ask
from qcompile.passes.graph import add_initializer, attribute, float_type
from qcompile.passes.spaces import Space, Spaces
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.lazy import computed


@register_ask("centre")
@dataclass(frozen=True)
class Centre(Rewrite):
    """Centres every stream that only LayerNorms read, and turns those into RMSNorms, which admit all rotations."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Rewrite all streams for which it is legal; the report says why not for the others."""
        done = False
        for space in context.spaces:
            if not (space.mixes and space.limit & Limit.FIX_ONES):
                continue
            reason = seen_mean(context.spaces, space)
            if reason:
                context.report.entries.append(Entry(self.name, space.index, False, reason))
                continue
            norms = _norms(context.spaces, space)
            _centre_writers(model, context.spaces, space)
            for node in list(model.graph):
                if node.op_type == "LayerNormalization" and (node.name or node.outputs[0].name) in norms:
                    _to_rms(model.graph, node)
            context.report.entries.append(Entry(self.name, space.index, True, f"{len(norms)} norms without a mean"))
            done = True
        return done


def seen_mean(spaces: Spaces, space: Space) -> str:
    """Why the mean of a stream is visible to somebody, or an empty string."""
    s = spaces.solution
    inside = np.zeros(len(s.cell_of), bool)
    inside[space.classes] = True
    for peel in s.peels.values():
        if not peel.forward and inside[peel.leader].any():
            return f"{peel.scaling.node!r} writes it through a scale per channel"
    for birth in s.constraints.births:
        coordinates = np.arange(birth.start, birth.start + birth.count)
        mine = inside[s.class_of[coordinates]]
        if mine.any() and (s.parity[coordinates][mine] < 0).any():
            return f"{birth.name!r} is summed with the stream itself"
    for use in s.constraints.uses:
        classes = s.class_of[use.coordinates]
        if not inside[classes].any() or use.op == "constant" or use.op == "kernel axis" or use.role == "kernel axis":
            continue
        if use.op != "LayerNormalization" or not inside[classes].all():
            return f"{use.op} {use.node!r} sees the mean"
        blocks = np.zeros(len(classes), np.int64) if use.mix is None else use.mix
        if any(len(np.unique(classes[blocks == b])) != (blocks == b).sum() for b in np.unique(blocks)):
            return f"{use.op} {use.node!r} averages several copies together"
    return ""


def _norms(spaces: Spaces, space: Space) -> set[str]:
    s = spaces.solution
    inside = set(space.classes.tolist())
    return {
        use.node
        for use in s.constraints.uses
        if use.op == "LayerNormalization" and use.role == "input" and s.class_of[use.coordinates[0]] in inside
    }


def _centre_writers(model: ir.Model, spaces: Spaces, space: Space) -> None:
    """Apply P to every constant that writes channels of the space, one block at a time, when it is read."""
    for name, maps in spaces.constants.items():
        found = [(m, place) for m in maps if ((place := spaces.index_in_space(m.flat, space)) >= 0).any()]
        if found:
            value = model.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = _centred(value.const_value, found, space)


def _centred(old: ir.TensorProtocol, maps: list[tuple[IndexMap, np.ndarray]], space: Space) -> ir.LazyTensor:
    def compute() -> np.ndarray:
        array = old.numpy().astype(np.float64)
        for m, place in maps:
            front = np.moveaxis(array, m.axes, range(len(m.axes))).copy()
            rows = front.reshape(m.size, -1)
            for block in np.unique(space.cells):
                at = np.flatnonzero((place >= 0) & (space.cells[np.maximum(place, 0)] == block))
                if len(at):
                    rows[at] -= rows[at].mean(0)
            array = np.moveaxis(rows.reshape(front.shape), range(len(m.axes)), m.axes)
        return array

    return computed(compute, old)


def _to_rms(graph: ir.Graph, node: ir.Node) -> None:
    out = node.outputs[0]
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    if scale is None:
        assert node.inputs[0] is not None and node.inputs[0].shape is not None
        scale = add_initializer(
            graph,
            f"{node.name}.scale",
            np.ones(int(node.inputs[0].shape[-1]), float_type(node.inputs[0])),  # type: ignore[arg-type]
        )
    norm = ir.node(
        "RMSNormalization",
        [node.inputs[0], scale],
        attributes={"axis": attribute(node, "axis", -1), "epsilon": attribute(node, "epsilon", 1e-5)},
        name=f"{node.name}.rms",
    )
    result = norm.outputs[0]
    result.shape, result.type = out.shape, out.type
    nodes = [norm]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        add = ir.node("Add", [result, node.inputs[2]], name=f"{node.name}.bias")
        result.name = f"{out.name}.rms"
        result = add.outputs[0]
        result.shape, result.type = out.shape, out.type
        nodes.append(add)
    result.name = out.name
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
