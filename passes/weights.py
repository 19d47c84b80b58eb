"""How a quantized weight matrix is written into the graph, and how it is recognised there again.

    integers, ternary, fixed point    DequantizeLinear(codes, scale, zero_point)
    dual-grained integers             DequantizeLinear(codes, Mul(group_scale, scale))
    tables of levels                  DequantizeTable(codes, table, scale)
    NVFP4                             DequantizeTable(codes, table, Mul(scale, tensor_scale))
    scaled bit planes                 DequantizePlanes(codes, scale, offset)
    super-blocks                      DequantizeSuperBlocks(codes, block_scale, super_scale, block_offset, super_offset)

Of experts these are picked first: PickColumns(codes, ids) in place of codes, and so on.

The operators that are not ONNX's own are functions of the domain `qcompile`, so that ONNX Runtime runs all of them. Codes
are ``(K, N)``, scales ``(G, N)``, those of planes ``(P, G, N)``, with a group of ``block_size`` consecutive k per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError
from qcompile.formats import (
    BitPlane,
    Codebook,
    DualInt4,
    FixedPoint,
    Format,
    IntFormat,
    NvFp4,
    Quantized,
    SuperBlock,
    Ternary,
    parse_format,
)
from qcompile.formats.levels import LevelFormat
from qcompile.formats.superblock import SUPER
from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import add_initializer, attribute, constant, constant_shape, is_op

TRUE_BITS = "qcompile.bits"
FORMAT = "qcompile.format"
SITE = "qcompile.site"

DEQUANTIZERS = ("DequantizeTable", "DequantizePlanes", "DequantizeSuperBlocks")
"""Functions of the domain `qcompile` that make weights."""

SUPER_BLOCKS = ("block_scale", "super_scale", "block_offset", "super_offset")
"""Operands of `DequantizeSuperBlocks` after the codes. Offsets are 0 in formats without them."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The constant operand of a quantized MatMul.

    Attributes:
        codes, scale, zero_point: as in `qcompile.formats.Quantized`; where blocks have scales of two levels (NVFP4,
            super-blocks), ``scale`` is that of blocks alone.
        format: as it is spelled.
        aux: the further parameters of the format, by name.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    format: str
    aux: dict[str, ir.Value] = field(default_factory=dict)


# Writing


def write_weight(
    graph: ir.Graph,
    base: str,
    site: str,
    fmt: Format,
    weight: Quantized,
    like: ir.Value | None = None,
    narrow: bool = True,
) -> list[ir.Node]:
    """Add the initializers of a weight to ``graph``; returns the nodes that make the float matrix, to be inserted.

    Args:
        graph: receives codes and parameters.
        base: what their names begin with.
        site: of the operator that reads the weight.
        fmt, weight: what the codes are.
        like: the float weight, whose metadata the codes keep.
        narrow: use ONNX's 4-bit types where codes fit.

    Raises:
        FormatError: there is no form for ``fmt``.
    """
    width = fmt.bits if narrow else 8
    codes = add_initializer(graph, f"{base}.codes", integer_tensor(weight.codes, width), like=like)
    codes.metadata_props.update({TRUE_BITS: str(fmt.bits), FORMAT: str(fmt), SITE: site})
    copy = (codes.name or "").removeprefix(f"{base}.codes")  # of a weight that several operators read
    k, n = weight.codes.shape
    nodes: list[ir.Node] = []

    def add(name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        return add_initializer(graph, f"{base}.{name}", array)

    def floats(name: str, array: np.ndarray) -> ir.Value:
        return add(name, np.ascontiguousarray(array, np.float32))

    def nested(groups: ir.Value, whole: ir.Value, count: int) -> ir.Value:
        """Scales of groups times one per column."""
        product = ir.node("Mul", [groups, whole], name=f"{base}.scales{copy}")
        product.outputs[0].name, product.outputs[0].type = f"{base}.scales{copy}", ir.TensorType(ir.DataType.FLOAT)
        product.outputs[0].shape = ir.Shape([count, n])
        nodes.append(product)
        return product.outputs[0]

    block = {"block_size": fmt.group_length(k)}
    if isinstance(fmt, IntFormat | Ternary | FixedPoint):
        channel = fmt.group == 0
        inputs = [codes, floats("scale", weight.scale[0] if channel else weight.scale)]
        if weight.zero_point is not None:
            zero = (weight.zero_point[0] if channel else weight.zero_point).astype(np.uint8)
            inputs.append(add("zero_point", integer_tensor(zero, width)))
        where: dict[str, int] = {"axis": 1} if channel else {"axis": 0, **block}
        nodes.append(ir.node("DequantizeLinear", inputs, attributes=where))
    elif isinstance(fmt, DualInt4):
        scale, groups = floats("scale", weight.scale), weight.aux["group_scale"]
        steps = nested(floats("group_scale", groups), scale, len(groups))
        nodes.append(ir.node("DequantizeLinear", [codes, steps], attributes={"axis": 0, **block}))
    elif isinstance(fmt, LevelFormat | Codebook):
        table = floats("table", fmt.table if isinstance(fmt, LevelFormat) else weight.aux["codebook"])
        if isinstance(fmt, NvFp4):
            whole = np.broadcast_to(np.float32(weight.aux["tensor_scale"]), (1, n))
            inside = floats("scale", weight.scale / whole)
            scale = nested(inside, floats("tensor_scale", whole), len(weight.scale))
        else:
            scale = floats("scale", weight.scale)
        nodes.append(ir.node("DequantizeTable", [codes, table, scale], domain=DOMAIN, attributes=block))
    elif isinstance(fmt, BitPlane):
        parameters = [floats("scale", weight.scale), floats("offset", weight.aux["offset"])]
        nodes.append(ir.node("DequantizePlanes", [codes, *parameters], domain=DOMAIN, attributes=block))
    elif isinstance(fmt, SuperBlock):
        parts = fmt.parts(weight)
        if fmt.symmetric:
            parts |= {name: np.zeros_like(parts[name.replace("offset", "scale")]) for name in SUPER_BLOCKS[2:]}
        parameters = [floats(name, parts[name]) for name in SUPER_BLOCKS]
        sizes = {**block, "super_size": SUPER}
        nodes.append(ir.node("DequantizeSuperBlocks", [codes, *parameters], domain=DOMAIN, attributes=sizes))
    else:
        raise FormatError(f"{site}: there is no ONNX form of {fmt}; choose another format")
    nodes[-1].name = f"{base}.dequantize{copy}"
    out = nodes[-1].outputs[0]
    out.name, out.shape, out.type = f"{base}.dequantized{copy}", ir.Shape([k, n]), ir.TensorType(ir.DataType.FLOAT)
    return nodes


def write_stack(
    graph: ir.Graph,
    base: str,
    site: str,
    fmt: Format,
    weight: Quantized,
    experts: int,
    ids: ir.Value,
    like: ir.Value | None = None,
) -> list[ir.Node]:
    """The same of the matrices of experts, side by side in ``weight``: ``ids`` pick some, and only these become floats.

    Initializers are ``(..., experts, N)``, codes ``(K, experts, N)``. ONNX's Gather takes no 4-bit types, so codes take a
    byte each here. The result is ``(K, ids * N)``.
    """
    nodes = write_weight(graph, base, site, fmt, weight, like, narrow=False)
    columns = weight.codes.shape[1]
    picked: dict[ir.Value, ir.Node] = {}
    for node in nodes:
        node.outputs[0].shape = None
        for index, value in enumerate(node.inputs):
            shape = constant_shape(value)
            if value is None or shape is None or (node.op_type == "DequantizeTable" and index == 1):
                continue
            assert shape[-1] == columns and value.const_value is not None
            if value not in picked:
                stack = value.const_value.numpy().reshape(*shape[:-1], experts, columns // experts)
                value.const_value = ir.Tensor(stack, dtype=value.const_value.dtype, name=value.name)
                value.shape = ir.Shape(stack.shape)
                pick = ir.node("PickColumns", [value, ids], domain=DOMAIN, name=f"{value.name}.pick")
                pick.outputs[0].name, pick.outputs[0].type = f"{value.name}.picked", value.type
                picked[value] = pick
            node.replace_input_with(index, picked[value].outputs[0])
    return [*picked.values(), *nodes]


def integer_tensor(codes: np.ndarray, bits: int) -> ir.TensorProtocol:
    """Wrap codes in the narrowest ONNX integer type of opset 23 that holds ``bits`` bits: 4 or 8.

    INT2 exists from opset 25 on, but ONNX Runtime 1.32 computes wrong results with it; the stored artifact packs
    the true width anyway (see `qcompile.formats.layout`).
    """
    signed = codes.dtype.kind == "i"
    storage = 4 if bits <= 4 else 8
    types = {
        (8, True): ir.DataType.INT8,
        (8, False): ir.DataType.UINT8,
        (4, True): ir.DataType.INT4,
        (4, False): ir.DataType.UINT4,
    }
    dtype = types[storage, signed]
    return ir.Tensor(codes.astype(dtype.numpy()), dtype=dtype)


# Recognising


def quantized_weight(value: ir.Value | None) -> QuantizedWeight | None:
    """The constant codes behind ``value``, as written by `write_weight` or `write_stack`, or DequantizeLinear of others."""
    node = value.producer() if value is not None else None
    if is_op(node, *DEQUANTIZERS, domain=DOMAIN):
        assert node is not None
        return _of_domain(node)
    if not is_op(node, "DequantizeLinear"):
        return None
    assert node is not None
    codes, scale = _stored(node.inputs[0]), _stored(node.inputs[1])
    zero = _stored(node.inputs[2]) if len(node.inputs) > 2 else None
    shape = constant_shape(codes)
    picked = codes is not node.inputs[0]
    if codes is None or scale is None or shape is None or len(shape) != 2 + picked:
        return None
    spelling = codes.metadata_props.get(FORMAT)
    if spelling is not None and (factors := _nested(scale)) is not None:
        return QuantizedWeight(codes, factors[1], None, spelling, {"group_scale": factors[0]})
    scale_shape = constant_shape(scale)
    if scale_shape is None or (zero is not None and constant_shape(zero) is None):
        return None
    if spelling is None:
        spelling = _infer_format(node, codes, zero, scale_shape)
    return None if spelling is None else QuantizedWeight(codes, scale, zero, spelling)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The stack from which experts are picked; any other value itself."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if is_op(node, "PickColumns", domain=DOMAIN) and node is not None else value


def _of_domain(node: ir.Node) -> QuantizedWeight | None:
    codes, second, third, *more = map(_stored, node.inputs)
    assert codes is not None and second is not None and third is not None
    spelling = codes.metadata_props.get(FORMAT)
    if spelling is None or constant_shape(codes) is None:
        return None
    fmt = parse_format(spelling)
    if isinstance(fmt, SuperBlock):
        used = list(zip(SUPER_BLOCKS, (second, third, *more)))[: 2 if fmt.symmetric else 4]
        return QuantizedWeight(codes, second, None, spelling, {name: v for name, v in used[1:] if v is not None})
    if node.op_type == "DequantizePlanes":
        return QuantizedWeight(codes, second, None, spelling, {"offset": third})
    if (factors := _nested(third)) is not None:
        return QuantizedWeight(codes, factors[0], None, spelling, {"tensor_scale": factors[1]})
    aux = {"codebook": second} if isinstance(fmt, Codebook) else {}
    return QuantizedWeight(codes, third, None, spelling, aux)


def _nested(scale: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Constant factors of a scale: of groups, and of columns."""
    node = scale.producer()
    if not is_op(node, "Mul"):
        return None
    assert node is not None
    groups, whole = map(_stored, node.inputs)
    if groups is None or whole is None or constant_shape(groups) is None or constant_shape(whole) is None:
        return None
    return groups, whole


def _infer_format(node: ir.Node, codes: ir.Value, zero: ir.Value | None, scale_shape: tuple[int, ...]) -> str | None:
    assert codes.dtype is not None
    widths = {ir.DataType.INT8: 8, ir.DataType.UINT8: 8, ir.DataType.INT4: 4, ir.DataType.UINT4: 4}
    if codes.dtype not in widths:
        return None
    signed = codes.dtype in (ir.DataType.INT8, ir.DataType.INT4)
    block, axis = int(attribute(node, "block_size", 0)), int(attribute(node, "axis", 1))  # type: ignore[call-overload]
    if block and axis not in (0, -2):
        return None
    if not block and not (len(scale_shape) == 1 and axis in (1, -1)):
        return None
    zeros = constant(zero) if zero is not None else None
    if signed and zeros is not None and np.any(zeros.astype(np.int32) != 0):
        return None  # a signed asymmetric format has no spelling; the dequantized float path takes it
    return str(IntFormat(widths[codes.dtype], block, signed))
