"""ONNX operators as torch functions, by name; importing this module registers all of them."""

from qcompile.passes.execute import elementwise, indexing, layers, quantization, reductions, shapes
from qcompile.passes.execute.registry import OPERATORS

__all__ = ["OPERATORS", "elementwise", "indexing", "layers", "quantization", "reductions", "shapes"]
