"""Norms, gated products and activations, fused with the activation quantizer that reads them: kernel `Rowwise`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError
from qcompile.formats.hadamard import factors, hadamard_matrix
from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import add_initializer, attribute, constant, constant_shape, is_op, sole_use
from qcompile.passes.lower.kernel_ops import is_kernel, kernel_node, same_shape, take_over
from qcompile.passes.lower.linear import activation_name, merge_linears

Mixes = Callable[[int, tuple[int, int]], bool]
"""Whether kernels take a Kronecker product: width of the row, rows of its two matrices."""


def lower_rowwise(model: ir.Model, *, factors: bool = False, mixes: Mixes | None = None) -> None:
    """Turn every per-token quantizer and every last-axis norm into a `Rowwise`, merging the two where they meet.

    Args:
        model: changed in place.
        factors: also take in a multiplication by a constant vector before the rotation or the quantizer, and products
            with other matrices than Hadamard's.
        mixes: which of those products; all of them by default.
    """
    graph = model.graph
    for node in list(graph):
        if node.graph is None:
            continue
        if is_op(node, "QuantizePerToken", domain=DOMAIN) or static_scale(node) is not None:
            _quantizer(graph, node, factors, mixes)
    for node in list(graph):
        if node.graph is not None and (norm := _norm(node)) is not None:
            kind, inputs, attributes = norm
            row = kernel_node("Rowwise", inputs, [node.outputs[0], None, None], {"producer": kind, **attributes}, node)
            row.outputs[1].name = row.outputs[2].name = ""
            graph.insert_after(node, [row])
            take_over(node.outputs[0], row.outputs[0])
            graph.remove(node, safe=True)


def static_scale(node: ir.Node) -> ir.Value | None:
    """The scale of a QuantizeLinear to int8 with one constant scale and no zero point, else None."""
    if not is_op(node, "QuantizeLinear") or node.outputs[0].dtype != ir.DataType.INT8:
        return None
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or scale.size != 1 or (zero is not None and zero.any()):
        return None
    return node.inputs[1]


def _takes_codes(node: ir.Node) -> bool:
    """Whether it reads codes as its first input, and their scale as the second."""
    return is_kernel(node, "Linear") or is_kernel(node, "Experts")


def _bias_codes(graph: ir.Graph, codes: ir.Value) -> None:
    """Give kernels their codes as ``signed code + 128``, where something else reads the signed ones too."""
    readers = [(use.node, use.idx) for use in codes.uses() if _takes_codes(use.node)]
    producer = codes.producer()
    assert producer is not None
    bias = add_initializer(graph, "code.bias", np.array(128, np.int32))
    wide = ir.node("Cast", [codes], {"to": int(ir.DataType.INT32)})
    total = ir.node("Add", [wide.outputs[0], bias])
    byte = ir.node("Cast", [total.outputs[0]], {"to": int(ir.DataType.UINT8)})
    for node, name, dtype in (
        (wide, "wide", ir.DataType.INT32),
        (total, "sum", ir.DataType.INT32),
        (byte, "biased", ir.DataType.UINT8),
    ):
        value = node.outputs[0]
        value.name, value.shape, value.type = f"{codes.name}.{name}", codes.shape, ir.TensorType(dtype)
    graph.insert_after(producer, [wide, total, byte])
    for reader, index in readers:
        reader.replace_input_with(index, byte.outputs[0])


def _quantizer(graph: ir.Graph, quantize: ir.Node, factors: bool, mixes: Mixes | None) -> None:
    x, codes = quantize.inputs[0], quantize.outputs[0]
    assert x is not None
    readers = [use.node for use in codes.uses()]
    if not any(_takes_codes(node) for node in readers):
        return  # not before a kernel: it stays what it is
    static = static_scale(quantize)
    scales = [] if static is not None else [quantize.outputs[1]]
    if not all(_takes_codes(use.node) for value in (codes, *scales) for use in value.uses()):
        _bias_codes(graph, codes)
        return
    width = x.shape[-1] if x.shape is not None else None
    if not isinstance(width, int):
        _bias_codes(graph, codes)
        return
    bits = attribute(quantize, "bits", 8)
    producer = x.producer()
    kind = "identity"
    inputs: list[ir.Value | None] = [x]
    attributes: dict[str, object] = {}
    consumed: list[ir.Node] = []
    between: list[ir.Node] = []  # what lies between the row and its quantizer, last first
    factor: ir.Value | None = None
    order = _hadamard_order(producer) if sole_use(x) is quantize else 0
    mixing: list[ir.Value] = []
    if factors and not order and sole_use(x) is quantize:
        mixing = _mixing(producer, width, mixes)
    if order or mixing:
        assert producer is not None and producer.inputs[0] is not None
        between, x = [producer], producer.inputs[0]
        inputs, producer = [x], x.producer()
    if factors and sole_use(x) is [quantize, *between][-1] and (found := _scaled(producer, width)) is not None:
        assert producer is not None
        between.append(producer)
        x, factor = found
        inputs, producer = [x], x.producer()
    reader = [quantize, *between][-1]
    keep_float = False
    if producer is not None and (norm := _norm(producer)) is not None:
        kind, inputs, attributes = norm
        keep_float = len(x.uses()) > 1 or x.is_graph_output()
        consumed = [producer]
    elif producer is not None and sole_use(x) is reader and (gated := _gated(graph, producer)) is not None:
        kind, inputs, consumed = gated
    elif producer is not None and sole_use(x) is reader and (name := activation_name(producer)):
        kind, inputs, consumed = name, [producer.inputs[0]], [producer]
    attributes = {"bits": bits, "clip": attribute(quantize, "clip", 1.0), "hadamard": order, **attributes}
    row = kernel_node(
        "Rowwise",
        [*inputs, *[None] * (3 - len(inputs)), static, *([factor, *mixing] if factor is not None or mixing else [])],
        [x if keep_float else None, codes, scales[0] if scales else None],
        {"producer": kind, **attributes},
        like=producer if consumed else quantize,
    )
    row.outputs[1].type = ir.TensorType(ir.DataType.UINT8)
    if static is not None:
        row.outputs[2].type = ir.TensorType(ir.DataType.FLOAT)
        row.outputs[2].shape = ir.Shape([*x.shape[:-1], 1]) if x.shape is not None else None
        row.outputs[2].name = f"{codes.name}.scale"
        for use in list(codes.uses()):
            use.node.replace_input_with(1, row.outputs[2])
    anchor = consumed[0] if consumed else reader
    graph.insert_after(anchor, [row])
    if keep_float:
        # The quantizer itself reads x: detach it first, so that only the other readers move to the fused output.
        take_over(codes, row.outputs[1])
        if scales:
            take_over(scales[0], row.outputs[2])
        for node in (quantize, *between):
            graph.remove(node, safe=True)
        take_over(x, row.outputs[0])
    else:
        row.outputs[0].name = ""
        take_over(codes, row.outputs[1])
        if scales:
            take_over(scales[0], row.outputs[2])
        for node in (quantize, *between):
            graph.remove(node, safe=True)
    for node in consumed:
        graph.remove(node, safe=True)


def _scaled(node: ir.Node | None, width: int) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a product of a row and a constant vector: ``x`` and ``(width,)``."""
    if node is None or not is_op(node, "Mul"):
        return None
    for x, vector in (node.inputs, node.inputs[::-1]):
        if x is None or vector is None or constant_shape(vector) != (width,) or x.shape is None:
            continue
        if len(x.shape) > 1 and x.shape[-1] == width:
            return x, vector
    return None


def _mixing(node: ir.Node | None, width: int, mixes: Mixes | None) -> list[ir.Value]:
    """The two constant matrices of a Kronecker product over blocks of a row, or none."""
    if node is None or not is_op(node, "Kronecker", domain=DOMAIN):
        return []
    matrices = [v for v in node.inputs[1:] if v is not None]
    shapes = [constant_shape(v) for v in matrices]
    if len(shapes) != 2 or any(s is None or len(s) != 2 or s[0] != s[1] for s in shapes):
        return []
    sizes = shapes[0][0], shapes[1][0]  # type: ignore[index]
    if width % (sizes[0] * sizes[1]):
        return []
    return matrices if mixes is None or mixes(width, sizes) else []


def _hadamard_order(node: ir.Node | None) -> int:
    """Order of the blocks if ``node`` rotates by the Hadamard matrix that the kernels know, else 0."""
    if node is None or not is_op(node, "BlockRotate", "Kronecker", domain=DOMAIN):
        return 0
    matrices = [constant(v) for v in node.inputs[1:]]
    if not all(m is not None and _is_hadamard(m) for m in matrices):
        return 0
    orders = [len(m) for m in matrices if m is not None]
    if len(orders) == 1:
        return orders[0]
    # The product is the known matrix only if what is not a power of two lies in its left factor.
    left, right = orders
    return left * right if factors(right)[0] == 1 and factors(left)[0] == factors(left * right)[0] else 0


def _is_hadamard(matrix: np.ndarray) -> bool:
    if matrix.ndim != 2:
        return False
    try:
        known = hadamard_matrix(len(matrix))
    except FormatError:
        return False
    return np.array_equal(matrix, known.astype(matrix.dtype))


def _norm(node: ir.Node) -> tuple[str, list[ir.Value | None], dict[str, object]] | None:
    """Kind, inputs and attributes of a norm over the last axis with constant gamma (and beta)."""
    kinds = {"LayerNormalization": "layernorm", "RMSNormalization": "rmsnorm"}
    if node.domain not in ("", "ai.onnx") or node.op_type not in kinds:
        return None
    x, gamma = node.inputs[0], node.inputs[1]
    beta = node.inputs[2] if len(node.inputs) > 2 else None
    if x is None or x.shape is None or any(v is not None and v.uses() for v in node.outputs[1:]):
        return None
    axis, rank = int(attribute(node, "axis", -1)), len(x.shape)  # type: ignore[call-overload]
    width = x.shape[-1]
    shape = constant_shape(gamma)
    if axis not in (-1, rank - 1) or not isinstance(width, int) or shape != (width,):
        return None
    if beta is not None and constant_shape(beta) != (width,):
        return None
    return kinds[node.op_type], [x, gamma, beta], {"epsilon": float(attribute(node, "epsilon", 1e-5))}  # type: ignore[arg-type]


def _gated(graph: ir.Graph, product: ir.Node) -> tuple[str, list[ir.Value | None], list[ir.Node]] | None:
    """Match ``act(gate) * up`` of the halves of a row, or of two parallel Linears, which are merged: a row [gate | up]."""
    if not is_op(product, "Mul"):
        return None
    for side in (0, 1):
        gate_out, up = product.inputs[side], product.inputs[1 - side]
        if gate_out is None or up is None or not same_shape(gate_out, up):
            continue
        match = _gate(gate_out)
        if match is None:
            continue
        kind, gate, nodes = match
        if (whole := _halves(gate, up)) is not None and sole_use(up) is product:
            return kind, [whole], [product, *nodes, gate.producer()]  # type: ignore[list-item]
        if not is_kernel(gate.producer(), "Linear") or not is_kernel(up.producer(), "Linear"):
            continue
        if sole_use(up) is not product or gate is up:
            continue
        linears = [gate.producer(), up.producer()]
        merged = merge_linears(graph, linears)  # type: ignore[arg-type]
        if merged is None:
            continue
        return kind, [merged], [product, *nodes, *linears]  # type: ignore[list-item]
    return None


def _halves(first: ir.Value, second: ir.Value) -> ir.Value | None:
    """The value whose last axis a Split cuts into these two."""
    node = first.producer()
    if not is_op(node, "Split") or node is None or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    axis, rank = int(attribute(node, "axis", 0)), len(node.inputs[0].shape)  # type: ignore[call-overload]
    if len(node.outputs) != 2 or list(node.outputs) != [first, second] or axis not in (-1, rank - 1):
        return None
    return node.inputs[0] if same_shape(first, second) else None


def _gate(value: ir.Value) -> tuple[str, ir.Value, list[ir.Node]] | None:
    """Match ``silu(g)``, spelled Swish or g * sigmoid(g), or ``gelu(g)``; returns kind, g and the nodes, last first."""
    node = value.producer()
    if node is None or sole_use(value) is None:
        return None
    kinds = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
    if (name := activation_name(node)) in kinds:
        source = node.inputs[0]
        return (kinds[name], source, [node]) if source is not None and sole_use(source) is node else None
    if is_kernel(node, "Linear") and attribute(node, "epilogue") in kinds:
        return None
    if is_op(node, "Mul"):
        for side in (0, 1):
            source, gated = node.inputs[side], node.inputs[1 - side]
            sigmoid = gated.producer() if gated is not None else None
            if not is_op(sigmoid, "Sigmoid") or sigmoid is None or source is None or sigmoid.inputs[0] is not source:
                continue
            if {use.node for use in source.uses()} == {node, sigmoid} and gated is not None and sole_use(gated) is node:
                return "swiglu", source, [node, sigmoid]
    return None
