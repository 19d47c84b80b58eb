"""Decomposing and recognising are inverse: outputs stay, and the same composites come back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.decompose import KINDS, decompose
from qcompile.passes.recognise import recognise

QKV = "float[b, 6, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v"
CASES = {
    "swish": "g (float[b, 8] x) => (float[b, 8] y) { y = Swish(x) }",
    "swish with factor": "g (float[b, 8] x) => (float[b, 8] y) { y = Swish<alpha = 1.5>(x) }",
    "rms norm": "g (float[b, s, 8] x, float[8] w) => (float[b, s, 8] y) { y = RMSNormalization<epsilon = 0.01>(x, w) }",
    "rms norm of two axes": "g (float[b, 3, 8] x, float[3, 8] w) => (float[b, 3, 8] y) { y = RMSNormalization<axis = 1>(x, w) }",
    "rotary": "g (float[b, 3, s, 8] x, float[b, s, 4] c, float[b, s, 4] d) => (float[b, 3, s, 8] y) { y = RotaryEmbedding(x, c, d) }",
    "rotary interleaved": "g (float[b, 3, s, 8] x, float[b, s, 4] c, float[b, s, 4] d) => (float[b, 3, s, 8] y) { y = RotaryEmbedding<interleaved = 1>(x, c, d) }",
    "rotary of a part": "g (float[b, 3, s, 8] x, float[b, s, 2] c, float[b, s, 2] d) => (float[b, 3, s, 8] y) { y = RotaryEmbedding<rotary_embedding_dim = 4>(x, c, d) }",
    "attention": f"g ({QKV.replace('2, s', '6, s')}) => (float[b, 6, s, 8] y) {{ y = Attention(q, k, v) }}",
    "grouped": f"g ({QKV}) => (float[b, 6, s, 8] y) {{ y = Attention<scale = 0.2>(q, k, v) }}",
    "causal": f"g ({QKV}) => (float[b, 6, s, 8] y) {{ y = Attention<is_causal = 1>(q, k, v) }}",
    "masked": f"g ({QKV}, bool[b, 1, s, s] m) => (float[b, 6, s, 8] y) {{ y = Attention(q, k, v, m) }}",
    "added mask": f"g ({QKV}, float[s, s] m) => (float[b, 6, s, 8] y) {{ y = Attention<softcap = 2.0>(q, k, v, m) }}",
}


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}')


def feeds_of(model: ir.Model, seed: int, batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else {"b": batch, "s": length}[str(d.value)] for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name] = (rng.random(shape) < 0.5) | np.eye(shape[-2], shape[-1], dtype=bool)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, feeds)[0]


@pytest.mark.parametrize("text", CASES.values(), ids=CASES.keys())
def test_there_and_back(text: str) -> None:
    model = model_of(text)
    plain = decompose(model)
    assert not {node.op_type for node in plain.graph} & KINDS.keys()
    again, report = recognise(plain)
    kinds = Counter(node.op_type for node in model.graph)
    if "w)" not in text:  # a gain that is an input is multiplied outside the norm
        assert report.composites == kinds, str(report)
    for seed, batch, length in ((0, 1, 1), (1, 2, 5), (2, 3, 4)):
        feeds = feeds_of(model, seed, batch, length)
        expected = run(model, feeds)
        np.testing.assert_allclose(run(plain, feeds), expected, atol=1e-5)
        np.testing.assert_allclose(run(again, feeds), expected, atol=1e-5)


def test_only_what_is_asked_for() -> None:
    text = "g (float[b, 8] x, float[8] w) => (float[b, 8] y) { n = RMSNormalization(x, w) y = Swish(n) }"
    plain = decompose(model_of(text), ["Swish"])
    assert [node.op_type for node in plain.graph] == ["RMSNormalization", "Sigmoid", "Mul"]


def test_functions_are_inlined() -> None:
    from qcompile.passes import domain

    text = '<ir_version: 11, opset_import: ["" : 24, "qcompile" : 1]> g (float[b, 8] x) => (float[b, 8] y) '
    text += "{ c, s = qcompile.QuantizePerToken(x) y = qcompile.DequantizePerToken(c, s) }"
    model = ir.from_onnx_text(text)
    domain.add_functions(model)
    plain = decompose(model)
    assert {node.domain for node in plain.graph} == {""}
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.testing.assert_allclose(run(plain, {"x": x}), run(model, {"x": x}), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[b, s, 24] x, float[b, s, 4] c, float[b, s, 4] d) => (float[b, s, 24] y) { y = RotaryEmbedding<num_heads = 3>(x, c, d) }",
        "g (float[b, s, 16] q, float[b, s, 16] k, float[b, s, 16] v) => (float[b, s, 16] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v) }",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match="primitive operators"):
        decompose(model_of(text))
