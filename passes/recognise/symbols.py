"""Symbolic shapes and the contents of shape vectors, as other rules ask for them.

A dimension is an int or a string: the name of a symbol (``"batch"``) or an expression of symbols (``"4*batch"``). Two
dimensions are known to be equal if they are the same int or the same string.
"""

from __future__ import annotations

import ast
import json
import logging
import re

import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY, infer_symbolic_shapes

from qcompile.passes.recognise.pattern import small_constant

Dim = int | str
# Symbols that inference made up, here and in ONNX's own, and quotients, which rewrites of a reshape may resolve.
_ANONYMOUS = re.compile(r"\b(_d|unk__)\d+\b|//")


def infer(model: ir.Model) -> None:
    """Infer all shapes and types of ``model`` in place; what cannot be inferred stays unknown.

    Dimensions that an earlier inference could only number (``_d0``, ``unk__0``) are inferred anew. Names that could not be
    read as an expression (``batch size``, ``N:0``) are made readable.
    """
    _make_readable(model)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.pop(SYM_DATA_KEY, None)
            if value.shape is not None and not value.is_graph_output() and any(map(_anonymous, value.shape)):
                value.shape = None
    logger = logging.getLogger("onnx_shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        infer_symbolic_shapes(model, warn_on_missing=False)
    finally:
        logger.setLevel(level)


def _make_readable(model: ir.Model) -> None:
    values = [*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph.all_nodes() for v in n.outputs)]
    shaped = [v for v in values if v.shape is not None]
    names = {d.value for v in shaped for d in v.shape if isinstance(d, ir.SymbolicDim) and d.value is not None}
    better: dict[str, str] = {}
    for name in sorted(n for n in names if not _readable(n)):
        free = re.sub(r"\W+", "_", name if name[:1].isalpha() else f"d_{name}", flags=re.ASCII)
        while free in names or free in better.values():
            free += "_"
        better[name] = free
    if better:
        for value in shaped:
            value.shape = ir.Shape(
                [better.get(d.value, d.value) if isinstance(d, ir.SymbolicDim) and d.value else d for d in value.shape]
            )


def _readable(name: str) -> bool:
    """Whether a dimension is a name or an expression of names."""
    if not re.fullmatch(r"[\w.+*/%(), -]+", name, flags=re.ASCII):
        return False
    try:
        ast.parse(name.replace(".", "_"), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True


def _anonymous(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value is None or _ANONYMOUS.search(dim.value) is not None)


def clear(model: ir.Model) -> None:
    """Forget what `infer` noted in metadata."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.pop(SYM_DATA_KEY, None)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.pop(SYM_DATA_KEY, None)


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """The shape of a value, if its rank and all its dimensions are known, as ints or names."""
    if value is None or value.shape is None:
        return None
    result: list[Dim] = []
    for dim in value.shape:
        if isinstance(dim, int):
            result.append(dim)
        elif dim.value is not None:
            result.append(int(dim.value) if dim.value.isdigit() else dim.value)
        else:
            return None
    return tuple(result)


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions, if known."""
    return None if value is None or value.shape is None else len(value.shape)


def contents(value: ir.Value | None) -> list[Dim] | None:
    """The elements of a small integer tensor, as ints or names, if every one of them is known."""
    if value is None:
        return None
    array = small_constant(value, 64)
    if array is not None:
        return [int(v) for v in array.reshape(-1)] if array.dtype.kind in "iu" else None
    text = value.metadata_props.get(SYM_DATA_KEY)
    if not text:
        return None
    items = json.loads(text)
    if not isinstance(items, list):
        items = [items]
    result: list[Dim] = []
    for item in items:
        if isinstance(item, int):
            result.append(item)
        elif isinstance(item, str) and item.lstrip("-").isdigit():
            result.append(int(item))
        elif isinstance(item, str):
            result.append(item)
        else:
            return None
    return result
