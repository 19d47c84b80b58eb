"""Models of old opsets compute the same after conversion, and no incompatible operator is forgotten."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import onnx.defs
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.passes.opset import _ADAPTERS, NEWEST, OLDEST, convert_opset


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options).run(None, feeds)


def model_of(text: str, opset: int, **weights: np.ndarray) -> ir.Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    return ir.from_onnx_text(header + text, initializers=[ir.tensor(a, name=n) for n, a in weights.items()])


def incompatible_since(oldest: int, newest: int) -> set[tuple[str, int]]:
    """Operators and the versions in which an attribute vanished or changed its default, or an output vanished."""
    versions: dict[str, dict[int, onnx.defs.OpSchema]] = defaultdict(dict)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions[schema.name][schema.since_version] = schema
    found = set()
    for name, history in versions.items():
        first = max((v for v in history if v <= oldest), default=min(history))
        chain = [v for v in sorted(history) if first <= v <= newest]
        for before, after in pairwise(chain):
            old, new = history[before], history[after]
            if old.deprecated:
                if not new.deprecated:
                    found.add((name, after))
                continue
            changed = any(
                key not in new.attributes or str(new.attributes[key].default_value) != str(attribute.default_value)
                for key, attribute in old.attributes.items()
            )
            required = any(a.required for key, a in new.attributes.items() if key not in old.attributes)
            if changed or required or len(new.inputs) < len(old.inputs) or len(new.outputs) < len(old.outputs):
                found.add((name, after))
    return found


def test_every_incompatible_change_of_the_schemas_has_an_adapter() -> None:
    adapters = {(name, since) for name, since, _ in _ADAPTERS}
    assert incompatible_since(OLDEST, NEWEST) <= adapters


@pytest.mark.parametrize("kind", ["Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"])
def test_reductions(kind: str) -> None:
    text = f"g (float[b, 3, 4] x) => (float[b, 1, 4] y) {{ y = Reduce{kind}<axes = [1]>(x) }}"
    model = model_of(text, 13)
    feeds = {"x": np.random.default_rng(0).random((2, 3, 4), np.float32) + 0.1}
    before = run(model, feeds)
    convert_opset(model, 24)
    assert model.opset_imports[""] == 24
    np.testing.assert_allclose(run(model, feeds)[0], before[0], rtol=1e-6)


CASES = {
    "split in equal parts": (13, "g (float[b, 6] x) => (float[b, 2] y, float[b, 2] z, float[b, 2] w) { y, z, w = Split<axis = 1>(x) }"),
    "split by sizes": (13, "g (float[b, 6] x) => (float[b, 2] y, float[b, 4] z) { n = Constant<value_ints = [2, 4]>() y, z = Split<axis = 1>(x, n) }"),
    "roi align": (13, "g (float[1, 2, 8, 8] x, float[n, 4] r, int64[n] i) => (float[n, 2, 3, 3] y) { y = RoiAlign<output_height = 3, output_width = 3>(x, r, i) }"),
    "grid sample": (16, "g (float[b, 2, 5, 5] x, float[b, 3, 3, 2] g0) => (float[b, 2, 3, 3] y) { y = GridSample(x, g0) }"),
    "grid sample cubic": (16, 'g (float[b, 2, 5, 5] x, float[b, 3, 3, 2] g0) => (float[b, 2, 3, 3] y) { y = GridSample<mode = "bicubic">(x, g0) }'),
    "softmax": (13, "g (float[b, 6] x) => (float[b, 6] y) { y = Softmax(x) }"),
    "batch norm": (13, "g (float[b, 4] x) => (float[b, 4] y) { y = BatchNormalization(x, s, s, s, s) }"),
}  # fmt: skip


@pytest.mark.parametrize(("opset", "text"), CASES.values(), ids=CASES.keys())
def test_outputs_stay_the_same(opset: int, text: str) -> None:
    weights = {"s": np.array([0.5, 1, 2, 3], np.float32)} if "s, s" in text else {}
    model = model_of(text, opset, **weights)
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name] = np.zeros(shape, np.int64)
        elif value.name == "r":
            feeds[value.name] = np.array([[0, 0, 5, 6], [1, 2, 7, 7]], np.float32)
        else:
            feeds[value.name] = rng.uniform(-1, 1, shape).astype(np.float32)
    before = run(model, feeds)
    convert_opset(model, 21 if "RoiAlign" in text else NEWEST)  # ONNX Runtime has no kernel for RoiAlign-22
    for x, y in zip(before, run(model, feeds)):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


def test_dft_axis() -> None:
    model = model_of("g (float[b, 8, 1] x) => (float[b, 8, 2] y) { y = DFT<axis = 1>(x) }", 17)
    convert_opset(model, NEWEST)
    x = np.random.default_rng(0).random((2, 8, 1), np.float32)
    spectrum = np.fft.fft(x[..., 0], axis=1)
    np.testing.assert_allclose(run(model, {"x": x})[0], np.stack([spectrum.real, spectrum.imag], -1), atol=1e-5)


def test_group_normalization_scale_per_group_becomes_per_channel() -> None:
    text = "g (float[b, 4, 6] x) => (float[b, 4, 6] y) { y = GroupNormalization<num_groups = 2>(x, s, c) }"
    scale, bias = np.array([2, 3], np.float32), np.array([0.5, -1], np.float32)
    model = model_of(text, 18, s=scale, c=bias)
    convert_opset(model, NEWEST)
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    groups = x.reshape(3, 2, 12)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    expected = (normal * scale[:, None] + bias[:, None]).reshape(x.shape)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, atol=1e-5)


def test_group_normalization_with_computed_scale_is_refused() -> None:
    text = "g (float[b, 4, 6] x, float[2] s, float[2] c) => (float[b, 4, 6] y) { y = GroupNormalization<num_groups = 2>(x, s, c) }"
    with pytest.raises(UnsupportedOperatorError, match="GroupNormalization"):
        convert_opset(model_of(text, 18), NEWEST)


def test_batch_norm_in_training_is_refused() -> None:
    text = "g (float[b, 4] x) => (float[b, 4] y, float[4] m) { y, m, v = BatchNormalization(x, s, s, s, s) }"
    with pytest.raises(UnsupportedOperatorError, match="training"):
        convert_opset(model_of(text, 13, s=np.ones(4, np.float32)), NEWEST)


@pytest.mark.parametrize(("opset", "match"), [(12, "older than 13"), (25, "newer than 24")])
def test_opsets_out_of_range(opset: int, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        convert_opset(model_of("g (float[b] x) => (float[b] y) { y = Relu(x) }", opset), NEWEST)


def test_metadata_and_weights_survive() -> None:
    model = model_of("g (float[b, 4] x) => (float[b, 4] y) { y = MatMul(x, w) }", 13, w=np.ones((4, 4), np.float32))
    tensor = model.graph.initializers["w"].const_value
    next(iter(model.graph)).metadata_props["namespace"] = "encoder"
    convert_opset(model, NEWEST)
    assert model.graph.initializers["w"].const_value is tensor
    assert next(iter(model.graph)).metadata_props["namespace"] == "encoder"
