"""``torch.nn.Module`` or ``torch.export.ExportedProgram`` -> ONNX in memory.

The exporter is ``torch.onnx.export(dynamo=True)``. Opset 23 keeps RMSNormalization, RotaryEmbedding, Attention and
Gelu whole; lower opsets decompose them, and ``qcompile.passes.recognise`` raises them again. What the exporter
leaves to be done is done here:

* weights that it folded (``val_92``, a transposed Linear weight) get back the name they have in the module;
* metadata with file paths and stack traces of this machine is replaced by ``namespace`` (module path) and ``qcompile.class``;
* RotaryEmbedding's cos and sin tables of batch 1 are expanded to the batch, as the operator demands.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.capture.metadata import clean_metadata, literal_list
from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.passes.recognise import symbols
from qcompile.passes.recognise.broadcast import expand_tables
from qcompile.passes.recognise.linear import TRANSPOSE_OF

OLDEST_EXPORT = 18  # below, torch converts the finished model with a tool that drops names and shapes


def export_torch(
    program: Any,
    example: Sequence[Any] = (),
    *,
    opset: int,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    strip_prefix: str = "",
) -> ir.Model:
    """Export a module (in eval mode) or an exported program.

    Args:
        program: ``torch.nn.Module`` or ``torch.export.ExportedProgram``.
        example: positional example inputs; ignored for an exported program, which holds its own.
        opset: default-domain opset of the result, at least 18.
        dynamic_shapes: as ``torch.onnx.export`` takes them, e.g. ``({0: "batch"},)``; None for static shapes.
        input_names, output_names: names of the graph's inputs and outputs.
        strip_prefix: the attribute (``"model."``) of a wrapper that should not show in names.

    Raises:
        UnsupportedOperatorError: an operator of the program has no ONNX form.
        ModelError: the exporter failed for another reason (its first line is quoted).
    """
    import torch

    is_program = isinstance(program, torch.export.ExportedProgram)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                program,
                () if is_program else tuple(example),
                dynamo=True,
                opset_version=max(opset, OLDEST_EXPORT),
                dynamic_shapes=None if is_program else dynamic_shapes,
                input_names=list(input_names) if input_names else None,
                output_names=list(output_names) if output_names else None,
                verbose=False,
            )
    except Exception as error:
        raise _export_error(program, error) from error
    model = exported.model
    parameters = program.state_dict
    restore_weight_names(model, parameters if is_program else parameters(), strip_prefix)
    clean_metadata(model, strip_prefix)
    symbols.infer(model)
    expand_tables(model.graph)
    symbols.clear(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about optional packages and tracing details that a user can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        unseen = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _export_error(program: Any, error: Exception) -> ModelError:
    """Say in one line what the exporter said in a hundred, keeping the cause that names the operator or dimension."""
    name = type(program).__name__
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)
    for cause in chain:
        if type(cause).__name__ == "DispatchError":
            return UnsupportedOperatorError(f"{name}: {_first_line(cause)}")
    for cause in reversed(chain):
        text = str(cause)
        if "Constraints violated" in text or "user-specified ranges" in text or "marked as dynamic" in text:
            details = [
                line.strip(" -")
                for line in text.splitlines()
                if "static" in line or "constant" in line or "range" in line
            ]
            return ModelError(
                f"{name}: the module does not work for every size of a dynamic dimension ({(details or [''])[-1][:200]});"
                " say which dimensions may vary with dynamic=..., or pass dynamic=False"
            )
    return ModelError(f"{name}: torch.export failed: {_first_line(chain[-1])}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def restore_weight_names(model: ir.Model, parameters: Mapping[str, Any], strip_prefix: str = "") -> None:
    """Give folded weights the name of the parameter they were made from.

    The exporter folds ``Transpose(weight)`` into a new initializer ``val_N``. The consumer's metadata names the module;
    the initializer is renamed if the module has a parameter whose transpose is equal to it, value by value.
    """
    graph = model.graph
    _name_tied_tables(graph, parameters)
    _name_stacks(graph, parameters)
    for value in list(graph.initializers.values()):
        name = value.name or ""
        if name in parameters or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        for node, _ in value.uses():
            scopes = literal_list(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
            wanted = f"{scopes[-2]}.weight" if len(scopes) > 1 and scopes[-2] else ""
            parameter = parameters.get(wanted)
            if parameter is None or wanted in graph.initializers:
                continue
            if np.array_equal(parameter.detach().cpu().T.numpy(), value.const_value.numpy()):
                value.name = wanted
                value.const_value.name = wanted
                tied = [
                    key
                    for key, other in parameters.items()
                    if key in graph.initializers and key != wanted and other.data_ptr() == parameter.data_ptr()
                ]
                if tied:
                    value.metadata_props[TRANSPOSE_OF] = tied[0].removeprefix(strip_prefix)
                break
    if strip_prefix:
        for value in list(graph.initializers.values()):
            name = (value.name or "").removeprefix(strip_prefix)
            if name != value.name and name not in graph.initializers:
                value.name = name
                if value.const_value is not None:
                    value.const_value.name = name


def _name_tied_tables(graph: ir.Graph, parameters: Mapping[str, Any]) -> None:
    """A table that is also an output matrix has two names; give it the one of the embedding."""
    for node in graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        scopes = literal_list(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        if table is None or table.const_value is None or len(scopes) < 2 or not table.name:
            continue
        wanted = f"{scopes[-2]}.weight"
        if wanted == table.name or not {wanted, table.name} <= parameters.keys() or wanted in graph.initializers:
            continue
        if parameters[wanted].data_ptr() == parameters[table.name].data_ptr():
            table.name = wanted
            table.const_value.name = wanted


def _name_stacks(graph: ir.Graph, parameters: Mapping[str, Any]) -> None:
    """Give matrices that are picked at run time, which the exporter transposes by nothing, the name of their parameter."""
    for node in graph:
        stack = node.inputs[0] if node.op_type in ("Gather", "GatherND") else None
        scopes = literal_list(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        if stack is None or stack.const_value is None or stack.name in parameters or len(scopes) < 2:
            continue
        for name, parameter in parameters.items():
            if not name.startswith(f"{scopes[-2]}.") or name in graph.initializers:
                continue
            if tuple(parameter.shape) == tuple(stack.const_value.shape.numpy()) and np.array_equal(
                parameter.detach().cpu().numpy(), stack.const_value.numpy()
            ):
                stack.name = stack.const_value.name = name
                break
