"""What the handlers of all operators share."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

DOMAIN = "qcompile"


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def bare(node: ir.Node) -> str:
    """A name for what a node makes."""
    return (node.outputs[0].name or node.op_type).split("/")[-1].split("::")[-1]
