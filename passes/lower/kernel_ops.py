"""Builders and accessors of the operators in the domain ``qcompile.kernel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

KERNEL_DOMAIN = "qcompile.kernel"


def kernel_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    like: ir.Node | None = None,
) -> ir.Node:
    """Create a kernel node whose outputs take over name, type and shape of ``outputs`` (None: a new value)."""
    node = ir.node(op_type, inputs, attributes=attributes or {}, domain=KERNEL_DOMAIN, num_outputs=len(outputs))
    if like is not None:
        node.name = like.name
        node.metadata_props.update(like.metadata_props)
    for new, old in zip(node.outputs, outputs):
        if old is not None:
            new.type, new.shape = old.type, old.shape
    return node


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Make ``new`` replace ``old`` everywhere, under the same name."""
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{name}.lowered_away"
    new.name = name


def is_kernel(node: ir.Node | None, op_type: str) -> bool:
    """Whether ``node`` is the kernel operator ``op_type``."""
    return node is not None and node.domain == KERNEL_DOMAIN and node.op_type == op_type


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values provably have the same shape, symbolic extents included."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    for x, y in zip(a.shape, b.shape):
        p = x if isinstance(x, int) else x.value
        q = y if isinstance(y, int) else y.value
        if p is None or q is None or p != q:
            return False
    return True
