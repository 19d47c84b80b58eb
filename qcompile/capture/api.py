"""``capture``: whatever a user has -> ``Captured``."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.capture.captured import Captured
from qcompile.errors import ModelError

OPSET = 23


def capture(
    model_or_path: Any,
    *,
    example_inputs: Any = None,
    dynamic: Any = True,
    opset: int = OPSET,
    task: str | None = None,
    kv_cache: bool = False,
    token_types: bool | None = None,
    check: bool = True,
) -> Captured:
    """Take a float model from where it is to an ``onnx_ir.Model``.

    Args:
        model_or_path: path of an ONNX file or of a directory (Hugging Face, sentence-transformers, or one ONNX file),
            ``"package.module:attribute"`` or ``"path/to/file.py:attribute"`` (see `qcompile.capture.reference`), an
            ``nn.Module``, ``torch.export.ExportedProgram``, ``onnx.ModelProto`` or ``onnx_ir.Model``.
        example_inputs: for a module: a tuple of positional inputs (or one tensor); for ONNX: a dict of arrays.
        dynamic: True makes the first dimension of every module input the symbolic ``batch``; False keeps shapes
            static; otherwise what ``torch.onnx.export`` takes as ``dynamic_shapes``, e.g. ``({0: "batch", 1: "sequence"},)``.
            Hugging Face models are always symbolic in ``batch`` and ``sequence``.
        opset: default-domain opset to export with.
        task: overrides what a Hugging Face architecture implies: ``"text-generation"``, ``"features"``,
            ``"classification"``, ``"image-features"``, ``"image-classification"``.
        kv_cache: export one decoding step with past keys and values as inputs.
        token_types: whether a text encoder takes token_type_ids; default: where it was trained with more than one
            type, except in a sentence-transformers directory, whose sentences are all of type 0.
        check: compare with the original at two shapes, and refuse to go on if they differ.

    Raises:
        ModelError: the model is unreadable, incomplete, or its export differs from it.
        UnsupportedOperatorError: torch uses an operator without ONNX form.
    """
    import onnx

    if isinstance(model_or_path, ir.Model):
        return _from_ir(model_or_path.clone(), {"kind": "onnx"}, example_inputs)
    if isinstance(model_or_path, onnx.ModelProto):
        return _from_ir(ir.serde.deserialize_model(model_or_path), {"kind": "onnx"}, example_inputs)
    if isinstance(model_or_path, str | Path):
        path = Path(model_or_path)
        if path.is_dir():
            return _from_directory(path, example_inputs, opset, task, kv_cache, token_types, check)
        if path.is_file():
            return _from_file(path, example_inputs)
        raise ModelError(f"{model_or_path}: no such file or directory")
    raise ModelError(f"cannot capture a {type(model_or_path).__name__}")


def _from_ir(model: ir.Model, source: dict[str, Any], example_inputs: Any) -> Captured:
    return Captured(model, source, example_inputs=dict(example_inputs) if example_inputs else None)


def _from_file(path: Path, example_inputs: Any) -> Captured:
    from qcompile.capture.onnx_file import load_onnx

    model = load_onnx(path)
    external = {
        Path(value.const_value.path)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    source = {"kind": "onnx", "path": str(path), "files": file_hashes([path, *external])}
    return _from_ir(model, source, example_inputs)


def _from_directory(
    path: Path, example_inputs: Any, opset: int, task: str | None, kv_cache: bool, token_types: bool | None, check: bool
) -> Captured:
    if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return _from_file(found[0], example_inputs)
        names = f" ({', '.join(f.name for f in found)})" if found else ""
        raise ModelError(f"{path}: neither config.json nor exactly one ONNX file{names}")

    from qcompile.capture import huggingface
    from qcompile.capture.parity import check_parity, flatten
    from qcompile.capture.torch_program import export_torch

    directory, sentences = huggingface.model_directory(path)
    if sentences and token_types is None:
        token_types = False
    prepared = huggingface.load(directory, task=task, kv_cache=kv_cache, token_types=token_types)
    model = export_torch(
        prepared.module,
        prepared.examples[0],
        opset=opset,
        dynamic_shapes=prepared.dynamic_shapes,
        input_names=prepared.input_names,
        output_names=prepared.output_names,
        strip_prefix=prepared.strip_prefix,
    )
    rename_dims(model, prepared.renamed_dims)
    source: dict[str, Any] = {
        "kind": "huggingface",
        "path": str(path),
        "architecture": prepared.architecture,
        "task": prepared.task,
        "files": file_hashes([directory / "config.json", *huggingface.weight_files(directory)]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript")},
    }
    if check:
        source["parity"] = check_parity(model, prepared.module, prepared.examples, str(path))
    tokenizer = directory / "tokenizer.json"
    arrays = [tensor.numpy() for tensor in flatten(prepared.examples[0])]
    return Captured(
        model,
        source,
        tokenizer if tokenizer.is_file() else None,
        dict(zip(prepared.input_names, arrays)),
        prepared.task,
    )


def rename_dims(model: ir.Model, names: dict[str, str]) -> None:
    """Rename symbolic dimensions throughout the graph."""
    values = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *values):
        for index, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value in names and value.shape is not None:
                value.shape[index] = names[dim.value]


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content, by file name."""
    hashes = {}
    for file in sorted(set(files)):
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
