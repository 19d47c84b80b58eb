"""Raise a model of default-domain opset 13 or later to a later one, in place, without touching weights.

Between 13 and 24 almost every new version of an operator only adds types, optional inputs or attributes whose default is
the old behaviour. Those that do not are rewritten here, one function each; a test compares the list with the schemas of
the installed ONNX. ONNX Runtime 1.32 has no CPU kernel for the newest versions of RoiAlign, MaxRoiPool, GlobalLpPool,
Multinomial and Random*: a model with those converts, but stock ONNX Runtime does not execute the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.passes.graph import add_initializer, constant, module_path

OLDEST = 13
NEWEST = 24


def convert_opset(model: ir.Model, target: int) -> None:
    """Raise ``model`` and its functions to default-domain opset ``target``; what is there already is left alone.

    Raises:
        ModelError: the model's opset is below 13, missing, or above ``NEWEST``.
        UnsupportedOperatorError: an operator's old form has no counterpart.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        raise ModelError("the model imports no opset of the default domain")
    if version < OLDEST:
        raise ModelError(f"opset {version} is older than {OLDEST}; export the model again with opset {OLDEST} or later")
    if version > NEWEST:
        raise ModelError(
            f"opset {version} is newer than {NEWEST}; export the model again with opset {NEWEST} or earlier"
        )
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports[""] = version  # the graph's imports are the model's
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        start = body.opset_imports.get("", body.opset_imports.get("ai.onnx", version))
        for node in list(body.all_nodes()):
            if node.domain not in ("", "ai.onnx"):
                continue
            node.domain = ""
            node.version = None
            for op_type, since, adapt in _ADAPTERS:
                if node.op_type == op_type and start < since <= target:
                    adapt(node)
        body.opset_imports.pop("ai.onnx", None)
        body.opset_imports[""] = max(start, target)
    model.ir_version = max(model.ir_version or 0, 10)


def _axes_to_input(node: ir.Node) -> None:
    """Reduce*-18 takes the axes as an input."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, _constant(node, np.array(axes.as_ints(), np.int64), "axes"))


def _split_count(node: ir.Node) -> None:
    """Split-18 needs the number of outputs where the sizes are not given."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align_mode(node: ir.Node) -> None:
    """RoiAlign-16 made half a pixel of shift the default."""
    node.attributes.setdefault(
        "coordinate_transformation_mode", ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
    )


def _grid_sample_mode(node: ir.Node) -> None:
    """GridSample-20 renamed two modes."""
    old = node.attributes["mode"].as_string() if "mode" in node.attributes else "bilinear"
    new = {"bilinear": "linear", "bicubic": "cubic"}.get(old, old)
    node.attributes["mode"] = ir.AttrString("mode", new)


def _dft_axis(node: ir.Node) -> None:
    """DFT-20 takes the axis as an input."""
    axis = node.attributes.pop("axis", None)
    node.resize_inputs(3)
    node.replace_input_with(2, _constant(node, np.array(1 if axis is None else axis.as_int(), np.int64), "axis"))


def _batch_norm_outputs(node: ir.Node) -> None:
    """BatchNormalization-14 in inference has one output; the training outputs of version 9 have no counterpart."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise UnsupportedOperatorError(f"BatchNormalization '{module_path(node)}' is exported in training mode")
    node.resize_outputs(1)


def _group_norm_channels(node: ir.Node) -> None:
    """GroupNormalization-21 has scale and bias per channel, version 18 per group."""
    channels = node.inputs[0].shape[1] if node.inputs[0] is not None and node.inputs[0].shape is not None else None
    groups = node.attributes["num_groups"].as_int()
    for index in (1, 2):
        array = constant(node.inputs[index])
        if array is None or not isinstance(channels, int):
            raise UnsupportedOperatorError(
                f"GroupNormalization '{module_path(node)}' of opset 18 with computed scale or unknown channels"
            )
        repeated = np.repeat(array, channels // groups)
        node.replace_input_with(index, _constant(node, repeated, ("scale", "bias")[index - 1]))


def _constant(node: ir.Node, array: np.ndarray, role: str) -> ir.Value:
    graph = node.graph
    name = f"{node.name or node.outputs[0].name}.{role}"
    if isinstance(graph, ir.Graph):
        return add_initializer(graph, name, array)
    made = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
    assert graph is not None
    graph.insert_before(node, made)
    return made.outputs[0]


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ADAPTERS: tuple[tuple[str, int, Callable[[ir.Node], None]], ...] = (
    *((f"Reduce{kind}", 18, _axes_to_input) for kind in _REDUCTIONS),
    ("BatchNormalization", 14, _batch_norm_outputs),
    ("DFT", 20, _dft_axis),
    ("GridSample", 20, _grid_sample_mode),
    ("GroupNormalization", 21, _group_norm_channels),
    ("RoiAlign", 16, _roi_align_mode),
    ("Split", 18, _split_count),
)
