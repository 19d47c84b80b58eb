"""ONNX files -> ``onnx_ir.Model``, weights memory-mapped.

Files are untrusted. Before a tensor is touched it is known that its data have the length its shape asks for, and that
external data lie in the model's directory: no absolute path, no ``..``, no link that leads out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.errors import ModelError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_onnx(path: Path) -> tuple[ir.Model, list[Path]]:
    """Read an ONNX file; tensors in external files stay on disk until used.

    Returns:
        The model, and the external data files it uses.

    Raises:
        ModelError: not an ONNX file, truncated, or data missing, of the wrong length or outside the directory.
    """
    import google.protobuf.message
    import onnx

    if path.suffix in _PICKLES:
        raise ModelError(f"{path}: pickled weights are not a model; pass a Hugging Face directory, or an ONNX file")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: holds weights only; pass the directory that has config.json next to it")
    proto = onnx.ModelProto()
    try:
        with path.open("rb") as stream:
            proto.ParseFromString(stream.read())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: not found") from error
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one") from error
    files = check_proto(proto, str(path), path.parent)
    return from_proto(proto, str(path), path.parent), files


def from_proto(proto: Any, name: str, base: Path | None = None) -> ir.Model:
    """Deserialise a model that `check_proto` has passed."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # what it warns of, `validate` turns into errors
        model = ir.serde.deserialize_model(proto)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{name}: cannot be read: {' '.join(str(cause).split())[:200]}") from error
    finally:
        logger.setLevel(level)
    if base is not None:
        ir.external_data.set_base_dir(model.graph, base.resolve())
    common_passes.RemoveInitializersFromInputsPass()(model)  # as older exporters write weights: inputs with a default
    return model


def check_proto(proto: Any, name: str, base: Path | None = None) -> list[Path]:
    """Check what `onnx_ir` takes on trust: names within a graph, lengths and places of tensor data.

    Args:
        proto: ``onnx.ModelProto``.
        name: what to call it in messages.
        base: directory of the model, for external data; None if it has none.

    Returns:
        The external data files, sorted.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{name}: not an ONNX model: it holds no graph")
    files: set[Path] = set()
    for graph in _graphs(proto.graph):
        names: set[str] = set()
        for tensor in graph.initializer:
            if tensor.name in names:
                raise ModelError(f"{name}: the initializer '{tensor.name}' is defined twice")
            names.add(tensor.name)
        results: set[str] = set()
        for node in graph.node:
            for output in node.output:
                if output and (output in results or output in names):
                    raise ModelError(
                        f"{name}: '{output}' is defined twice, the second time by {node.op_type} '{node.name}'"
                    )
                results.add(output)
    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    for node in nodes:
        # protobuf hands out bytes where a name is not valid UTF-8
        if not all(isinstance(n, str) for n in (node.name, node.op_type, node.domain, *node.input, *node.output)):
            raise ModelError(f"{name}: corrupt: a name in node {node.op_type!r} is not text")
    for tensor in _tensors(proto, nodes):
        external = check_tensor(tensor, name, base)
        if external is not None:
            files.add(external)
    return sorted(files)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _tensors(proto: Any, nodes: list[Any]) -> Iterator[Any]:
    for graph in _graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            raise ModelError(f"sparse initializer '{sparse.values.name}' is not supported; store it densely")
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def check_tensor(tensor: Any, name: str, base: Path | None) -> Path | None:
    """Check one ``TensorProto``; return the external file it is in, if it is."""
    import onnx

    where = f"{name}: tensor '{tensor.name}'"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelError(f"{where} has the unknown element type {tensor.data_type}") from error
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where} has a negative dimension: {list(tensor.dims)}")
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where} has no element type")
    if dtype == ir.DataType.STRING:
        return None
    size = 1
    for d in tensor.dims:
        size *= d
    needed = (size * dtype.bitwidth + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external_file(tensor, where, needed, base)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        raise ModelError(f"{where} has {len(tensor.raw_data)} bytes, its shape {list(tensor.dims)} needs {needed}")
    if not tensor.HasField("raw_data"):
        _check_typed_data(tensor, dtype, size, where)
    return None


_FIELDS = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data")
_FIELD_OF = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}


def _check_typed_data(tensor: Any, dtype: ir.DataType, size: int, where: str) -> None:
    """Data that are not raw bytes are in the one field that their element type has, one entry per element (or byte)."""
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        raise ModelError(f"{where} has complex elements, which are not supported")
    field = _FIELD_OF.get(dtype, "int32_data")
    wrong = [other for other in _FIELDS if other != field and len(getattr(tensor, other))]
    if wrong:
        raise ModelError(f"{where} of type {dtype.name} has its data in {wrong[0]}")
    entries = (size * dtype.bitwidth + 7) // 8 if dtype.bitwidth < 8 else size
    if len(getattr(tensor, field)) != entries:
        raise ModelError(
            f"{where} has {len(getattr(tensor, field))} elements, its shape {list(tensor.dims)} needs {entries}"
        )


def _external_file(tensor: Any, where: str, needed: int, base: Path | None) -> Path:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise ModelError(f"{where} is in the external file '{location}', but the model has no directory")
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)
    root = base.resolve()
    file = (root / location).resolve()
    if not location or absolute or ".." in parts or not file.is_relative_to(root):
        raise ModelError(
            f"{where}: its data lie outside the model's directory: '{location}'; save the model again with them beside it"
        )
    if not file.is_file():
        raise ModelError(f"{where}: its data file '{location}' is missing from {root}")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError as error:
        raise ModelError(f"{where}: offset or length of its data is not a number") from error
    if offset < 0 or length != needed:
        raise ModelError(
            f"{where}: declares {length} bytes at offset {offset}, its shape {list(tensor.dims)} needs {needed}"
        )
    available = file.stat().st_size
    if offset + length > available:
        raise ModelError(f"{where}: its data end at byte {offset + length} of '{location}', which has {available}")
    return file
