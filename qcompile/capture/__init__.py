"""From a user's model (ONNX, Hugging Face directory, torch) to an ``onnx_ir.Model``, and from there to MLIR."""

from qcompile.capture.api import capture
from qcompile.capture.captured import Captured
from qcompile.capture.mlir import emit_mlir

__all__ = ["Captured", "capture", "emit_mlir"]
