"""The operators of ONNX in fixed point. Multiplications by constants and sums of constants wait for the quantizer that follows.

Importing this package registers the handlers of all its modules.
"""

from qcompile.codegen.fixed.importer.operators import elementwise, images, linear, movement, quantizers, rows

__all__ = ["elementwise", "images", "linear", "movement", "quantizers", "rows"]
