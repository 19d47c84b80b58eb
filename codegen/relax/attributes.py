"""Reading attributes of a node as plain Python values."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

_REQUIRED = object()


def attr(node: ir.Node, name: str, default: Any = _REQUIRED) -> Any:
    """The attribute's value: int, float, str, a list of them, ``ir.TensorProtocol`` or ``ir.Graph``.

    Raises:
        KeyError: the attribute is absent and there is no default.
    """
    attribute = node.attributes.get(name)
    if attribute is None:
        if default is _REQUIRED:
            raise KeyError(f"attribute {name!r} is missing")
        return default
    if attribute.type == ir.AttributeType.STRING:
        return attribute.as_string()
    if attribute.type == ir.AttributeType.STRINGS:
        return list(attribute.as_strings())
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
        return list(attribute.value)
    return attribute.value
