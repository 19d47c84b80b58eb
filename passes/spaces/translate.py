"""Translations: add a constant to the channels of a value and take it back in everything that reads it.

    x' = x + t        x' W + b' = x W + b   with   b' = b - t W

The writer takes ``t`` into its own constant (bias, norm beta, any vector that is added); if it has none, an Add node is
the price. Downstream, ``t`` passes every operator that is linear in its channels and is the same at all positions; the
first constant it meets takes it back, a linear operator turns it into ``t W`` first. Rows of attention weights sum to
one, so a translation of the values reaches the output as it is, and one of the keys disappears in the softmax.

The free translations of a model are the values for which all of this succeeds: a null space again, found by walking
instead of by elimination, because each request names one value and the system is triangular in graph order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import add_initializer, attribute, constant, is_op
from qcompile.passes.spaces.analysis import Spaces
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.walk import dims

_PASS = {"Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Cast", "Split"}
_PASS |= {"Slice", "GlobalAveragePool"}


class Untranslatable(Exception):
    """A translation cannot be taken back; the message names the operator."""


@dataclass
class _Edit:
    """One change of a constant or one inserted addition, made after all of them are known to be possible."""

    apply: Callable[[], None]
    inserts: bool


class Translator:
    """Translates values of one model; the graph is changed in place only if a whole request succeeds."""

    def __init__(self, spaces: Spaces, *, insert: bool = True) -> None:
        """``insert``: whether missing biases may be added as new nodes."""
        self.spaces, self.model, self.insert = spaces, spaces.model, insert
        self.by_name = {o.name: o for n in self.model.graph for o in n.outputs if o.name}

    def translate(self, name: str, t: np.ndarray, *, online: bool = False) -> bool:
        """Add ``t`` to the channels of value ``name`` without changing the model's function.

        Args:
            name: a value whose channels belong to spaces.
            t: one number per channel, in the order of the value's index map.
            online: allow an Add node where the writer has no constant.

        Returns:
            Whether nodes were inserted.

        Raises:
            Untranslatable: some reader cannot take the translation back.
        """
        value, table = self._origin(self.by_name[name], np.asarray(t, np.float64).reshape(self._map(name).table.shape))
        edits = [self._write(value, table, online)]
        self._absorb(value, table, edits)
        for edit in edits:
            edit.apply()
        return any(e.inserts for e in edits)

    def _map(self, name: str) -> IndexMap:
        maps = self.spaces.layouts.get(name, ())
        if len(maps) != 1:
            raise Untranslatable(f"{name!r} has {len(maps)} channel axes")
        return maps[0]

    def _origin(self, value: ir.Value, t: np.ndarray) -> tuple[ir.Value, np.ndarray]:
        """Go back through operators that only move data to the value that somebody writes."""
        node = value.producer()
        while is_op(node, *_PASS) and node is not None and len(node.outputs) == 1 and node.inputs[0] is not None:
            source = node.inputs[0]
            t = self._carry(value.name or "", source.name or "", t)
            value, node = source, source.producer()
        return value, t

    def _carry(self, here: str, there: str, t: np.ndarray) -> np.ndarray:
        """``t`` on another value: coordinates say where each channel went."""
        before, after = self._map(here), self._map(there)
        known = dict(zip(before.flat.tolist(), np.broadcast_to(t, before.table.shape).reshape(-1).tolist()))
        try:
            moved = [known[c] for c in after.flat.tolist()]
        except KeyError:
            raise Untranslatable(f"{there!r} joins channels of several values") from None
        return np.array(moved).reshape(after.table.shape)

    # -- the writer ------------------------------------------------------------------------------------------------

    def _write(self, value: ir.Value, t: np.ndarray, online: bool) -> _Edit:
        node = value.producer()
        assert node is not None
        if is_op(node, "Add"):
            for i in (0, 1):
                if self._own_vector(node, i, t):
                    return self._change(node, i, t)
        if is_op(node, "LayerNormalization") and len(node.inputs) > 2 and self._own_vector(node, 2, t):
            return self._change(node, 2, t)
        if is_op(node, "Gemm", "Conv") and len(node.inputs) > 2 and node.inputs[2] is not None:
            return self._change(node, 2, t)
        linear = is_op(node, "MatMul", "LayerNormalization", "RMSNormalization")
        if not (online or (linear and self.insert)):
            raise Untranslatable(f"{node.op_type} {node.name!r} has no constant that could take a translation")
        return _Edit(lambda: self._insert_add(value, t), True)

    def _own_vector(self, node: ir.Node, i: int, t: np.ndarray) -> bool:
        value = node.inputs[i]
        array = constant(value)
        if value is None or array is None or len(value.uses()) != 1:
            return False
        return array.size == t.size

    def _change(self, node: ir.Node, i: int, t: np.ndarray) -> _Edit:
        def apply() -> None:
            value = node.inputs[i]
            assert value is not None and value.const_value is not None
            old = value.const_value.numpy()
            new = old.astype(np.float64) + t.reshape(-1).reshape(old.shape)
            value.const_value = ir.tensor(new if old.dtype == np.float64 else new.astype(old.dtype), name=value.name)

        return _Edit(apply, False)

    def _insert_add(self, value: ir.Value, t: np.ndarray) -> None:
        graph, node = self.model.graph, value.producer()
        assert node is not None
        vector = add_initializer(
            graph, f"{value.name}.shift", np.squeeze(t, tuple(range(t.ndim - 1))).astype(np.float32)
        )
        users = [(u.node, u.idx) for u in value.uses()]
        add = ir.node("Add", [value, vector], name=f"{value.name}.shift")
        add.outputs[0].shape, add.outputs[0].type, add.outputs[0].name = (
            value.shape,
            value.type,
            f"{value.name}.shifted",
        )
        graph.insert_after(node, [add])
        for user, i in users:
            user.replace_input_with(i, add.outputs[0])

    # -- the readers -----------------------------------------------------------------------------------------------

    def _absorb(self, value: ir.Value, t: np.ndarray, edits: list[_Edit]) -> None:
        if value.is_graph_output():
            raise Untranslatable(f"{value.name!r} is an output of the model")
        for usage in value.uses():
            self._absorb_use(usage.node, usage.idx, t, edits)

    def _absorb_use(self, node: ir.Node, i: int, t: np.ndarray, edits: list[_Edit]) -> None:
        out = node.outputs[0]
        where = f"{node.op_type} {node.name!r}"
        if is_op(node, "Add"):
            if self._own_vector(node, 1 - i, t):
                edits.append(self._change(node, 1 - i, -t))
                return
            self._absorb(out, _pad(t, len(dims(out) or ())), edits)
        elif is_op(node, "MatMul") and i == 0 and _is_matrix(node.inputs[1]):
            self._absorb_linear(node, (t.reshape(-1) @ _array(node.inputs[1]))[None], edits)
        elif is_op(node, "Gemm") and i == 0 and not attribute(node, "transA", 0) and _is_matrix(node.inputs[1]):
            w = _array(node.inputs[1])
            self._absorb_bias(node, t.reshape(-1) @ (w.T if attribute(node, "transB", 0) else w), edits)
        elif (
            is_op(node, "Conv")
            and i == 0
            and not any(attribute(node, "pads") or [0])
            and attribute(node, "group", 1) == 1
        ):
            taps = _array(node.inputs[1]).reshape(*_array(node.inputs[1]).shape[:2], -1).sum(-1)
            self._absorb_bias(node, taps @ t.reshape(-1), edits)
        elif is_op(node, "Attention") and i == 1:
            return
        elif is_op(node, "Attention") and i == 2 or is_op(node, *_PASS) and i == 0:
            for output in node.outputs:
                if output.uses() or output.is_graph_output():
                    source = node.inputs[2 if is_op(node, "Attention") else 0]
                    assert source is not None
                    self._absorb(output, self._carry(source.name or "", output.name or "", t), edits)
        else:
            raise Untranslatable(f"{where} does not let a translation pass")

    def _absorb_linear(self, node: ir.Node, shift: np.ndarray, edits: list[_Edit]) -> None:
        """Take back ``shift`` behind a MatMul: in the bias that is added there, or in a new one."""
        out = node.outputs[0]
        uses = list(out.uses())
        if len(uses) == 1 and is_op(uses[0].node, "Add") and self._own_vector(uses[0].node, 1 - uses[0].idx, shift):
            edits.append(self._change(uses[0].node, 1 - uses[0].idx, -shift))
        elif self.insert:
            edits.append(_Edit(lambda: self._insert_add(out, -shift), True))
        else:
            raise Untranslatable(f"MatMul {node.name!r} has no bias")

    def _absorb_bias(self, node: ir.Node, shift: np.ndarray, edits: list[_Edit]) -> None:
        if len(node.inputs) > 2 and node.inputs[2] is not None and self._own_vector(node, 2, shift):
            edits.append(self._change(node, 2, -shift))
        elif self.insert and len(node.inputs) < 3:

            def apply() -> None:
                bias = add_initializer(self.model.graph, f"{node.name}.bias", -shift.astype(np.float32))
                node.resize_inputs(3)
                node.replace_input_with(2, bias)

            edits.append(_Edit(apply, True))
        else:
            raise Untranslatable(f"{node.op_type} {node.name!r} has no bias of its own")


def _pad(t: np.ndarray, rank: int) -> np.ndarray:
    return t.reshape((1,) * (rank - t.ndim) + t.shape)


def _is_matrix(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) == 2
    )


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
