"""Small graphs in ONNX's text form, run before and after recognition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.passes.recognise import Recognised, recognise

Check = Callable[..., tuple[ir.Model, Recognised]]


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = ir.serde.serialize_model(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def random_feeds(model: ir.Model, seed: int = 0, **dims: int) -> dict[str, np.ndarray]:
    """Normal floats, small integers, random booleans; symbolic dimensions as given."""
    rng = np.random.default_rng(seed)
    sizes = {"b": 2, "s": 5, "t": 7, **dims}
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name or ""] = rng.random(shape) < 0.7
        elif value.dtype.is_floating_point():
            feeds[value.name or ""] = rng.standard_normal(shape).astype(value.dtype.numpy())
        else:
            feeds[value.name or ""] = rng.integers(0, 4, shape).astype(value.dtype.numpy())
    return feeds


@pytest.fixture
def check() -> Check:
    """``check(text, composites, **initializers)``: recognise the graph, compare outputs at 1e-5, count composites."""

    def apply(
        text: str,
        expected: dict[str, int],
        *,
        dims: dict[str, int] | None = None,
        feeds: dict[str, np.ndarray] | None = None,
        tolerance: float = 1e-5,
        opset: int = 18,
        **weights: np.ndarray,
    ) -> tuple[ir.Model, Recognised]:
        model = graph(text, opset, **weights)
        result, report = recognise(model)
        for seed in (0, 1):
            inputs = {**random_feeds(model, seed, **(dims or {})), **(feeds or {})}
            before, after = run(model, inputs), run(result, inputs)
            for x, y in zip(before, after):
                assert x.shape == y.shape
                np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance)
        assert dict(report.composites) == expected, str(report)
        return result, report

    return apply


def graph(text: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """A model from the text form of its graph, with initializers."""
    header = f'<ir_version: 9, opset_import: ["" : {opset}]>\n'
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    return ir.from_onnx_text(header + text, initializers=tensors)


@pytest.fixture
def make() -> Callable[..., ir.Model]:
    return graph


def weights(*shape: int, seed: int = 3) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


@pytest.fixture
def random_weights() -> Callable[..., np.ndarray]:
    return weights


@pytest.fixture
def execute() -> Callable[..., list[np.ndarray]]:
    return run
