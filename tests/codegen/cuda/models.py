"""The float model that programs are compiled from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import FLOAT, script
from onnxscript import opset23 as op

RECIPES = ("w8a8-rtn", "w4a8-rtn", "w8a16")
"""What programs are compiled with."""


def float_model() -> ir.Model:
    """``y``: norm, projection with bias and activation, 48 -> 80 channels of ``x``."""
    rng = np.random.default_rng(0)
    gamma = rng.random(48).astype(np.float32)
    weight = rng.standard_normal((48, 80)).astype(np.float32)
    bias = rng.standard_normal(80).astype(np.float32)

    @script(default_opset=op)
    def model(x: FLOAT["rows", 48]) -> FLOAT["rows", 80]:  # noqa: F821, UP037
        h = op.RMSNormalization(x, op.Constant(value=gamma))
        y = op.Relu(op.Add(op.MatMul(h, op.Constant(value=weight)), op.Constant(value=bias)))
        return y

    return ir.serde.deserialize_model(model.to_model_proto())
