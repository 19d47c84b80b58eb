"""Tuning: the search, its journal, the database, and measuring here and through an RPC tracker."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("tvm")

from click.testing import CliRunner

from qcompile.cli import cli
from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.tune import Database, Measured, database_for, tune, tune_all
from qcompile.codegen.tune.measure import LocalRunner, RpcRunner, Runner
from qcompile.codegen.tune.search import Journal, Trial, fastest
from qcompile.errors import ArtifactError, TargetError
from qcompile.formats import parse_activation, parse_format
from qcompile.targets import x86

PROBLEM = LinearProblem(384, 256, parse_format("int4/g32"), parse_activation("int8"))


class Counted(Runner):
    """A machine on which one family and one choice is fastest, and which may break down."""

    machine = "imagined"

    def __init__(self, best=("x86-lut", {"rows": 2}), fails_after=1000):
        self.best, self.fails_after, self.calls = best, fails_after, []

    def time(self, problem, family, config, target, rows):
        if len(self.calls) >= self.fails_after:
            raise KeyboardInterrupt
        self.calls.append((family.name, config))
        name, choices = self.best
        slow = (family.name != name) + sum(config.get(key) != value for key, value in choices.items())
        return [1e-6 * m * (1 + slow) for m in rows]


def entry(**changes):
    family = next(f for f in families("x86") if f.name == "x86-maddubs")
    config = family.configs(PROBLEM, x86.AVX2)[1]
    fields = {"k": 384, "n": 256, "weight": "int4/g32", "activation": "int8/token", "rows": (1, 16, 128), "threads": 1}
    return Measured(**{**fields, "family": family.name, "config": config, "microseconds": (1.0, 2.0, 3.0),
                       "trials": 4, "machine": "here", **changes})  # fmt: skip


def test_the_search_finds_what_is_fastest():
    runner = Counted(("x86-lut", {"rows": 2, "prefetch": 1024}))
    found = tune(PROBLEM, x86.AVX2, runner, trials=20)
    assert found.family == "x86-lut" and (found.config["rows"], found.config["prefetch"]) == (2, 1024)
    assert len(runner.calls) == found.trials == 20
    names = [json.dumps(call) for call in runner.calls]
    assert len(set(names)) == len(names), "nothing is measured twice"


def test_a_space_smaller_than_the_trials_is_searched_whole():
    total = sum(len(f.configs(PROBLEM, x86.AVX2)) for f in families("x86") if f.supports(PROBLEM, x86.AVX2))
    assert tune(PROBLEM, x86.AVX2, Counted(), trials=10_000).trials == total


def test_a_search_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "db.json"
    broken = Counted(fails_after=3)
    with pytest.raises(KeyboardInterrupt):
        tune_all([PROBLEM], x86.AVX2, broken, 6, path)
    assert not path.exists()
    journal = path.with_suffix(".trials.jsonl")
    with journal.open("a") as file:
        file.write('{"problem": "cut o')
    runner = Counted()
    database = tune_all([PROBLEM], x86.AVX2, runner, 6, path)
    assert len(runner.calls) == 3, "half of the trials were known"
    assert not journal.exists() and Database.load(path).entries == database.entries


def test_a_line_after_one_cut_off_is_whole(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"problem": "p", "fam')
    Journal(path).append("p", Trial("f", {"a": 1}, (1.0,)))
    assert Journal(path).read("p") == [Trial("f", {"a": 1}, (1.0,))]
    assert Journal(path).read("q") == []


def test_selection_takes_what_was_measured_and_names_its_neighbour():
    database = Database("x86/x86-64-v3", [entry(), entry(k=4096, n=4096, config={**entry().config, "mr": 4})])
    exact = select(PROBLEM, x86.AVX2, database)
    assert (exact.family.name, exact.config) == ("x86-maddubs", entry().config)
    assert "384 x 256 on here" in exact.reason and "nearest" not in exact.reason
    near = select(LinearProblem(512, 256, PROBLEM.weight, PROBLEM.activation), x86.AVX2, database)
    assert "384 x 256" in near.reason and "nearest" in near.reason
    far = select(LinearProblem(64, 64, PROBLEM.weight, PROBLEM.activation), x86.AVX2, database)
    assert "expected" in far.reason
    other = select(LinearProblem(384, 256, parse_format("int4/g64"), PROBLEM.activation), x86.AVX2, database)
    assert "expected" in other.reason
    assert "expected" in select(PROBLEM, x86.AVX512, database).reason


def test_a_config_of_another_shape_is_brought_into_the_own_space():
    database = Database(
        "x86/x86-64-v3", [entry(family="x86-lut", config={"bytes": 32, "columns": 64, "block_rows": 4})]
    )
    choice = select(PROBLEM, x86.AVX2, database)
    assert choice.config in choice.family.configs(PROBLEM, x86.AVX2)
    assert "no longer offered" in choice.reason


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "db.json"
    database = Database("x86/x86-64-v3", [entry()])
    database.save(path)
    assert Database.load(path).entries == database.entries
    assert [p.name for p in tmp_path.iterdir()] == ["db.json"]
    path.write_text('{"version": 9, "target": "", "entries": []}')
    with pytest.raises(ArtifactError, match="version 9"):
        Database.load(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="no tuned database"):
        Database.load(path)


def test_what_leaves_nothing_to_measure_is_refused(tmp_path, monkeypatch):
    from qcompile import artifact

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with artifact.staged(tmp_path / "out") as folder:
        (folder / "program.json").write_text("{}")
        artifact.write_manifest(folder, {"target": {"kind": "fpga"}})
    done = CliRunner().invoke(cli, ["tune", str(tmp_path / "out")])
    assert done.exit_code == 6 and "no quantized products" in done.output and "written" not in done.output
    assert CliRunner().invoke(cli, ["tune", "64x48", "--trials", "0"]).exit_code == 2


def test_results_go_to_a_folder_of_the_user_and_are_used_before_those_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    what = ["tune", "4096x4096", "64x48", "--target", "x86-64-v3", "--weight", "int8", "--trials", "1"]
    monkeypatch.setattr(LocalRunner, "time", lambda *arguments: [1.0, 2.0, 3.0])
    monkeypatch.setattr(LocalRunner, "__post_init__", lambda self: setattr(self, "machine", "mine"))
    written = tmp_path / "qcompile" / "tuned" / "x86-64-v3.json"
    done = CliRunner().invoke(cli, what)
    assert done.exit_code == 0 and str(written) in done.stdout, done.output

    def reason(k, n, weight="int8"):
        problem = LinearProblem(k, n, parse_format(weight), parse_activation("int8"))
        return select(problem, x86.AVX2, database_for(x86.AVX2)).reason

    assert reason(4096, 4096) == "measured fastest for 4096 x 4096 on mine"
    assert reason(64, 48) == "measured fastest for 64 x 48 on mine"
    assert reason(1536, 384).startswith("measured fastest for 1536 x 384 on AMD"), "what ships is still there"
    assert reason(4096, 4096, "int2/g128").startswith("measured fastest for 4096 x 4096 on AMD")
    # The variable names the file to write and to read in place of both.
    monkeypatch.setenv("QCOMPILE_TUNED", str(tmp_path / "other.json"))
    assert "expected" in reason(4096, 4096)
    assert CliRunner().invoke(cli, what).exit_code == 0
    assert list(Database.load(tmp_path / "other.json").entries) == list(Database.load(written).entries)
    assert "mine" in reason(64, 48) and "expected" in reason(1536, 384, "int2/g128")


def test_a_file_of_another_target_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = tmp_path / "qcompile" / "tuned" / "x86-64-v3.json"
    path.parent.mkdir(parents=True)
    Database("arm/cortex-a76", [entry()]).save(path)
    with pytest.raises(ArtifactError, match=f"{re.escape(str(path))} holds results for arm/cortex-a76"):
        database_for(x86.AVX2)


@pytest.mark.parametrize("named", [["--database", "{0}/file/db.json"], ["--database", "{0}"], []])
def test_a_database_that_cannot_be_written_is_refused_before_anything_is_measured(named, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(LocalRunner, "time", lambda *arguments: pytest.fail("it was measured"))
    what = ["tune", "64x48", "--target", "x86-64-v3", "--weight", "int2/g32", "--trials", "1"]
    done = CliRunner().invoke(cli, [*what, *(part.format(tmp_path) for part in named)])
    assert done.exit_code == ArtifactError.exit_code and len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr and str(tmp_path) in done.stderr and "QCOMPILE_TUNED" in done.stderr


def test_another_target_is_refused(tmp_path):
    path = tmp_path / "db.json"
    Database("arm/cortex-a76").save(path)
    with pytest.raises(TargetError, match="cortex-a76"):
        tune_all([PROBLEM], x86.AVX2, Counted(), 1, path)


def test_the_fastest_counts_every_number_of_rows_alike():
    balanced, lopsided = Trial("a", {}, (1.1, 110.0)), Trial("b", {}, (2.0, 100.0))
    assert fastest([balanced, lopsided]) is balanced


def test_this_machine_is_measured():
    problem = LinearProblem(64, 64, parse_format("int2/g32"), parse_activation("int8"))
    found = tune(problem, x86.AVX2, LocalRunner(seconds=0.001), trials=2)
    assert found.trials == 2 and len(found.microseconds) == 3 and min(found.microseconds) > 0


BOARD = """
import sys, time
from tvm.rpc.server import PopenRPCServerState
from tvm.rpc.tracker import PopenTrackerServerState
port = int(sys.argv[1])
tracker = PopenTrackerServerState("127.0.0.1", port, port + 1, silent=True)
PopenRPCServerState("127.0.0.1", port + 1, port + 90, False, ("127.0.0.1", port), "board", silent=True)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(importlib.util.find_spec("tornado") is None, reason="TVM's RPC tracker needs tornado (extra tune)")
def test_a_board_behind_a_tracker_is_measured(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    board = subprocess.Popen(
        [sys.executable, "-c", BOARD, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        assert board.stdout.readline() == "ready\n"
        time.sleep(0.5)
        what = ["tune", "64x48", "--target", "x86-64-v3", "--weight", "int2/g32", "--rows", "2", "--trials", "2"]
        where = ["--rpc", f"127.0.0.1:{port}", "--key", "board", "--database", str(tmp_path / "db.json")]
        done = CliRunner().invoke(cli, [*what, *where])
        assert done.exit_code == 0, done.output
        (entry,) = Database.load(tmp_path / "db.json").entries.values()
        assert (entry.machine, entry.trials, entry.rows) == ("board", 2, (2,)) and entry.microseconds[0] > 0
        with pytest.raises(TargetError, match=r"no board 'other' at tracker .* it knows board"):
            RpcRunner("127.0.0.1", port, "other").session()
    finally:
        os.killpg(board.pid, signal.SIGKILL)
        board.wait()


def test_a_tracker_that_is_not_there_is_named():
    pytest.importorskip("tornado")
    with pytest.raises(TargetError, match=r"127\.0\.0\.1:1"):
        RpcRunner("127.0.0.1", 1, "board").session()
