"""ONNX files -> ``onnx_ir.Model``, opset 18 or later, weights memory-mapped.

Files are untrusted: external data must lie in the model's directory, and every declared range inside the data file.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qcompile.errors import ModelError


def load_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; tensors in external files stay on disk until used.

    Raises:
        ModelError: not an ONNX file, truncated, or external data missing, too short or outside the directory.
    """
    import google.protobuf.message
    import onnx

    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: not found") from error
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one ({error})") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(f"{path}: holds no graph")
    model = ir.serde.deserialize_model(proto)
    attach_external_data(model, path)
    return model


def attach_external_data(model: ir.Model, path: Path) -> None:
    """Resolve external tensors against the directory of ``path`` and check that they lie inside it, whole."""
    base = path.parent.resolve()
    ir.external_data.set_base_dir(model.graph, base)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (base / tensor.location).resolve()
        where = f"{path}: external data of '{value.name}'"
        if not file.is_relative_to(base):
            raise ModelError(f"{where} lie outside the model's directory: '{tensor.location}'")
        if not file.is_file():
            raise ModelError(f"{where} are missing: '{file}'")
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > file.stat().st_size:
            raise ModelError(f"{where} end at byte {end}, but '{file}' has {file.stat().st_size}")
