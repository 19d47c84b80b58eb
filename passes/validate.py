"""Is this a model at all? Structure, operators, shapes and weights, checked before anything is computed from them.

Every finding is an error of one line that names the tensor or node, and the module it came from where that is known.
Weights stay where they are: tensors are read in pieces, so that a memory-mapped model larger than memory can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.passes.graph import module_path
from qcompile.passes.opset import NEWEST, OLDEST

_PIECE = 1 << 22
_SMALL = 1024  # bytes up to which values matter to shape inference (shapes, axes)


def validate(model: ir.Model, name: str = "model", *, weights: bool = True) -> None:
    """Check ``model``; return only if it can be worked on.

    Args:
        model: is not changed.
        name: what to call it in messages (the file's path).
        weights: whether to look at every weight for NaN and infinity.

    Raises:
        ModelError: empty graph, opset too old, undefined or doubly defined values, a cycle, shapes or types that do not fit
            an operator, weights that are not finite.
        UnsupportedOperatorError: an operator that neither ONNX nor the model itself defines.
    """
    check_structure(model, name)
    check_operators(model, name)
    check_shapes(model, name)
    if weights:
        check_weights(model, name)


def check_structure(model: ir.Model, name: str) -> None:
    """Names are unique, every value that is read is defined, and definitions do not go round in circles."""
    graph = model.graph
    if not graph.outputs or len(graph) == 0:
        raise ModelError(f"{name}: the graph is empty")
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and version < OLDEST:
        raise ModelError(f"{name}: opset {version} is older than {OLDEST}; export again with opset {OLDEST} or later")
    if version is not None and version > NEWEST:
        raise ModelError(f"{name}: opset {version} is newer than {NEWEST}; export again with opset {NEWEST} or earlier")
    defined: dict[str, str] = {}
    for what, values in (
        ("input", graph.inputs),
        ("initializer", [v for v in graph.initializers.values() if not v.is_graph_input()]),
        ("result", [v for node in graph for v in node.outputs]),
    ):
        for value in values:
            if not value.name:
                continue
            if value.name in defined:
                raise ModelError(f"{name}: '{value.name}' is defined twice, as {defined[value.name]} and as {what}")
            defined[value.name] = what
    for value in graph.inputs:
        if value.type is None:
            raise ModelError(f"{name}: the graph input '{value.name}' has no type")
    for node in graph.all_nodes():
        if not node.outputs:
            raise ModelError(f"{name}: node {node.op_type} '{node.name or ''}' has no result")
        for read in node.inputs:
            if read is not None and not _defined(read):
                raise ModelError(f"{name}: {describe(node)} reads '{read.name}', which nothing defines")
    for value in graph.outputs:
        if not _defined(value):
            raise ModelError(f"{name}: the graph output '{value.name}' is computed by no node")
    if (cycle := find_cycle(graph)) is not None:
        raise ModelError(f"{name}: {describe(cycle)} depends on its own result")


def _defined(value: ir.Value) -> bool:
    if value.producer() is not None or value.is_graph_input():
        return True
    return value.is_initializer() and value.const_value is not None


def find_cycle(graph: ir.Graph) -> ir.Node | None:
    """A node on a cycle, or None."""
    state: dict[ir.Node, int] = {}  # 1: on the current path, 2: done
    for start in graph:
        if start in state:
            continue
        stack: list[tuple[ir.Node, Iterator[ir.Node]]] = [(start, _producers(start))]
        state[start] = 1
        while stack:
            node, producers = stack[-1]
            for producer in producers:
                if state.get(producer) == 1:
                    return producer
                if producer not in state:
                    state[producer] = 1
                    stack.append((producer, _producers(producer)))
                    break
            else:
                state[node] = 2
                stack.pop()
    return None


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes whose results ``node`` reads, those read inside its subgraphs included."""
    graph = node.graph
    inner = [
        n
        for attr in node.attributes.values()
        if attr.type == ir.AttributeType.GRAPH
        for n in attr.as_graph().all_nodes()
    ]
    for reader in (node, *inner):
        for value in reader.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph:
                yield producer


def describe(node: ir.Node) -> str:
    """``MatMul 'name' in encoder.layer.0`` for messages."""
    kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    label = node.name or (node.outputs[0].name if node.outputs else "") or "without a name"
    path = module_path(node)
    return f"{kind} '{label}'" + (f" in {path}" if path and path not in (label, node.op_type) else "")


def check_operators(model: ir.Model, name: str) -> None:
    """Every operator is one of ONNX's at the model's opset, or a function of the model."""
    import onnx.defs

    bodies: list[tuple[str, ir.Graph | ir.Function]] = [
        ("", model.graph),
        *((f"function {f.name}: ", f) for f in model.functions.values()),
    ]
    for where, body in bodies:
        versions = body.opset_imports if isinstance(body, ir.Function) else model.opset_imports
        for node in body.all_nodes():
            if node.op_identifier() in model.functions:
                continue
            domain = "" if node.domain == "ai.onnx" else node.domain
            version = versions.get(domain, versions.get("ai.onnx") if not domain else None)
            if version is None:
                if domain in ("", "ai.onnx.ml", "ai.onnx.preview.training"):
                    raise ModelError(f"{name}: {where}{describe(node)}: no opset of domain '{domain}' is imported")
                raise UnsupportedOperatorError(f"{name}: {where}{_unknown(node)}")
            if not onnx.defs.has(node.op_type, max_inclusive_version=version, domain=domain):
                raise UnsupportedOperatorError(f"{name}: {where}{_unknown(node, version)}")


def _unknown(node: ir.Node, version: int | None = None) -> str:
    if node.domain == "com.microsoft":
        hint = "the file went through ONNX Runtime's optimizer; use the file before it"
    elif not node.domain and version is not None:
        hint = f"ONNX has no such operator in opset {version}"
    else:
        hint = "give the model a function with its body, or export it from operators of ONNX"
    return f"operator {describe(node)} is unknown; {hint}"


_INFERENCE_MESSAGE = re.compile(r"\(op_type:(?P<op>[^,]*), node name: (?P<node>[^)]*)\): (?:\[\w+\] )?(?P<text>[^\n]*)")


def check_shapes(model: ir.Model, name: str) -> None:
    """Run ONNX's shape and type inference over the graph without its weights; ModelError at the first contradiction."""
    import onnx.shape_inference

    skeleton, originals = _skeleton(model)
    try:
        proto = ir.serde.serialize_model(skeleton)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{name}: a part of it has no valid ONNX form: {_one_line(cause)}") from error
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        found = _INFERENCE_MESSAGE.search(str(error))
        if found is None:
            raise ModelError(f"{name}: {_one_line(error)}") from error
        node = originals.get(found["node"].strip())
        if "(op_type:" in found["text"] and node is not None and node.op_identifier() not in model.functions:
            return  # ONNX stumbles over its own body of an operator, which says nothing about the model
        where = describe(node) if node is not None else f"{found['op']} '{found['node'].strip()}'"
        shapes = f" (inputs {_input_shapes(node)})" if node is not None else ""
        raise ModelError(f"{name}: {where}{shapes}: {found['text'].strip()}") from error
    except Exception as error:  # what ONNX's checks of attributes raise has no common class
        raise ModelError(f"{name}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _skeleton(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Node]]:
    """A copy whose larger weights are inputs of the same type and shape, and its node names -> nodes of ``model``."""
    copy = model.clone()
    originals: dict[str, ir.Node] = {}
    for index, (old, new) in enumerate(zip(model.graph.all_nodes(), copy.graph.all_nodes())):
        new.name = f"{index}"
        originals[new.name] = old
        for value in new.outputs:
            if not value.is_graph_output() or value.type is None:
                value.shape = None
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _SMALL:
            continue
        value.shape, value.type = ir.Shape([int(d) for d in tensor.shape]), ir.TensorType(tensor.dtype)  # type: ignore[arg-type]
        del copy.graph.initializers[value.name or ""]
        value.const_value = None
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy, originals


def _input_shapes(node: ir.Node) -> str:
    shapes = []
    for value in node.inputs:
        shape: ir.ShapeProtocol | None = value.shape if value is not None else None
        if shape is None and value is not None and value.const_value is not None:
            shape = value.const_value.shape
        shapes.append("?" if shape is None else "(" + ", ".join(str(d) for d in shape) + ")")
    return ", ".join(shapes)


def check_weights(model: ir.Model, name: str) -> None:
    """No weight holds NaN, and none holds infinity unless it is a mask (one number, or zeros and infinities)."""
    for label, tensor in tensors(model):
        if not tensor.dtype.is_floating_point():
            continue
        count, first, value, mask = _not_finite(tensor)
        if count and not (mask and not np.isnan(value)):
            index = [int(i) for i in np.unravel_index(first, tensor.shape.numpy())] if tensor.size > 1 else []
            what = "value is" if count == 1 else "values are"
            raise ModelError(f"{name}: weight '{label}': {count} {what} not finite, the first at {index} ({value})")


def tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor a model holds: initializers of the graph and its subgraphs, and tensor attributes."""
    graphs = [model.graph]
    for node in model.graph.all_nodes():
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.TENSOR:
                yield node.outputs[0].name or node.op_type, attr.as_tensor()
            elif attr.type == ir.AttributeType.GRAPH:
                graphs.append(attr.as_graph())
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.name or "", value.const_value


def _not_finite(tensor: ir.TensorProtocol) -> tuple[int, int, float, bool]:
    """How many elements are not finite, the flat index and value of the first, and whether the tensor can be a mask."""
    flat = tensor.numpy().reshape(-1)
    count, first, value, mask = 0, -1, 0.0, True
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        finite = np.isfinite(piece)
        if finite.all():
            mask = mask and not piece.any() if flat.size > 1 else mask
            continue
        with np.errstate(invalid="ignore"):
            bad = piece[~finite].astype(np.float64)
        worst = np.flatnonzero(np.isnan(bad))
        if count == 0 or (len(worst) and not np.isnan(value)):  # NaN is what a mask cannot excuse
            where = int(worst[0]) if len(worst) else 0
            first = start + int(np.flatnonzero(~finite)[where])
            value = float(bad[where])
        count += len(bad)
        mask = mask and (flat.size == 1 or not piece[finite].any())
    return count, first, value, mask
