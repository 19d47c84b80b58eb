"""The guide's example of a format works as printed, with every solver."""

import re
from pathlib import Path

import numpy as np
import pytest

from qcompile.formats import base, list_formats, parse_format
from qcompile.solvers import get_solver, list_solvers, output_error

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


@pytest.fixture
def sign(monkeypatch):
    monkeypatch.setattr(base, "_PARSERS", list(base._PARSERS))
    monkeypatch.setattr(base, "_INFO", list(base._INFO))
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.S) if "Sign" in block
    )
    exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})
    return parse_format("sign/g8")


@pytest.mark.parametrize("solver", list_solvers())
def test_the_example_format_works_with_every_solver(sign, solver):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 30)) @ rng.standard_normal((30, 30))
    weight, hessian = rng.standard_normal((30, 4)).astype(np.float32), x.T @ x / 100
    assert parse_format(str(sign)) == sign
    decoded = sign.decode(get_solver(solver).solve(weight, sign, hessian=hessian))
    assert set(np.sign(decoded).ravel()) == {-1, 1}
    assert output_error(weight, decoded, hessian) < output_error(weight, 0 * weight, hessian)


def test_the_table_names_every_family_and_its_bits():
    rows = [line.split("|")[1:-1] for line in GUIDE.read_text("utf-8").splitlines() if line.startswith("| `")]
    rows = [row for row in rows if len(row) == 4]
    for *_, example, bits in rows:
        assert parse_format(example.strip(" `")).bits_per_weight((1024, 1024)) == pytest.approx(float(bits), abs=6e-4)
    text = " ".join(row[0] for row in rows)
    for info in list_formats():
        assert info.spelling.split("<")[0].split("/")[0] in text
