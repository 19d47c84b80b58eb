"""What the ONNX specification itself says about an operator: the types of its outputs, and its body if it is a function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context


@lru_cache(maxsize=4096)
def schema(domain: str, op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """The schema of an operator in an opset version; ``None`` if there is none."""
    try:
        return onnx.defs.get_schema(op_type, version, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None


def output_dtypes(ctx: Context, node: ir.Node) -> list[ir.DataType | None]:
    """The element type of every output where the schema determines it, else ``None``."""
    spec = schema(node.domain, node.op_type, ctx.version(node))
    if spec is None:
        return [v.dtype for v in node.outputs]
    bound: dict[str, ir.DataType] = {}
    for i, value in enumerate(node.inputs):
        if value is not None and spec.inputs:
            formal = spec.inputs[min(i, len(spec.inputs) - 1)]
            bound.setdefault(formal.type_str, ctx.dtype(value))
    return [
        _output_dtype(node, spec, spec.outputs[min(i, len(spec.outputs) - 1)].type_str, bound)
        for i in range(len(node.outputs))
    ]


def _output_dtype(
    node: ir.Node, spec: onnx.defs.OpSchema, type_str: str, bound: dict[str, ir.DataType]
) -> ir.DataType | None:
    for name in ("to", "output_dtype", "dtype"):
        value = attr(node, name, 0)
        if isinstance(value, int) and value:
            return ir.DataType(value)
    if type_str in bound:
        return bound[type_str]
    if "value" in node.attributes and node.attributes["value"].type == ir.AttributeType.TENSOR:
        return attr(node, "value").dtype
    if type_str.startswith("tensor(") and type_str[7:-1].upper() in ir.DataType.__members__:
        return ir.DataType[type_str[7:-1].upper()]
    return None


def default_attributes(ctx: Context, node: ir.Node) -> dict[str, ir.Attr]:
    """The attributes the specification gives a default."""
    spec = schema(node.domain, node.op_type, ctx.version(node))
    if spec is None:
        return {}
    found = {name: a.default_value for name, a in spec.attributes.items()}
    return {
        name: ir.serde.deserialize_attribute(proto) for name, proto in found.items() if proto is not None and proto.name
    }


def specified_function(ctx: Context, node: ir.Node) -> ir.Function | None:
    """The operator's body as the specification defines it, for the opset in use; ``None`` if it is not a function."""
    version = ctx.version(node)
    spec: Any = schema(node.domain, node.op_type, version)  # onnx's stubs lack the functions of a schema
    if spec is None:
        return None
    proto = None
    if spec.has_function:
        usable = [v for v in spec.function_opset_versions if v <= version]
        if usable:
            proto = spec.get_function_with_opset_version(max(usable))
    if not proto and spec.has_context_dependent_function:
        usable = [v for v in spec.context_dependent_function_opset_versions if v <= version]
        if usable:
            types = [_type_proto(ctx, v).SerializeToString() for v in node.inputs]
            serialized = _node_proto(node).SerializeToString()
            proto = spec.get_context_dependent_function_with_opset_version(max(usable), serialized, types)
    if not proto:
        return None
    function_proto = onnx.FunctionProto()
    function_proto.ParseFromString(proto)
    made = {*function_proto.input, *(name for n in function_proto.node for name in n.output)}
    outputs = [name for name in function_proto.output if name in made]  # bodies for fewer outputs still list them all
    del function_proto.output[:]
    function_proto.output.extend(outputs)
    return ir.serde.deserialize_function(function_proto)


def _node_proto(node: ir.Node) -> onnx.NodeProto:
    proto = ir.to_proto(node)
    del proto.input[:]
    proto.input.extend("" if v is None else (v.name or f"i{i}") for i, v in enumerate(node.inputs))
    return proto


def _type_proto(ctx: Context, value: ir.Value | None) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if value is None:
        return proto
    known = ctx.known(value)
    proto.tensor_type.elem_type = int(known.dtype)
    shape: list[Any] = []
    if known.expr is not None:
        shape = ctx.shape(known.expr)
    elif known.is_constant():
        shape = list(ctx.constant(value).shape)
    elif known.symbolic is not None:
        shape = list(known.symbolic.shape)
    proto.tensor_type.shape.SetInParent()
    for d in shape:
        dim = proto.tensor_type.shape.dim.add()
        if isinstance(d, int):
            dim.dim_value = d
        else:
            dim.dim_param = str(d)
    return proto
