"""The search of configs without a GPU: candidates, the journal, the table it writes and the planner reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qcompile.cli import cli
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda import tuned
from qcompile.codegen.kernels.cuda.linear import Float8Activation
from qcompile.codegen.kernels.cuda.plan import Plan, make_plan
from qcompile.codegen.tune.cuda import Batch, Search, batches, candidates
from qcompile.errors import ArtifactError, TargetError
from qcompile.formats import parse_activation, parse_format
from qcompile.kernels import plan
from qcompile.targets import databases
from qcompile.targets.cuda import TARGETS

TARGET = TARGETS["sm_90a"]


def problem(weight: str = "int4/g128", activation: str = "none") -> LinearProblem:
    return LinearProblem(1024, 768, parse_format(weight), parse_activation(activation))


def test_candidates_differ_and_fit() -> None:
    for rows in (1, 8, 16, 64, 512):
        found = candidates(problem(), TARGET, rows, 12)
        assert len({json.dumps([e.family, e.config], sort_keys=True) for e in found}) == len(found) >= 4
        assert all(("stream" in e.family) == (rows < 8) for e in found if rows != 8 and rows != 16)


def fake(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    """Measuring takes no GPU: the time of a candidate is how many came before it, downwards."""

    def measure(self: Search, batch: Batch, sets: Any, until: float, progress: Any) -> None:
        for index in range(len(batch.buckets)):
            trial = batch.trial(index, 1.0 / (1 + len(seen)))
            seen.append(trial)
            self._journal.append(batch.key(index), trial)
            self.trials.setdefault(batch.key(index), {})[trial.name] = trial

    monkeypatch.setattr(Search, "_measure", measure)
    monkeypatch.setattr(Plan, "library_path", lambda self: Path(__file__))


def test_search_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake(monkeypatch, seen)
    journal, p = tmp_path / "t.jsonl", problem()
    first = Search(journal)
    work = batches(p, TARGET, (1, 64), 6)
    first.run(work[:1], workers=0)
    journal.open("a").write('{"problem": "cut o')
    again = Search(journal)
    rest = batches(p, TARGET, (1, 64), 6, again.known())
    assert sum(len(b.buckets) for b in rest) == sum(len(b.buckets) for b in work) - len(work[0].buckets)
    again.run(rest, workers=0)
    names = [(t.family, json.dumps(t.config, sort_keys=True)) for t in seen]
    assert len(set(names)) == len(names)
    again.run(work, until=time.monotonic() - 1, workers=0)
    assert len(seen) == len(names)

    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sm_90a int2 float16 1 1 1": {"family": "cuda-stream"}}))
    again.save(path)
    assert len(json.loads(path.read_text())) == 3
    monkeypatch.setenv("QCOMPILE_TUNED", str(path))
    entry = make_plan(p, TARGET, "float16", "float32", rows=(64,)).entries[0]
    best = again.best()[tuned.name(p, TARGET, 64, "float16")]
    assert (entry.family, {**entry.config, "out": "float16"}) == (best.family, best.config)
    assert entry.config["out"] == "float32"


def test_the_table_of_the_user_goes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = databases.to_write(TARGET)
    assert path == tmp_path / "qcompile" / "tuned" / "cuda.json"
    shipped = tuned.table()
    key, other = list(shipped)[:2]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: {"family": "mine"}}))
    assert tuned.table() == {**shipped, key: {"family": "mine"}} and tuned.table()[other] == shipped[other]


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x86.json"
    path.write_text('{"version": 1, "entries": []}')
    monkeypatch.setenv("QCOMPILE_TUNED", str(path))
    with pytest.raises(ArtifactError, match="no table"):
        make_plan(problem(), TARGET, "float16", "float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_command_needs_a_device() -> None:
    result = CliRunner().invoke(cli, ["tune", "1024x768", "--target", "cuda", "--cpu", "sm_90a"])
    assert result.exit_code != 0 and "no CUDA device" in result.output + str(result.exception)


def test_candidates_take_the_activations() -> None:
    eight = LinearProblem(1024, 768, parse_format("fp8"), Float8Activation())
    assert {e.config["dtype"] for e in candidates(eight, TARGET, 16, 6)} == {"float8_e4m3fn"}
    assert {e.config["dtype"] for e in candidates(problem("int4", "int8/token"), TARGET, 16, 6)} == {"int8"}


def test_candidates_are_what_their_families_can_do() -> None:
    for weight, rows in (("nf4/g64", 1), ("int3/g128", 1), ("int4/g128", 1), ("int6", 16)):
        activation = "int6/token" if weight == "int6" else "none"
        for entry in candidates(problem(weight, activation), TARGET, rows, 24):
            assert not (entry.config.get("raw") and weight.startswith("nf")), "levels are looked up"
            assert not ("persistent" in entry.family and entry.config["raw"] and weight == "int3/g128")
            assert not ("planes" in entry.family and entry.config.get("overlap")), "these launches do not overlap"


@pytest.mark.parametrize(
    ("activation", "config"),
    [
        ("none", {"family": "cuda-tiled", "rows": 64, "wg": 1, "mt": 1, "split": 1, "stages": 4, "ring": 2}),
        ("none", {"family": "cuda-tiled", "rows": 64, "wg": 1, "mt": 1, "split": 1, "stages": 2, "ring": 8}),
        ("int8/token", {"family": "cuda-tiled-shared-int8", "rows": 64, "wg": 1, "mt": 1, "split": 1, "share": 1, "stages": 1}),
    ],
)  # fmt: skip
def test_pipelines_that_would_wait_forever_are_refused(activation: str, config: dict) -> None:
    given = {64: {**config, "wgmma": True, "cluster": True, "resident": 1}}
    with pytest.raises(TargetError, match="cannot have"):
        plan(4096, 256, "int4", activation, torch.float16, "sm_90a", rows=(64,), configs=given)
    enough = {key: value for key, value in given[64].items() if key != "ring"} | {"stages": 4}
    assert plan(4096, 256, "int4", activation, torch.float16, "sm_90a", rows=(64,), configs={64: enough}).entries
