"""From a quantized ONNX model to a fixed-point program."""

from qcompile.codegen.fixed.importer.driver import Imported, import_model

__all__ = ["Imported", "import_model"]
