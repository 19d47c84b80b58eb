"""ONNX's own operator tests: whatever ONNX Runtime executes, it executes with the same result after recognition."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.passes.opset import NEWEST, OLDEST
from qcompile.passes.recognise import recognise
from qcompile.passes.validate import validate


def execute(proto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


@pytest.mark.slow
def test_outputs_stay_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    checked, failures = 0, []
    for case in cases:
        opsets = [entry for entry in case.model.opset_import if not entry.domain] if case.model is not None else []
        if not opsets or opsets[0].version < OLDEST:
            continue
        opsets[0].version = min(opsets[0].version, NEWEST)
        inputs, _ = case.data_sets[0]
        feeds = {i.name: value for i, value in zip(case.model.graph.input, inputs) if value is not None}
        try:
            before = execute(case.model, feeds)
        except Exception:
            continue  # ONNX Runtime lacks the operator, or the type
        model = ir.serde.deserialize_model(case.model)
        try:
            validate(model, case.name)
            result, _ = recognise(model)
            known = {value.name for value in result.graph.inputs}
            after = execute(ir.serde.serialize_model(result), {k: v for k, v in feeds.items() if k in known})
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        checked += 1
        for x, y in zip(before, after):
            if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub":
                continue
            same = x.shape == y.shape and x.dtype == y.dtype
            if not same or not np.allclose(
                x.astype(np.float64), y.astype(np.float64), rtol=1e-4, atol=1e-5, equal_nan=True
            ):
                failures.append(case.name)
    assert not failures
    assert checked > 1000
