"""Half precision becomes float32 inside; the ends of the graph stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.passes.validate import validate
from qcompile.passes.widen import widen

rng = np.random.default_rng(0)
PERCEPTRON = """<ir_version: 10, opset_import: ["" : 20]>
perceptron (float16[N, 12] x, bool c) => (float16[N, 5] y, float[N, 7] z, float16[N, 12] x) {
    h = MatMul(x, up)
    g = If (c) <
        then_branch = doubled () => (float16[N, 7] d) { d = Add(h, h) },
        else_branch = same () => (float16[N, 7] e) { e = Identity(h) }
    >
    z = Cast <to = 1> (g)
    i = Cast <to = 10> (z)
    y = MatMul(i, down)
}"""


def weights(dtype: type) -> dict[str, np.ndarray]:
    return {"up": rng.standard_normal((12, 7)).astype(dtype), "down": rng.standard_normal((7, 5)).astype(dtype)}


def test_a_float16_model_computes_in_float32_between_float16_ends() -> None:
    arrays = weights(np.float16)
    model = ir.from_onnx_text(PERCEPTRON, initializers=[ir.tensor(a, name=n) for n, a in arrays.items()])
    assert widen(model) == "float16"
    validate(model)
    inside = {value.dtype for node in model.graph.all_nodes() for value in node.outputs if not value.is_graph_output()}
    assert ir.DataType.FLOAT16 not in inside
    assert [v.name for v in model.graph.outputs] == ["y", "z", "x"]
    x = rng.standard_normal((3, 12)).astype(np.float16)
    y, z, same = ort.session(model).run(None, {"x": x, "c": np.array(True)})
    wanted = 2 * (x.astype(np.float32) @ arrays["up"].astype(np.float32))
    assert y.dtype == np.float16 and (same == x).all()
    np.testing.assert_allclose(z, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, wanted @ arrays["down"].astype(np.float32), rtol=1e-3, atol=1e-3)


def test_a_float32_model_that_rounds_to_float16_in_between_is_left_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    perceptron (float[N, 12] x) => (float[N, 7] y) {
        h = MatMul(x, up)
        n = Cast <to = 10> (h)
        y = Cast <to = 1> (n)
    }"""
    up = weights(np.float32)["up"]
    model = ir.from_onnx_text(text, initializers=[ir.tensor(up, name="up")])
    before = ir.to_onnx_text(model)
    assert widen(model) is None and ir.to_onnx_text(model) == before
