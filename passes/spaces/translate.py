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

from qcompile.passes.graph import add_initializer, attribute, constant, float_type, is_op
from qcompile.passes.spaces.analysis import Spaces
from qcompile.passes.spaces.index_map import IndexMap
from qcompile.passes.spaces.walk import dims

_PASS = {"Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Split", "Slice"}
_PASS |= {"GlobalAveragePool", "Gather"}


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
        self.layouts = dict(spaces.layouts)
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
        if not table.any():
            return False
        edits = [self._write(value, table, online)]
        self._absorb(value, table, edits)
        for edit in edits:
            edit.apply()
        return any(e.inserts for e in edits)

    def _map(self, name: str) -> IndexMap:
        maps = self.layouts.get(name, ())
        if len(maps) != 1:
            raise Untranslatable(f"{name!r} has {len(maps)} channel axes")
        return maps[0]

    def bias_of(self, value: ir.Value) -> np.ndarray | None:
        """The constant vector added where ``value`` was written, on its own channels; None if there is none."""
        source, node = value, value.producer()
        while is_op(node, *_PASS) and node is not None and node.inputs[0] is not None:
            source, node = node.inputs[0], node.inputs[0].producer()
            if node is None:
                return None
        vectors: list[ir.Value | None] = []
        if is_op(node, "Add") and node is not None:
            vectors = list(node.inputs)
        elif is_op(node, "Gemm") and node is not None:
            vectors = [v for v in node.inputs[2:] if v is not None]
        bias = next((v for v in vectors if v is not None and v.name in self.spaces.constants), None)
        if bias is None or source.name not in self.layouts or value.name not in self.layouts:
            return None
        assert source.name is not None and value.name is not None
        array, written = _array(bias), self._map(source.name)
        if array.size != written.size:
            return None
        return self._carry(source.name, value.name, array.reshape(written.table.shape))

    def _origin(self, value: ir.Value, t: np.ndarray) -> tuple[ir.Value, np.ndarray]:
        """Go back through operators that only move data, and from attention to its values, to what somebody writes."""
        node = value.producer()
        while node is not None and (is_op(node, *_PASS) or (is_op(node, "Attention") and not _visible_rows(node))):
            source = node.inputs[2 if is_op(node, "Attention") else 0]
            if source is None or source.producer() is None:
                break
            # What a split or slice leaves out is not translated.
            t = self._carry(value.name or "", source.name or "", t, others=is_op(node, "Split", "Slice", "Gather"))
            value, node = source, source.producer()
        return value, t

    def _carry(self, here: str, there: str, t: np.ndarray, others: bool = False) -> np.ndarray:
        """``t`` on another value: coordinates say where each channel went; ``others`` stay where they are if allowed.

        Copies of one channel (heads that share values) get the mean of what was wanted for them.
        """
        before, after = self._map(here), self._map(there)
        keys, index = np.unique(before.flat, return_inverse=True)
        mean = np.bincount(index, np.broadcast_to(t, before.table.shape).reshape(-1)) / np.bincount(index)
        place = np.minimum(np.searchsorted(keys, after.flat), len(keys) - 1)
        known = keys[place] == after.flat
        if not others and not known.all():
            raise Untranslatable(f"{there!r} joins channels of several values")
        return np.where(known, mean[place], 0.0).reshape(after.table.shape)

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
        """Whether input ``i`` is a constant of this node alone with one entry per channel."""
        value = node.inputs[i]
        array = constant(value)
        if value is None or array is None or len(value.uses()) != 1:
            return False
        if not is_op(node, "Add"):
            return array.size == t.size
        rank = max(array.ndim, t.ndim)
        return _pad(array, rank).shape == _pad(t, rank).shape

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
            graph, f"{value.name}.shift", np.squeeze(t, tuple(range(t.ndim - 1))).astype(float_type(value))
        )
        add = ir.node("Add", [value, vector], name=f"{value.name}.shift")
        out = add.outputs[0]
        out.shape, out.type, out.name = value.shape, value.type, f"{value.name}.shifted"
        if value.is_graph_output():
            # The output keeps its name.
            out.name, value.name = value.name, f"{value.name}.unshifted"
        for old, new in ((value.name, out.name), (out.name, value.name)):
            if old in self.layouts:
                self.layouts[new or ""] = self.layouts[old]
        users = [(u.node, u.idx) for u in value.uses() if u.node is not add]
        graph.insert_after(node, [add])
        for user, i in users:
            user.replace_input_with(i, out)
        for i, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[i] = out
        self.by_name |= {v.name: v for v in (value, out) if v.name}

    # -- the readers -----------------------------------------------------------------------------------------------

    def _absorb(self, value: ir.Value, t: np.ndarray, edits: list[_Edit]) -> None:
        if not t.any():
            return
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
            and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
            and attribute(node, "group", 1) == 1
        ):
            taps = _array(node.inputs[1]).reshape(*_array(node.inputs[1]).shape[:2], -1).sum(-1)
            self._absorb_bias(node, taps @ t.reshape(-1), edits)
        elif is_op(node, "Attention") and i == 1 and not attribute(node, "softcap", 0) and not _visible_rows(node):
            return
        elif (is_op(node, "Attention") and i == 2 and not _visible_rows(node)) or (is_op(node, *_PASS) and i == 0):
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
                bias = add_initializer(
                    self.model.graph, f"{node.name}.bias", -shift.astype(float_type(node.outputs[0]))
                )
                node.resize_inputs(3)
                node.replace_input_with(2, bias)

            edits.append(_Edit(apply, True))
        else:
            raise Untranslatable(f"{node.op_type} {node.name!r} has no bias of its own")


def _visible_rows(node: ir.Node) -> bool:
    """Whether an attention operator shows its scores, or attends to keys and values that come from outside."""
    outside = any(v is not None for v in node.inputs[4:6])
    return outside or any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


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
