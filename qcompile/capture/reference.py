"""``package.module:attribute`` or ``path/to/file.py:attribute`` -> a torch module and its example inputs.

The attribute is one of

* a ``torch.nn.Module`` with an attribute ``example_inputs`` (a tuple of tensors, or a function that returns one) and, if
  it likes, ``dynamic_shapes``;
* a function without parameters that returns ``module``, ``(module, example_inputs)`` or
  ``(module, example_inputs, dynamic_shapes)``.

Packages are looked for in the current folder too, and what a file imports beside it. This runs the code of the package or
file, as importing it does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form ``module:attribute`` and is not the path of something that exists."""
    module, colon, attribute = text.rpartition(":")
    if not colon or not attribute.isidentifier() or not module or Path(text).exists():
        return False
    return module.endswith(".py") or all(part.isidentifier() for part in module.split("."))


def resolve(text: str) -> tuple[Any, Any, Any]:
    """Import what ``text`` names; return the module, its example inputs and its dynamic shapes (None where not given).

    Raises:
        ModelError: it cannot be imported, or is neither a module nor a function that returns one.
    """
    place, _, attribute = text.rpartition(":")
    with _importable(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        return _resolve(text, place, attribute)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Look for modules in ``folder`` too, as `python -m` does and a console script does not: last, so that nothing is shadowed."""
    added = str(folder)
    if added in sys.path:
        yield
        return
    sys.path.append(added)
    try:
        yield
    finally:
        if added in sys.path:
            sys.path.remove(added)


def _resolve(text: str, place: str, attribute: str) -> tuple[Any, Any, Any]:
    import torch

    holder = _load(place, text)
    try:
        target = getattr(holder, attribute)
    except AttributeError as error:
        raise ModelError(f"{text}: '{place}' has no attribute '{attribute}'") from error
    inputs = shapes = None
    if callable(target) and not isinstance(target, torch.nn.Module):
        try:
            target = target()
        except Exception as error:
            raise ModelError(f"{text}: calling it failed: {type(error).__name__}: {error}") from error
        if isinstance(target, tuple) and 1 <= len(target) <= 3:
            target, inputs, shapes = (*target, None, None)[:3]
    if not isinstance(target, torch.nn.Module):
        raise ModelError(f"{text}: is a {type(target).__name__}, not a torch.nn.Module or a function that returns one")
    if inputs is None:
        inputs = getattr(target, "example_inputs", None)
        inputs = inputs() if callable(inputs) else inputs
    return target, inputs, shapes if shapes is not None else getattr(target, "dynamic_shapes", None)


def _load(place: str, text: str) -> Any:
    path = Path(place)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        if not path.is_file():
            raise ModelError(f"{text}: '{place}' not found")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{text}: importing '{place}' failed: {type(error).__name__}: {error}") from error
