"""Write quantization into the graph, explicitly: codes, scales and zero points become initializers.

    x @ w        ->   DequantizePerToken(QuantizePerToken(x)) @ DequantizeLinear(codes, scale, zero_point)
    experts      ->   ExpertMatMul(the same of x, DequantizeLinear(PickColumns(codes, ids), PickColumns(scale, ids) ...), ids)
    Conv(x, w)   ->   Conv(DequantizePerToken(QuantizePerSample(x)), Transpose(Reshape(DequantizeLinear(codes, ...))))

`weights` has the forms of weights that are no integers. What is quantized to which codes was decided before (formats,
solvers); this pass only rewrites. The result runs in stock ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError
from qcompile.formats import ActivationFormat, Format, Quantized
from qcompile.passes.domain import DOMAIN, add_functions
from qcompile.passes.graph import (
    add_initializer,
    constant,
    constant_shape,
    insert_before,
    is_op,
    remove_unused_initializers,
    replace,
    sole_use,
)
from qcompile.passes.sites import ConvSite, EmbeddingSite, ExpertSite, LinearSite, Site
from qcompile.passes.weights import write_stack, write_weight

CLIP = "qcompile.clip"
"""Metadata of a value: the share of a token's largest magnitude that its quantizer represents."""


def clip_of(x: ir.Value) -> float:
    """The clipping that a transformation has chosen for an activation; 1 for none."""
    return float(x.metadata_props.get(CLIP, "1"))


@dataclass
class Quantizer:
    """Rewrites sites of one model; quantized activations are shared by all readers of a value.

    Attributes:
        model: rewritten in place.
        static_scale: scale of each statically quantized activation, by value name.
    """

    model: ir.Model
    static_scale: dict[str, float] = field(default_factory=dict)
    _activations: dict[tuple[int, str], ir.Value] = field(default_factory=dict)
    _tables: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    _replaced: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def current(self, site: Site) -> Site:
        """``site`` with the input it has by now: products in front of it may have been rewritten."""
        return dataclasses.replace(site, x=self._replaced[site.x]) if site.x in self._replaced else site

    def linear(self, site: LinearSite, weight_format: Format, weight: Quantized, activation: ActivationFormat) -> None:
        """Quantize the weight of ``site`` and, if ``activation`` has bits, its input."""
        weight_value = self.weight(site, weight_format, weight)
        x = self.activation(site.x, activation, site.node) if activation.bits else site.x
        site.node.replace_input_with(0, x)
        site.node.replace_input_with(1, weight_value)

    def conv(self, site: ConvSite, weight_format: Format, weight: Quantized, activation: ActivationFormat) -> None:
        """Quantize the weight of a convolution, ``(K, N)`` as `ConvSite` has it, and, if ``activation`` has bits, its input.

        A dynamic activation has one scale per sample: a window reads many positions, so theirs must be the same.
        """
        matrix = self.weight(site, weight_format, weight)
        shape = constant_shape(site.weight)
        assert shape is not None
        rank = len(site.kernel)
        unfolded = np.array([*site.kernel, shape[1], shape[0]], np.int64)
        reshape = ir.node("Reshape", [matrix, add_initializer(self.model.graph, f"{matrix.name}.shape", unfolded)])
        order = [rank + 1, rank, *range(rank)]
        transpose = ir.node("Transpose", [reshape.outputs[0]], attributes={"perm": order})
        for node, name, extents in ((reshape, "unfolded", list(unfolded)), (transpose, "weight", list(shape))):
            out = node.outputs[0]
            out.name, out.type = f"{matrix.name}.{name}", ir.TensorType(ir.DataType.FLOAT)
            out.shape = ir.Shape([int(d) for d in extents])
        insert_before(site.node, [reshape, transpose])
        if activation.bits:
            site.node.replace_input_with(0, self.activation(site.x, activation, site.node, sample=True))
        site.node.replace_input_with(1, transpose.outputs[0])

    def experts(self, site: ExpertSite, weight_format: Format, weight: Quantized, activation: ActivationFormat) -> None:
        """Quantize the weight ``(K, E * N)`` of experts and, if ``activation`` has bits, their input, once per token."""
        graph, base = self.model.graph, site.weight.name or site.name
        nodes = write_stack(graph, base, site.name, weight_format, weight, site.experts, site.ids, site.weight)
        insert_before(site.node, nodes)
        x = self.activation(site.x, activation, site.node) if activation.bits else site.x
        attributes = {"n": site.shape[1] // site.experts, "repeat": site.repeat}
        inputs = [x, nodes[-1].outputs[0], site.ids]
        product = ir.node("ExpertMatMul", inputs, attributes=attributes, domain=DOMAIN, name=site.node.name)
        product.metadata_props.update(site.node.metadata_props)
        y, old, picked = product.outputs[0], site.node.outputs[0], site.node.inputs[1]
        if old.shape is not None:
            y.shape = ir.Shape([*old.shape[:-2], old.shape[-1]])
        y.type = old.type
        insert_before(site.node, [product])
        squeeze = sole_use(old)
        if squeeze is not None and _drops_rows(squeeze):
            last, name = squeeze.outputs[0], squeeze.outputs[0].name
            self._replaced[last] = self._replaced[old] = y
            replace(last, y)
            graph.remove([squeeze, site.node], safe=True)
            last.name, y.name = None, name
            _remove_unread(graph, picked)
            return
        y.name = f"{old.name}.rows"
        place = add_initializer(graph, f"{old.name}.place", np.array([-2], np.int64))
        widened = ir.node("Unsqueeze", [y, place], name=f"{site.node.name}.widened")
        widened.outputs[0].type, widened.outputs[0].shape = old.type, old.shape
        insert_before(site.node, [widened])
        name = old.name
        self._replaced[old] = widened.outputs[0]
        replace(old, widened.outputs[0])
        graph.remove(site.node, safe=True)
        old.name, widened.outputs[0].name = None, name
        _remove_unread(graph, picked)

    def weight(self, site: LinearSite | ConvSite, fmt: Format, weight: Quantized) -> ir.Value:
        """Insert codes, parameters and what makes floats of them; returns the float ``(K, N)`` value."""
        nodes = write_weight(self.model.graph, site.weight.name or site.name, site.name, fmt, weight, site.weight)
        insert_before(site.node, nodes)
        return nodes[-1].outputs[0]

    def activation(self, x: ir.Value, fmt: ActivationFormat, before: ir.Node, *, sample: bool = False) -> ir.Value:
        """Insert the quantizer and dequantizer of ``x``, or reuse those that exist; dynamic ones per token or per sample."""
        sample = sample and fmt.granularity == "token"
        key = (id(x), f"{fmt} per sample" if sample else str(fmt))
        if key in self._activations:
            return self._activations[key]
        if fmt.granularity == "token":
            nodes = self._dynamic(x, fmt.bits, sample)
        else:
            nodes = self._static(x, fmt.bits)
        producer = x.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, nodes)
        else:
            self.model.graph.insert_before(self.model.graph[0], nodes)
        out = nodes[-1].outputs[0]
        name = f"{x.name}.sample" if sample else x.name
        out.name, out.shape, out.type = f"{name}.dequantized", x.shape, ir.TensorType(ir.DataType.FLOAT)
        self._activations[key] = out
        return out

    def _dynamic(self, x: ir.Value, bits: int, sample: bool) -> list[ir.Node]:
        attributes: dict[str, int | float] = {"bits": bits}
        if (clip := clip_of(x)) != 1 and not sample:
            attributes["clip"] = clip
        operator, base = ("QuantizePerSample", f"{x.name}.sample") if sample else ("QuantizePerToken", x.name)
        quantize = ir.node(operator, [x], domain=DOMAIN, num_outputs=2, attributes=attributes, name=f"{base}.quantize")
        codes, scale = quantize.outputs
        codes.name, codes.shape, codes.type = f"{base}.codes", x.shape, ir.TensorType(ir.DataType.INT8)
        rows = None
        if x.shape is not None:
            rows = ir.Shape([x.shape[0], *[1] * (len(x.shape) - 1)] if sample else [*x.shape[:-1], 1])
        scale.name, scale.shape, scale.type = f"{base}.scale", rows, ir.TensorType(ir.DataType.FLOAT)
        return [quantize, ir.node("DequantizePerToken", [codes, scale], domain=DOMAIN, name=f"{base}.dequantize")]

    def _static(self, x: ir.Value, bits: int) -> list[ir.Node]:
        if bits != 8:
            raise FormatError(f"{x.name}: static activations have 8 bits, not {bits}; use int{bits}/token")
        if x.name not in self.static_scale:
            raise FormatError(f"{x.name}: static activations need calibration data; pass some, or use int8/token")
        scale = add_initializer(self.model.graph, f"{x.name}.scale", np.array(self.static_scale[x.name], np.float32))
        zero = add_initializer(self.model.graph, f"{x.name}.zero_point", np.array(0, np.int8))
        quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{x.name}.quantize")
        codes = quantize.outputs[0]
        codes.name, codes.shape, codes.type = f"{x.name}.codes", x.shape, ir.TensorType(ir.DataType.INT8)
        return [quantize, ir.node("DequantizeLinear", [codes, scale, zero], name=f"{x.name}.dequantize")]

    def embedding(self, site: EmbeddingSite, codes: np.ndarray, scale: np.ndarray) -> None:
        """Gather int8 rows ``(V, D)`` and their scales ``(V, 1)``, then dequantize the gathered rows only."""
        graph = self.model.graph
        base = site.table.name or site.name
        if base not in self._tables:
            self._tables[base] = (
                add_initializer(graph, f"{base}.codes", codes.astype(np.int8), like=site.table),
                add_initializer(graph, f"{base}.scale", scale.astype(np.float32).reshape(-1, 1)),
            )
        table, scales = self._tables[base]
        rows = ir.node("Gather", [table, site.ids], attributes={"axis": 0}, name=f"{site.node.name}.codes")
        steps = ir.node("Gather", [scales, site.ids], attributes={"axis": 0}, name=f"{site.node.name}.scale")
        dequantize = ir.node(
            "DequantizePerToken",
            [rows.outputs[0], steps.outputs[0]],
            domain=DOMAIN,
            name=f"{site.node.name}.dequantize",
        )
        old = site.node.outputs[0]
        lead = list(site.ids.shape) if site.ids.shape is not None else None
        for value, dtype, last in (
            (rows.outputs[0], ir.DataType.INT8, codes.shape[1]),
            (steps.outputs[0], ir.DataType.FLOAT, 1),
            (dequantize.outputs[0], ir.DataType.FLOAT, codes.shape[1]),
        ):
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([*lead, last]) if lead is not None else None
        rows.outputs[0].name, steps.outputs[0].name = f"{old.name}.rows.codes", f"{old.name}.rows.scale"
        name = old.name
        insert_before(site.node, [rows, steps, dequantize])
        replace(old, dequantize.outputs[0])
        graph.remove(site.node, safe=True)
        dequantize.outputs[0].name = name

    def finish(self) -> ir.Model:
        """Drop the float weights that nothing reads any more and add the function bodies."""
        remove_unused_initializers(self.model.graph)
        add_functions(self.model)
        return self.model


def _remove_unread(graph: ir.Graph, picked: ir.Value | None) -> None:
    """Remove the Gather of float matrices, which would keep all of them in the model, if nothing else reads it."""
    gather = picked.producer() if picked is not None else None
    if gather is not None and not gather.outputs[0].uses() and not gather.outputs[0].is_graph_output():
        graph.remove(gather, safe=True)


def _drops_rows(node: ir.Node) -> bool:
    """Whether it removes the last axis but one."""
    axes = constant(node.inputs[1]) if is_op(node, "Squeeze") and len(node.inputs) > 1 else None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return axes is not None and axes.size == 1 and shape is not None and int(axes.item()) % len(shape) == len(shape) - 2
