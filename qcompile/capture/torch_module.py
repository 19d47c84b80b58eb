"""A ``torch.nn.Module`` or ``torch.export.ExportedProgram`` of the user's -> ``Captured``."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.capture.captured import Captured
from qcompile.capture.parity import check_parity, flatten
from qcompile.capture.torch_program import export_torch
from qcompile.errors import ModelError
from qcompile.passes.validate import validate


def capture_module(
    module: Any, example_inputs: Any, *, dynamic: Any, opset: int, check: bool, source: dict[str, Any]
) -> Captured:
    """Export a module with example inputs. See `qcompile.capture.capture` for the arguments.

    A module of half precision is exported as the float32 module it becomes by ``float()``, and so are its example inputs.
    A tensor whose first dimension is 1 is doubled along it first, because torch.export takes a size of 1 for a constant.
    """
    import torch

    name = source.get("path") or type(module).__name__
    if example_inputs is None:
        example_inputs = getattr(module, "example_inputs", None)
        example_inputs = example_inputs() if callable(example_inputs) else example_inputs
    if example_inputs is None:
        raise ModelError(
            f"{name}: example inputs are needed: pass example_inputs=(tensor, ...) or give the module that attribute"
        )
    example = tuple(example_inputs) if isinstance(example_inputs, list | tuple) else (example_inputs,)
    example = tuple(torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in example)
    if narrow := _half(module):
        source["weights"] = narrow
        module, example = copy.deepcopy(module).float(), tuple(_wide(x) for x in example)
    shapes = None
    if dynamic is True:
        example = tuple(_at_least_two(x) for x in example)
        shapes = tuple({0: "batch"} if isinstance(x, torch.Tensor) and x.ndim else None for x in example)
    elif dynamic is not False and dynamic is not None:
        shapes = dynamic
    training = module.training
    module.eval()
    try:
        names = _input_names(module, example)
        model = export_torch(module, example, opset=opset, dynamic_shapes=shapes, input_names=names)
        _name_outputs(model, module, example)
        validate(model, name)
        if check:
            second = tuple(_grown(x, spec) for x, spec in zip(example, shapes)) if isinstance(shapes, tuple) else None
            source["parity"] = check_parity(model, module, [example, second] if second else [example], name)
    finally:
        module.train(training)
    source["architecture"] = type(module).__name__
    source["versions"] = {key: importlib.metadata.version(key) for key in ("torch", "onnxscript")}
    arrays = [tensor.detach().cpu().numpy() for tensor in flatten(example)]
    inputs = dict(zip((v.name or "" for v in model.graph.inputs), arrays))
    return Captured(model, source, None, inputs, None)


def capture_program(program: Any, *, opset: int, check: bool) -> Captured:
    """Convert an exported program of float32, dynamic where it was exported so."""
    if narrow := _half(program):
        raise ModelError(
            f"the exported program computes in {narrow}; pass the module itself, or export it after `module.float()`"
        )
    model = export_torch(program, opset=opset)
    validate(model, "exported program")
    source: dict[str, Any] = {"kind": "exported-program"}
    example: Any = program.example_inputs
    arguments, keywords = example if example else ((), {})
    if check and example:
        run: Callable[..., Any] = lambda *args: program.module()(*args, **keywords)  # noqa: E731
        source["parity"] = check_parity(model, run, [tuple(arguments)], "exported program")
    source["versions"] = {key: importlib.metadata.version(key) for key in ("torch", "onnxscript")}
    arrays = [tensor.detach().cpu().numpy() for tensor in flatten([arguments, keywords])]
    inputs = dict(zip((v.name or "" for v in model.graph.inputs), arrays)) if arrays else None
    return Captured(model, source, None, inputs, None)


def _input_names(module: Any, example: tuple[Any, ...]) -> list[str] | None:
    """Names of ``forward``'s parameters where every input is one tensor; None lets the exporter choose."""
    import inspect

    import torch

    if not all(isinstance(x, torch.Tensor) for x in example):
        return None
    parameters = [
        p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL
    ]
    return parameters[: len(example)] if len(parameters) >= len(example) else None


def _name_outputs(model: ir.Model, module: Any, example: tuple[Any, ...]) -> None:
    """Name outputs as the dictionary of tensors does that ``module`` returns, where those names are free."""
    import torch

    with torch.no_grad():
        result = module(*example)
    outputs = model.graph.outputs
    if not isinstance(result, dict) or not all(isinstance(value, torch.Tensor) for value in result.values()):
        return
    used = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    used |= {value.name for node in model.graph.all_nodes() for value in node.outputs if value not in outputs}
    distinct = len(set(outputs)) == len(outputs) and not any(v.is_graph_input() or v.is_initializer() for v in outputs)
    if distinct and len(result) == len(outputs) and not used & set(result):
        for value, name in zip(outputs, result):
            value.name = str(name)


def _half(module: Any) -> str | None:
    """The type of the first parameter of half precision, None without one."""
    import torch

    types = [p.dtype for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    return str(types[0]).removeprefix("torch.") if types else None


def _wide(x: Any) -> Any:
    import torch

    if isinstance(x, torch.Tensor):
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if isinstance(x, dict):
        return {key: _wide(item) for key, item in x.items()}
    return type(x)(_wide(item) for item in x) if type(x) in (list, tuple) else x


def _at_least_two(x: Any) -> Any:
    import torch

    if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 1:
        return torch.cat([x, x])
    return x


def _grown(x: Any, spec: Any) -> Any:
    """The same input, larger by one along every dimension that ``spec`` declares dynamic."""
    import torch

    if isinstance(x, torch.Tensor) and isinstance(spec, dict):
        for axis in spec:
            index = torch.arange(x.shape[axis] + 1) % x.shape[axis]
            x = x.index_select(axis, index)
        return x
    if isinstance(x, list | tuple) and isinstance(spec, list | tuple):
        return type(x)(_grown(item, inner) for item, inner in zip(x, spec))
    return x
