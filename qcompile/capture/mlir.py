"""A model as MLIR text, for users of IREE, CIRCT and other MLIR flows. Needs the extra ``mlir`` (torch-mlir).

| kind | what it holds |
|---|---|
| ``"onnx"`` | ONNX operators as ``torch.operator "onnx.X"``, composites whole |
| ``"torch"`` | the torch dialect |
| ``"linalg"`` | linalg on tensors, with arith, math and tensor: what MLIR back ends take |

Composites that torch-mlir does not know are decomposed first (`qcompile.passes.decompose`), except for ``"onnx"``.
Symbolic dimensions become ``?``.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import onnx_ir as ir

from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.passes.decompose import decompose

Kind = Literal["onnx", "torch", "linalg"]
_PIPELINES: dict[str, tuple[str, ...]] = {
    "onnx": (),
    "torch": ("func.func(convert-torch-onnx-to-torch)",),
    "linalg": (
        "func.func(convert-torch-onnx-to-torch)",
        "torch-lower-to-backend-contract",
        "torch-backend-to-linalg-on-tensors-backend-pipeline",
    ),
}


def emit_mlir(model: ir.Model, kind: Kind = "linalg", *, weights: bool = True) -> str:
    """Translate ``model`` to the text of an MLIR module with one function, ``main``.

    Args:
        model: any stage of the pipeline; functions with bodies are inlined. It is not changed.
        kind: see the table above.
        weights: False leaves out the values of large constants, for reading rather than compiling.

    Raises:
        ModelError: torch-mlir is not installed, ``kind`` is unknown, or the model is too large for one protobuf message.
        UnsupportedOperatorError: torch-mlir has no lowering for an operator, which is named.
    """
    if kind not in _PIPELINES:
        raise ModelError(f"MLIR of kind '{kind}' is unknown; one of {', '.join(_PIPELINES)}")
    try:
        from torch_mlir.dialects import torch as torch_dialect
        from torch_mlir.extras import onnx_importer
        from torch_mlir.ir import Context, MLIRError
        from torch_mlir.passmanager import PassManager
    except ImportError as error:
        raise ModelError(f"emitting MLIR needs torch-mlir ({error}); install qcompile[mlir]") from error

    proto = _proto(model.clone() if kind == "onnx" else decompose(model))
    context = Context()
    torch_dialect.register_dialect(context)
    messages: list[str] = []
    context.emit_error_diagnostics = True

    def note(diagnostic: Any) -> bool:
        messages.append(diagnostic.message)
        return True

    context.attach_diagnostic_handler(note)
    try:
        info = onnx_importer.ModelInfo(proto)
        module = info.create_module(context=context).operation
        onnx_importer.NodeImporter.define_function(info.main_graph, module).import_all()
        module.verify()
        for pipeline in _PIPELINES[kind]:
            with context:
                PassManager.parse(f"builtin.module({pipeline})").run(module)
    except (MLIRError, onnx_importer.OnnxImportError) as error:
        raise UnsupportedOperatorError(f"MLIR of kind '{kind}': {_reason([str(error), *messages])}") from error
    limit = None if weights else 16
    return module.get_asm(large_elements_limit=limit, large_resource_limit=limit)


def _proto(model: ir.Model) -> Any:
    """The model as a protobuf message whose values all have types, as the importer demands."""
    import onnx

    model.graph.name = "main"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > 2**31 - 2**20:
        raise ModelError(
            f"the weights take {size} bytes, and MLIR is imported from one protobuf message of less than 2 GiB"
        )
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    return onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model), data_prop=True)


def _reason(messages: list[str]) -> str:
    """What MLIR objects to, in one line: the operator it could not legalize, if it names one."""
    text = " ".join(" ".join(messages).split())
    operator = re.search(r'"torch\.operator".{0,200}?name = "onnx\.(\w+)"', text)
    if operator:
        return f"torch-mlir has no lowering for the ONNX operator {operator[1]} as it is used here"
    legal = re.search(r"failed to legalize operation '([\w.]+)'", text)
    return f"torch-mlir has no lowering for '{legal[1]}' as it is used here" if legal else text[:300]
