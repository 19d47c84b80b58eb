"""Every row of the rule table: the dimension of its group is the dimension of the numerical null space."""

import logging
import re

import oracle
import pytest
from oracle_rows import ROWS, WITHOUT

from qcompile.passes.spaces.rules import RULES

logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_group_dimension_is_that_of_the_numerical_null_space(name):
    row = ROWS[name]
    model = oracle.parse(row.body, row.inputs, row.constants, row.output)
    assert oracle.numerical(model, blocks=row.blocks, fixed=row.fixed) - row.ignored + row.epsilon == row.dimension
    assert oracle.analysed(model)[1] == row.dimension


def test_every_rule_has_a_row():
    used = {op for row in ROWS.values() for op in re.findall(r"([A-Z]\w+)(?=[<(])", row.body)}
    excused = {op for ops in WITHOUT.values() for op in ops}
    assert not used & excused
    assert {op for _, op in RULES} == (used | excused) & {op for _, op in RULES}, "each rule needs a row or a reason"


def test_every_rule_states_its_algebra():
    for (domain, op), rule in RULES.items():
        assert len(rule.algebra) > 20, f"{domain}::{op} does not say why"
