"""From a user's model (ONNX, Hugging Face directory, torch) to an ``onnx_ir.Model``."""

from qcompile.capture.api import capture
from qcompile.capture.captured import Captured

__all__ = ["Captured", "capture"]
