"""The float models that programs are compiled from, and what they are compiled with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import FLOAT, script
from onnxscript import opset23 as op

RECIPES = {
    "w8a8-rtn": ("float_model", "w8a8-rtn", False),
    "w4a8-rtn": ("float_model", "w4a8-rtn", False),
    "w8a16": ("float_model", "w8a16", False),
    "flatquant": ("float_model", "flatquant", True),
    "conv-w8a8-rtn": ("convolutions", "w8a8-rtn", False),
    "conv-w8a8-static": ("convolutions", "w8a8-static", True),
    "conv-w8a16": ("convolutions", "w8a16", False),
}
"""Programs by name: function of this file, recipe, whether it is calibrated."""

TOLERANCE = {"flatquant": 3e-2}
"""How far a program may be from ``model.onnx``, relative to the size of the result, where it is not 2e-3: codes of four bits near a tie."""


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


def convolutions() -> ir.Model:
    """``y``: 3 x 3 with stride, depthwise, pointwise with a residual, grouped, pooling and a classifier; images of 3 channels."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    first, first_bias = normal(24, 3, 3, 3), normal(24, 1)[:, 0]
    depth, point, point_bias = normal(24, 1, 3, 3), normal(24, 24, 1, 1), normal(24, 1)[:, 0]
    grouped, head = normal(32, 6, 3, 3), normal(10, 32).T.copy()

    @script(default_opset=op)
    def model(x: FLOAT["images", 3, 21, 18]) -> FLOAT["images", 10]:  # noqa: F821, UP037
        a = op.Relu(
            op.Conv(x, op.Constant(value=first), op.Constant(value=first_bias), pads=[1, 1, 1, 1], strides=[2, 2])
        )
        b = op.Relu(op.Conv(a, op.Constant(value=depth), pads=[1, 1, 1, 1], group=24))
        c = op.Add(op.Conv(b, op.Constant(value=point), op.Constant(value=point_bias)), a)
        d = op.Relu(op.Conv(c, op.Constant(value=grouped), dilations=[2, 2], group=4))
        e = op.Flatten(op.GlobalAveragePool(d))
        return op.MatMul(e, op.Constant(value=head))

    return ir.serde.deserialize_model(model.to_model_proto())


def inputs(name: str, count: int, seed: int = 0) -> dict[str, Any]:
    """``count`` rows or images."""
    shape = (48,) if RECIPES[name][0] == "float_model" else (3, 21, 18)
    return {"x": np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)}


def compile_program(name: str, folder: Any, **options: Any) -> Any:
    """Compile a program of `RECIPES` for CUDA; ``folder`` holds the float model."""
    import qcompile

    make, recipe, calibrated = RECIPES[name]
    path = folder / f"{make}.onnx"
    ir.save(globals()[make](), path)
    if calibrated:
        options["calibration"] = [inputs(name, 4, seed) for seed in range(4)]
    return qcompile.compile(path, target="cuda", recipe=recipe, progress=False, **options)
