"""The rule that docs/recognise.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from qcompile.passes.recognise import Recognised, symbols
from qcompile.passes.recognise.pattern import Op, Var, first, outside_readers
from qcompile.passes.recognise.rule import Rule, apply_rules, emit, substitute

PAGE = Path(__file__).parents[3] / "docs" / "recognise.md"


def test_the_rule_on_the_page(make, execute) -> None:
    text = PAGE.read_text(encoding="utf-8")
    code = text[text.index('    _X = Var("x")') : text.index("Commutative operators match")]
    names = {"Op": Op, "Var": Var, "Rule": Rule, "first": first, "outside_readers": outside_readers, "emit": emit}
    names["substitute"] = substitute
    exec(re.sub(r"(?m)^    ", "", code), names)
    model = make("g (float[b, 4] x) => (float[b, 4] y) { s = Softplus(x) t = Tanh(s) y = Mul(t, x) }")
    symbols.infer(model)
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    before = execute(model, {"x": x})
    report = Recognised()
    assert apply_rules(model, [names["MishRule"]()], report) == 1
    assert [node.op_type for node in model.graph] == ["Mish"]
    np.testing.assert_allclose(execute(model, {"x": x})[0], before[0], atol=1e-6)
