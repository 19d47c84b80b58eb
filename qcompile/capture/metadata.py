"""Where nodes came from, in one form: ``namespace`` (module path) and ``qcompile.class`` in a node's metadata.

Exporters write more: file paths and stack traces of the machine that exported, which have no business in an artifact.
"""

from __future__ import annotations

import ast
import re
from collections.abc import MutableMapping

import onnx_ir as ir

MODULE_KEY = "namespace"
CLASS_KEY = "qcompile.class"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"


def clean_metadata(model: ir.Model, strip_prefix: str = "") -> None:
    """Keep where a node came from (module path and class), drop stack traces and paths of this machine."""
    for node in model.graph.all_nodes():
        scopes = literal_list(node.metadata_props.get(_SCOPES))
        classes = literal_list(node.metadata_props.get(_CLASSES))
        kept = {
            k: v
            for k, v in node.metadata_props.items()
            if k.startswith("qcompile.") or (k == MODULE_KEY and not scopes)
        }
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        if len(scopes) > 1 and not scopes[-1].startswith("_empty_nn_module"):
            path = scopes[-2]
            path = "" if path == strip_prefix.rstrip(".") else path.removeprefix(strip_prefix)
            if path:
                node.metadata_props[MODULE_KEY] = path
            if len(classes) > 1:
                node.metadata_props[CLASS_KEY] = classes[-2].rsplit(".", 1)[-1]
        for output in node.outputs:
            _drop_exporter_keys(output.metadata_props)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _drop_exporter_keys(value.metadata_props)
    _drop_exporter_keys(model.graph.metadata_props)
    _drop_exporter_keys(model.metadata_props)
    model.doc_string = None
    model.graph.doc_string = None


def _drop_exporter_keys(properties: MutableMapping[str, str]) -> None:
    for key in [key for key in properties if key.startswith("pkg.")]:
        del properties[key]


def name_modules(model: ir.Model) -> None:
    """Older exporters write the module path into node names (``/encoder/layer.0/attn/MatMul``): note it as the rest do."""
    for node in model.graph.all_nodes():
        if MODULE_KEY in node.metadata_props or _SCOPES in node.metadata_props:
            continue
        parts = (node.name or "").split("/")
        if len(parts) > 2 and not parts[0]:
            node.metadata_props[MODULE_KEY] = ".".join(parts[1:-1])


_ANONYMOUS_WEIGHT = re.compile(r"(onnx::\w+_\d+|val_\d+)")


def name_weights(model: ir.Model) -> None:
    """Exporters number the weights they transposed (``onnx::MatMul_407``): name them after the module that reads them."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        uses = value.uses()
        if len(uses) != 1 or value.const_value is None or not _ANONYMOUS_WEIGHT.fullmatch(value.name or ""):
            continue
        node = next(iter(uses)).node
        path = node.metadata_props.get(MODULE_KEY)
        floating = value.const_value.dtype.is_floating_point()
        if (
            node.op_type not in ("MatMul", "Gemm", "Conv")
            or not path
            or not floating
            or len(value.const_value.shape) < 2
        ):
            continue
        name = f"{path}.weight"
        if name not in graph.initializers:
            value.name = name


def literal_list(text: str | None) -> list[str]:
    """The list of strings that ``text`` spells in Python syntax; empty if it does not."""
    if not text:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []
