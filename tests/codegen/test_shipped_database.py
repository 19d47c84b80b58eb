"""The databases that come with the package can be read, and what they say can be built."""

from pathlib import Path

import pytest

pytest.importorskip("tvm")

import qcompile.targets
from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.tune.database import Database, database_for
from qcompile.formats import parse_activation, parse_format
from qcompile.targets import x86

MEASURED = [(4096, 4096), (1536, 384), (2048, 5632), (11008, 4096), (4096, 11008), (3200, 8640)]
NEAR = [(8192, 8192), (5120, 3000), (768, 768)]
FAR = [(4096, 128256), (65536, 1024), (1024, 65536)]
WEIGHTS = ["int1/g128", "int2/g128", "int3/g128", "int4/g128", "int8"]


def test_every_entry_is_a_config_of_its_family():
    path = Path(next(iter(qcompile.targets.__path__))) / "tuned" / "x86-64-v3.json"
    by_name = {family.name: family for family in families("x86")}
    for entry in Database.load(path).entries.values():
        problem = LinearProblem(entry.k, entry.n, parse_format(entry.weight), parse_activation(entry.activation))
        family = by_name[entry.family]
        assert family.supports(problem, x86.AVX2)
        assert entry.config in family.configs(problem, x86.AVX2)
        assert len(entry.microseconds) == len(entry.rows) and min(entry.microseconds) > 0


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_usual_shapes_are_chosen_by_measurement(weight, monkeypatch):
    monkeypatch.delenv("QCOMPILE_TUNED", raising=False)
    for k, n in MEASURED + NEAR:
        problem = LinearProblem(k, n, parse_format(weight), parse_activation("int8/token"))
        reason = select(problem, x86.AVX2, database_for(x86.AVX2)).reason
        assert reason.startswith("measured fastest for")
        assert reason.endswith("nearest shape measured") == ((k, n) in NEAR)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_other_shapes_get_the_family_that_was_measured_fastest_for_large_ones(weight, monkeypatch):
    """By the cost model, which the database does not overrule far from what was measured."""
    monkeypatch.delenv("QCOMPILE_TUNED", raising=False)
    database = database_for(x86.AVX2)
    large = {e.family for e in database.entries.values() if e.weight == weight and e.k * e.n >= 1 << 23}
    for k, n in FAR:
        choice = select(LinearProblem(k, n, parse_format(weight), parse_activation("int8/token")), x86.AVX2, database)
        assert "expected" in choice.reason and {choice.family.name} == large
