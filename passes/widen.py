"""Models whose weights are float16 or bfloat16 become float32 models; inputs and outputs keep their types.

Kernels, composites and quantizers take float32. Every number of half precision is one of float32, so that only one thing
changes: results in between are no longer rounded to half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.passes.validate import tensors

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NAME_A_TYPE = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def widen(model: ir.Model) -> str | None:
    """Make every float16 and bfloat16 of ``model`` a float32, in place, if a weight of two axes or more is one.

    Returns:
        The type those weights had, or None where nothing was done.
    """
    found = [tensor.dtype for _, tensor in tensors(model) if tensor.dtype in HALF and len(tensor.shape) > 1]
    if not found:
        return None
    graph = model.graph
    inputs = [value for value in graph.inputs if value.dtype in HALF and not value.is_initializer()]
    outputs = [(i, value, value.dtype) for i, value in enumerate(graph.outputs) if value.dtype in HALF]
    for value in _values(model):
        if value not in inputs:
            _retype(value)
    for body in _bodies(model):
        for node in body.all_nodes():
            for name, attr in list(node.attributes.items()):
                if attr.type == ir.AttributeType.TENSOR and attr.as_tensor().dtype in HALF:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attr.as_tensor()))
                elif attr.type == ir.AttributeType.INT and name in _NAME_A_TYPE and attr.as_int() in HALF:
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    first = next(iter(graph), None)
    for value in inputs:
        readers = list(value.uses())
        cast = _cast(value, ir.DataType.FLOAT)
        for reader, place in readers:
            reader.replace_input_with(place, cast.outputs[0])
        if first is None:
            graph.append(cast)
        else:
            graph.insert_before(first, cast)
    for index, value, dtype in outputs:
        if value in inputs:  # an input that is an output too
            continue
        cast = _cast(value, dtype)
        cast.outputs[0].name, value.name = value.name, cast.outputs[0].name
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]
    return found[0].name.lower()


def _bodies(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
    for body in _bodies(model):
        for node in body.all_nodes():
            yield from node.outputs


def _retype(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in HALF:
        value.const_value = _wide(value.const_value)
    kind = value.type
    while isinstance(kind, ir.SequenceType | ir.OptionalType):
        kind = kind.elem_type
    if kind is not None and kind.dtype in HALF:
        kind.dtype = ir.DataType.FLOAT


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(to)}, name=f"{value.name}.cast")
    cast.outputs[0].name = f"{value.name}.{to.name.lower()}"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(to)
    return cast
