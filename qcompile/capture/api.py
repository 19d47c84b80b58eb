"""``capture``: whatever a user has -> ``Captured``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.capture.captured import Captured
from qcompile.capture.metadata import clean_metadata, name_modules, name_weights
from qcompile.errors import ModelError, QcompileError
from qcompile.passes.opset import convert_opset
from qcompile.passes.qonnx import translate_quantizers
from qcompile.passes.validate import validate
from qcompile.passes.widen import widen

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
        opset: default-domain opset to export torch modules with, at least 18.
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
    try:
        return _capture(model_or_path, example_inputs, dynamic, opset, task, kv_cache, token_types, check)
    except QcompileError as error:
        if (text := " ".join(str(error).split())) != str(error):  # names in corrupt files can hold line breaks
            raise type(error)(text) from error
        raise


def _capture(
    model_or_path: Any,
    example_inputs: Any,
    dynamic: Any,
    opset: int,
    task: str | None,
    kv_cache: bool,
    token_types: bool | None,
    check: bool,
) -> Captured:
    import onnx

    from qcompile.capture.onnx_file import check_proto, from_proto
    from qcompile.capture.reference import is_reference, resolve

    directory = isinstance(model_or_path, str | Path) and Path(model_or_path).is_dir()
    if kv_cache and not (directory and (Path(model_or_path) / "config.json").is_file()):
        name = model_or_path if isinstance(model_or_path, str | Path) else type(model_or_path).__name__
        raise ModelError(
            f"{name}: a cache (`--kv-cache`) is given to decoders in Hugging Face directories; any other model has one"
            " only as inputs and outputs of its own"
        )
    if isinstance(model_or_path, ir.Model):
        return _from_ir(model_or_path.clone(), {"kind": "onnx"}, example_inputs, "model", task)
    if isinstance(model_or_path, onnx.ModelProto):
        check_proto(model_or_path, "model")
        return _from_ir(from_proto(model_or_path, "model"), {"kind": "onnx"}, example_inputs, "model", task)
    if isinstance(model_or_path, str | Path):
        path = Path(model_or_path)
        if path.is_dir():
            return _from_directory(path, example_inputs, opset, task, kv_cache, token_types, check)
        if path.is_file():
            return _from_file(path, example_inputs, task)
        if not is_reference(str(model_or_path)):
            raise ModelError(f"{model_or_path}: no such file or directory, and not of the form module:attribute")
    if not torch_available():
        raise ModelError("capturing torch modules needs torch; install qcompile[torch]")
    import torch

    from qcompile.capture.torch_module import capture_module, capture_program

    if isinstance(model_or_path, torch.export.ExportedProgram):
        return capture_program(model_or_path, opset=opset, check=check)
    source: dict[str, Any] = {"kind": "torch"}
    module = model_or_path
    if isinstance(model_or_path, str | Path):
        source["path"] = str(model_or_path)
        module, inputs, shapes = resolve(str(model_or_path))
        example_inputs = inputs if example_inputs is None else example_inputs
        dynamic = shapes if dynamic is True and shapes is not None else dynamic
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"cannot capture a {type(module).__name__}")
    captured = capture_module(module, example_inputs, dynamic=dynamic, opset=opset, check=check, source=source)
    captured.task = task
    return captured


def torch_available() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def _from_ir(model: ir.Model, source: dict[str, Any], example_inputs: Any, name: str, task: str | None) -> Captured:
    """Check a model that is in ONNX already and bring it to the current opset."""
    map_external_data(model)
    translate_quantizers(model)
    validate(model, name)
    source["opset"] = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    convert_opset(model, OPSET)
    if narrow := widen(model):
        source["weights"] = narrow
    name_modules(model)
    clean_metadata(model)
    name_weights(model)
    return Captured(model, source, example_inputs=dict(example_inputs) if example_inputs else None, task=task)


def _from_file(path: Path, example_inputs: Any, task: str | None) -> Captured:
    from qcompile.capture.onnx_file import load_onnx

    model, external = load_onnx(path)
    source = {"kind": "onnx", "path": str(path), "files": file_hashes([path, *external])}
    captured = _from_ir(model, source, example_inputs, str(path), task)
    tokenizer = path.parent / "tokenizer.json"
    captured.tokenizer = tokenizer if tokenizer.is_file() else None
    return captured


def _from_directory(
    path: Path, example_inputs: Any, opset: int, task: str | None, kv_cache: bool, token_types: bool | None, check: bool
) -> Captured:
    if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return _from_file(found[0], example_inputs, task)
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
    validate(model, str(path))
    source: dict[str, Any] = {
        "kind": "huggingface",
        "path": str(path),
        "architecture": prepared.architecture,
        "task": prepared.task,
        "files": file_hashes([directory / "config.json", *huggingface.weight_files(directory)]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript")},
    }
    if prepared.generation is not None:
        source["generation"] = prepared.generation
    if check:
        source["parity"] = check_parity(model, prepared.module, prepared.examples, str(path), prepared.padding_input)
    tokenizer = directory / "tokenizer.json"
    arrays = [tensor.numpy() for tensor in flatten(prepared.examples[0])]
    return Captured(
        model,
        source,
        tokenizer if tokenizer.is_file() else None,
        dict(zip(prepared.input_names, arrays)),
        prepared.task,
    )


def map_external_data(model: ir.Model) -> None:
    """Turn weights in external files into arrays mapped from them, which need no directory to be used or passed on.

    Raises:
        ModelError: a file cannot be read or is too short.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if not isinstance(tensor := value.const_value, ir.ExternalTensor):
                continue
            try:
                array = tensor.numpy()
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"tensor {value.name!r}: its data file {str(tensor.path)!r} cannot be read ({error}); "
                    "load the model from where its data files lie"
                ) from None
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


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
