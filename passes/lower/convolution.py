"""Quantized convolutions become kernel `Quantize` and `Conv`, which keep channels last.

    y[n, o, m] = sum over t, c of x[n, o * stride + t * dilation - pad, c] w[t, c, m]

With channels last, a convolution without groups is a matrix product over unfolded rows, whose weight ``(K, N)`` is the one
`quantize` wrote (kernel positions outermost). The layout changes are explicit Transposes here; `layout` removes those it can.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes.domain import DOMAIN
from qcompile.passes.graph import attribute, constant_shape, is_op, module_path, sole_use
from qcompile.passes.lower.kernel_ops import kernel_node, take_over
from qcompile.passes.lower.linear import AUX, activation_name, operand
from qcompile.passes.lower.rowwise import static_scale
from qcompile.passes.weights import SITE, QuantizedWeight, quantized_weight

GEOMETRY = ("strides", "pads", "dilations", "auto_pad", "group")


def lower_convolutions(model: ir.Model) -> None:
    """Replace every Conv whose weight is quantized."""
    quantized: dict[int, tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        if is_op(node, "Conv") and (weight := _weight(node.inputs[1])) is not None:
            _lower(model.graph, node, weight, quantized)


def _weight(value: ir.Value | None) -> QuantizedWeight | None:
    """The codes ``(K, N)`` behind ``Transpose(Reshape(weight))``, as written by `quantize`."""
    transpose = value.producer() if value is not None else None
    if not is_op(transpose, "Transpose"):
        return None
    assert transpose is not None and transpose.inputs[0] is not None
    rank = len(attribute(transpose, "perm", ())) - 2  # type: ignore[arg-type]
    if list(attribute(transpose, "perm", ())) != [rank + 1, rank, *range(rank)]:  # type: ignore[call-overload]
        return None
    reshape = transpose.inputs[0].producer()
    if not is_op(reshape, "Reshape"):
        return None
    assert reshape is not None
    found = quantized_weight(reshape.inputs[0])
    outer, shape = transpose.inputs[0].shape, constant_shape(found.codes) if found is not None else None
    if outer is None or shape is None or outer[-1] != shape[1]:
        return None
    return found


def _activation(x: ir.Value) -> tuple[ir.Node, str] | None:
    """The quantizer behind a dequantized activation and its format, if kernels can take its codes."""
    node = x.producer()
    source = node.inputs[0].producer() if node is not None and node.inputs[0] is not None else None
    if is_op(node, "DequantizePerToken", domain=DOMAIN) and is_op(source, "QuantizePerSample", domain=DOMAIN):
        assert node is not None and source is not None
        if node.inputs[1] is source.outputs[1]:
            return source, f"int{attribute(source, 'bits', 8)}/token"
    if is_op(node, "DequantizeLinear") and source is not None and static_scale(source) is not None:
        assert node is not None
        if list(source.inputs[1:]) == list(node.inputs[1:]):
            return source, "int8/tensor"
    return None


def channels_last(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """``value`` as ``(batch, *spatial, channels)``, by a Transpose."""
    assert value.shape is not None
    rank = len(value.shape)
    perm = [0, *range(2, rank), 1]
    node = ir.node("Transpose", [value], attributes={"perm": perm})
    out = node.outputs[0]
    out.name, out.type = f"{value.name}.last.{before.name or before.outputs[0].name}", value.type
    out.shape = ir.Shape([value.shape[i] for i in perm])
    graph.insert_before(before, [node])
    return out


def _quantized(
    graph: ir.Graph, quantizer: ir.Node, conv: ir.Node, done: dict[int, tuple[ir.Value, ir.Value]]
) -> tuple[ir.Value, ir.Value]:
    """Codes ``(batch, *spatial, channels)`` and scale ``(batch,)`` of the quantizer's input; made once for all readers."""
    if id(quantizer) not in done:
        x = quantizer.inputs[0]
        assert x is not None and x.shape is not None
        static = static_scale(quantizer)
        last = channels_last(graph, x, quantizer)
        attributes: dict[str, object] = {"bits": attribute(quantizer, "bits", 8)}
        node = kernel_node("Quantize", [last, static], [None, None], attributes, like=quantizer)
        codes, scale = node.outputs
        codes.name, codes.shape, codes.type = f"{last.name}.codes", last.shape, ir.TensorType(ir.DataType.UINT8)
        scale.name, scale.type = f"{last.name}.scale", ir.TensorType(ir.DataType.FLOAT)
        scale.shape = ir.Shape([x.shape[0]])
        graph.insert_before(quantizer, [node])
        done[id(quantizer)] = codes, scale
    return done[id(quantizer)]


def _lower(
    graph: ir.Graph, conv: ir.Node, weight: QuantizedWeight, quantized: dict[int, tuple[ir.Value, ir.Value]]
) -> None:
    x = conv.inputs[0]
    assert x is not None
    shape, kernel = constant_shape(weight.codes), conv.inputs[1].shape  # type: ignore[union-attr]
    y = conv.outputs[0]
    extents = y.shape
    if shape is None or kernel is None or not kernel.is_static() or x.shape is None or extents is None:
        return
    found = _activation(x)
    if found is not None:
        codes, scale = _quantized(graph, found[0], conv, quantized)
    else:
        codes, scale = channels_last(graph, x, conv), None
    fused = [conv]
    epilogue = ""
    if (after := sole_use(y)) is not None and (name := activation_name(after)):
        epilogue, y = name, after.outputs[0]
        fused.append(after)
    node = kernel_node(
        "Conv",
        [
            *(codes, scale, weight.codes, weight.scale, weight.zero_point, operand(conv, 2)),
            *((None, *weight.aux.values()) if weight.aux else ()),
        ],
        [None],
        {
            **({AUX: list(weight.aux)} if weight.aux else {}),
            **{key: attribute(conv, key) for key in GEOMETRY if key in conv.attributes},
            "kernel_shape": list(kernel.numpy()[2:]),
            "weight_format": weight.format,
            "activation_format": found[1] if found is not None else "none",
            "epilogue": epilogue,
            "k": shape[0],
            "n": shape[1],
            "parts": [shape[1]],
            "weights": [weight.codes.name],
            "sites": [weight.codes.metadata_props.get(SITE) or module_path(conv)],
        },
        like=conv,
    )
    rank = len(extents)
    perm = [0, rank - 1, *range(1, rank - 1)]
    back = ir.node("Transpose", [node.outputs[0]], attributes={"perm": perm})
    last = node.outputs[0]
    last.name, last.type = f"{y.name}.last", ir.TensorType(ir.DataType.FLOAT)
    last.shape = ir.Shape([extents[0], *extents[2:], extents[1]])
    back.outputs[0].shape, back.outputs[0].type = extents, y.type
    graph.insert_after(fused[-1], [node, back])
    take_over(y, back.outputs[0])
    for old in reversed(fused):
        graph.remove(old, safe=True)
