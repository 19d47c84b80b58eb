"""An interpreter of ONNX graphs in torch, for float64 proofs and for learning through a model."""

from qcompile.passes.execute.interpreter import run

__all__ = ["run"]
