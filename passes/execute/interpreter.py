"""Run an ``onnx_ir`` graph with torch tensors, in any float type, with gradients if the tensors ask for them.

ONNX Runtime is the reference for what a model computes in float32. It has few kernels for float64 and none that can be
differentiated; the proofs (`qcompile.passes.spaces.prove`) and the learned transformations need both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import UnsupportedOperatorError

Tensor = Any
"""torch.Tensor; torch is imported when an interpreter runs, so that importing this module stays cheap."""


def run(
    model: ir.Model,
    inputs: Mapping[str, np.ndarray | Tensor],
    outputs: list[str] | None = None,
    *,
    dtype: str = "float64",
    constants: Mapping[str, Tensor] | None = None,
    compute: Callable[[ir.Node, list[Tensor]], Tensor | None] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Execute ``model``.

    Args:
        model: the graph; nodes must be in topological order.
        inputs: tensors by name, of graph inputs or of inner values, where execution then starts.
        outputs: names of the values to return (any value of the graph); the graph's outputs by default.
        dtype: torch name of the type that replaces all floating point types.
        constants: tensors that replace initializers, such as parameters to learn.
        compute: called with every node and its arguments; what it returns is taken for the node's result (simulated
            rounding), None means to compute it as usual.
        device: where to compute.

    Raises:
        UnsupportedOperatorError: an operator is not implemented here.
    """
    import torch

    float_type = getattr(torch, dtype)
    wanted = [v.name or "" for v in model.graph.outputs] if outputs is None else outputs
    env: dict[str, Tensor] = {}
    for name, array in inputs.items():
        env[name] = _tensor(array, float_type, device)
    given = constants or {}
    initializers = model.graph.initializers

    def lookup(value: ir.Value | None) -> Tensor | None:
        if value is None:
            return None
        name = value.name or ""
        if name in env:
            return env[name]
        if name in given:
            return given[name]
        if name in initializers:
            # Not kept: a large model's weights need not be in memory together.
            return _tensor(initializers[name].const_value.numpy(), float_type, device)
        raise KeyError(f"value {name!r} has not been computed")

    nodes = _needed(model.graph, wanted, set(env))
    last_use: dict[str, int] = {}
    for k, node in enumerate(nodes):
        for v in node.inputs:
            if v is not None and v.name:
                last_use[v.name] = k
    with torch.device(device):
        _execute(model, nodes, lookup, env, float_type, last_use, set(wanted), compute)
    return {name: env[name] if name in env else lookup(initializers[name]) for name in wanted}


def _needed(graph: ir.Graph, wanted: Sequence[str], known: set[str]) -> list[ir.Node]:
    """The nodes that lead from known values to wanted ones, in order."""
    producer = {v.name: node for node in graph for v in node.outputs if v.name}
    found: set[ir.Node] = set()
    stack = [n for n in wanted if n not in known]
    while stack:
        node = producer.get(stack.pop())
        if node is not None and node not in found:
            found.add(node)
            stack += [v.name for v in node.inputs if v is not None and v.name and v.name not in known]
    return [node for node in graph if node in found]


def _execute(model, nodes, lookup, env, float_type, last_use, keep, compute=None) -> None:
    from qcompile.passes.execute.operators import OPERATORS

    for k, node in enumerate(nodes):
        domain = "" if node.domain == "ai.onnx" else node.domain
        args = _placed(node, [lookup(v) for v in node.inputs])
        results = None if compute is None else compute(node, args)
        function = model.functions.get((node.domain, node.op_type, node.overload)) if domain else None
        if results is not None:
            pass
        elif function is not None:
            results = _call(model, function, node, args, float_type)
        else:
            implementation = OPERATORS.get(node.op_type) if not domain else None
            if implementation is None:
                raise UnsupportedOperatorError(
                    f"node {node.name!r}: operator {domain or 'ai.onnx'}::{node.op_type} cannot be executed in float64"
                )
            results = implementation(node, float_type, *args)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for value, result in zip(node.outputs, results):
            if value.name:
                env[value.name] = result
        for v in node.inputs:
            if v is not None and last_use.get(v.name or "", -1) == k and v.name not in keep:
                env.pop(v.name or "", None)


_SHAPES = {
    "Reshape": 1,
    "Expand": 1,
    "Slice": 1,
    "Squeeze": 1,
    "Unsqueeze": 1,
    "Tile": 1,
    "Pad": 1,
    "Split": 1,
    "CumSum": 1,
    "ConstantOfShape": 0,
    "Range": 0,
}
"""First input of an operator that is read as numbers; those of reductions are read so too."""


def _placed(node: ir.Node, args: list) -> list:
    """Arguments on one device. Small integers stay on the CPU until they meet data: reading them there costs nothing."""
    devices = {a.device for a in args if a is not None}
    if len(devices) < 2:
        return args
    device = next(d for d in devices if d.type != "cpu")
    first = 1 if node.op_type.startswith("Reduce") else _SHAPES.get(node.op_type, len(args))
    return [a if a is None or i >= first else a.to(device) for i, a in enumerate(args)]


def _call(model: ir.Model, function: ir.Function, node: ir.Node, args: list, float_type) -> list:
    """Run a function's body; attribute references take the caller's values or the declared defaults."""
    import copy

    env = {formal.name: actual for formal, actual in zip(function.inputs, args)}
    values = {name: attr for name, attr in function.attributes.items() if attr.value is not None}
    values |= dict(node.attributes)
    body: list[Any] = []
    for inner in function:
        if any(a.is_ref() for a in inner.attributes.values()):
            inner = copy.copy(inner)
            resolved = {}
            for name, attr in inner.attributes.items():
                if not attr.is_ref():
                    resolved[name] = attr
                elif attr.ref_attr_name in values:
                    resolved[name] = ir.Attr(name, attr.type, values[attr.ref_attr_name].value)
            body.append(_Resolved(inner, resolved))
        else:
            body.append(inner)
    lookup = lambda v: None if v is None else env.get(v.name)  # noqa: E731
    _execute(model, body, lookup, env, float_type, {}, set(env))
    return [env[v.name] for v in function.outputs]


class _Resolved:
    """A node of a function body with its attribute references filled in."""

    def __init__(self, node: ir.Node, attributes: dict[str, ir.Attr]) -> None:
        self.name, self.op_type, self.domain, self.overload = node.name, node.op_type, node.domain, node.overload
        self.inputs, self.outputs, self.attributes = node.inputs, node.outputs, attributes


def _tensor(array: Any, float_type: Any, device: str = "cpu") -> Tensor:
    import torch

    if isinstance(array, torch.Tensor):
        if array.is_floating_point():
            return array.to(device, float_type)
        return array if array.dim() < 2 and array.numel() <= 16 else array.to(device)
    array = np.asarray(array)
    if array.dtype.kind == "V" or array.dtype.name in ("bfloat16", "float16"):
        array = array.astype(np.float32)
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(np.int8)
    tensor = torch.from_numpy(np.array(array, order="C"))
    if tensor.is_floating_point():
        return tensor.to(device, float_type)
    # Shapes, axes and the like are read by the host.
    return tensor if tensor.dim() < 2 and tensor.numel() <= 16 else tensor.to(device)
