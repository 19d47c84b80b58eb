"""qcompile: a compiler for quantized neural networks.

>>> import qcompile
>>> model = qcompile.compile("model.onnx", recipe="w8a8", calibration="samples.npz")
>>> outputs = model(inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CompiledModel", "Recipe", "compile", "load", "spaces"]

if TYPE_CHECKING:
    from qcompile.analysis import spaces
    from qcompile.compiled import CompiledModel, load
    from qcompile.compiler import compile
    from qcompile.recipes import Recipe

_HOME = {
    "CompiledModel": "qcompile.compiled",
    "Recipe": "qcompile.recipes",
    "compile": "qcompile.compiler",
    "load": "qcompile.compiled",
    "spaces": "qcompile.analysis",
}


def __getattr__(name: str) -> Any:
    # Loading an artifact must not pull in the compiler, so the public names are imported on first use.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
