"""A fixed sample of the ONNX backend node tests; ``benchmarks/onnx_backend.py`` runs all of them."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "onnx_backend.py"
_SPEC = importlib.util.spec_from_file_location("onnx_backend", _PATH)
onnx_backend = importlib.util.module_from_spec(_SPEC)
sys.modules["onnx_backend"] = onnx_backend
_SPEC.loader.exec_module(onnx_backend)

SAMPLE = 120


@pytest.fixture(scope="module")
def outcomes() -> dict[str, onnx_backend.Outcome]:
    """The outcome of every sampled case: one per operator first, then by the hash of the name."""
    cases = onnx_backend.load_cases()
    by_hash = sorted(cases, key=lambda case: zlib.crc32(case.name.encode()))
    first_of: dict[str, None] = {}
    for case in by_hash:
        first_of.setdefault(onnx_backend.operators(case)[0], case)
    chosen = {case.name: case for case in list(first_of.values())[:SAMPLE]}
    return onnx_backend.run_cases(chosen.values(), limit_s=30)


def test_no_case_is_wrong_or_crashes(outcomes: dict[str, onnx_backend.Outcome]) -> None:
    bad = {name: o.detail for name, o in outcomes.items() if o.status not in ("passed", "unsupported")}
    assert not bad


def test_most_cases_pass(outcomes: dict[str, onnx_backend.Outcome]) -> None:
    passed = sum(o.status == "passed" for o in outcomes.values())
    assert len(outcomes) == SAMPLE
    assert passed >= 0.75 * SAMPLE, onnx_backend.summary(outcomes)


def test_a_refusal_names_the_operator_and_the_reason(outcomes: dict[str, onnx_backend.Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome.status == "unsupported":
            subject, _, reason = outcome.detail.partition(": ")
            assert subject and reason, name


def test_a_dying_worker_costs_one_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    cases = [c for c in onnx_backend.load_cases() if c.name in ("test_abs", "test_add", "test_and2d")]
    run = onnx_backend.run_case

    def dies(case: object) -> onnx_backend.Outcome:
        if case.name == "test_add":
            os._exit(11)
        return run(case)

    monkeypatch.setattr(onnx_backend, "run_case", dies)
    found = {name: o.status for name, o in onnx_backend.run_cases(cases, limit_s=30).items()}
    assert found == {"test_abs": "passed", "test_add": "crashed", "test_and2d": "passed"}
