"""Tuning for ARM without a board: instructions counted under qemu, the same in every run, and what is made of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from qcompile.cli import cli
from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.tune import Database, database_for, tune
from qcompile.codegen.tune.measure import CountingRunner
from qcompile.formats import parse_activation, parse_format
from qcompile.targets import get_target

TARGET = get_target("cortex-a76", cores=1)
PROBLEM = LinearProblem(128, 64, parse_format("int2/g32"), parse_activation("int8"), m=1)


def test_counts_are_the_same_in_every_run_and_choose_the_kernel(counting):
    able = [family for family in families("arm") if family.supports(PROBLEM, TARGET)]
    runner = CountingRunner()
    counts = {}
    for family in able:
        config = family.configs(PROBLEM, TARGET)[0]
        counts[family.name] = runner.time(PROBLEM, family, config, TARGET, (1,))
    again = runner.time(PROBLEM, able[0], able[0].configs(PROBLEM, TARGET)[0], TARGET, (1,))
    assert again == counts[able[0].name]
    found = tune(PROBLEM, TARGET, runner, trials=len(able))
    assert found.family == min(counts, key=counts.get)
    assert found.instructions == (round(1e6 * counts[found.family][0]),) and found.microseconds == ()
    choice = select(PROBLEM, TARGET, Database(str(TARGET), [found]))
    assert choice.family.name == found.family and "fewest instructions" in choice.reason


def test_the_command_goes_on_after_a_kill(counting, tmp_path):
    path = tmp_path / "db.json"
    what = ["tune", "128x64", "--target", "arm", "--cpu", "apple-m2", "--weight", "int2/g32", "--rows", "1"]
    command = [sys.executable, "-m", "qcompile", *what, "--trials", "4", "--database", str(path)]
    journal = path.with_suffix(".trials.jsonl")
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not journal.exists() or not journal.read_text():
        assert running.poll() is None, "it ended before it measured anything"
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    known = len(journal.read_text().splitlines())
    done = CliRunner().invoke(cli, command[3:])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("instructions  arm-") == 4 - known, "what was counted is not counted again"
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["trials"] == 4 and len(entry["instructions"]) == 1 and "microseconds" not in entry


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76", "neoverse-v1"])
def test_what_is_shipped_can_be_built(cpu):
    target = get_target(cpu, cores=1)
    database = database_for(target)
    by_name = {family.name: family for family in families("arm")}
    for entry in database.entries.values():
        problem = LinearProblem(entry.k, entry.n, parse_format(entry.weight), parse_activation(entry.activation))
        assert by_name[entry.family].supports(problem, target)
        assert entry.config in by_name[entry.family].configs(problem, target)
        assert len(entry.instructions) == len(entry.rows)


def test_shipped_counts_choose_the_kernel():
    for weight, family in (("int2/g128", "arm-tbl"), ("int4/g128", "arm-sdot")):
        problem = LinearProblem(4096, 4096, parse_format(weight), parse_activation("int8"), m=1)
        choice = select(problem, TARGET, database_for(TARGET))
        assert choice.family.name == family and "fewest instructions for 4096 x 4096" in choice.reason


def test_a_processor_uses_the_counts_of_one_with_the_same_instructions(monkeypatch):
    problem = LinearProblem(4096, 4096, parse_format("int2/g128"), parse_activation("int8"), m=1)
    for cpu, counted in (("neoverse-n1", "cortex-a76"), ("cortex-a53", "cortex-a72"), ("apple-m2", "neoverse-v1")):
        target = get_target(cpu)
        choice = select(problem, target, database_for(target))
        assert f"fewest instructions for 4096 x 4096 on qemu-user, {counted}" in choice.reason
    monkeypatch.setenv("QCOMPILE_TUNED", "nowhere.json")
    assert database_for(get_target("neoverse-n1")) is None
