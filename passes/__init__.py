"""Graph analyses and rewrites over an ``onnx_ir.Model``."""
