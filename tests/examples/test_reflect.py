"""The transformation of docs/transforms.md is a file of less than 50 lines, and a model compiles with it."""

import sys
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile.passes.asks import apply_asks, registered_asks
from qcompile.passes.spaces import analyse
from qcompile.recipes import Step

FILE = Path(__file__).parents[2] / "examples" / "reflect.py"
sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiles_with_it(tmp_path):
    import miniatures

    ids = np.random.default_rng(0).integers(0, miniatures.TOKENS, (8, 2, 12))
    model = qcompile.compile(
        miniatures.model("llama"),
        recipe="w8a8",
        transforms=[Step(f"{FILE}:Reflect", {"least": 0.0})],
        calibration=[{"input_ids": row} for row in ids],
        output=tmp_path / "out",
        progress=False,
    )
    assert model.report.quality["program_to_float_cosine"] > 0.999
    assert any("spaces changed" in line and "Reflect" in line for line in model.report.transforms)
    assert f"{FILE}:Reflect" in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.filterwarnings("ignore")
def test_it_does_what_it_says():
    import exact

    from qcompile.transforms import resolve

    case = exact.Case.of("llama")
    model, report = case.apply(resolve(Step(f"{FILE}:Reflect", {"least": 0.0})))
    assert report.applied
    name = next(name for name, axes in case.spaces[0].values if axes == (2,))
    before, after = (case.rows(m, [name])[name] for m in (case.spaces.model, model))

    def loudest(rows):
        vector = np.linalg.eigh(rows.T @ rows)[1][:, -1]
        return np.abs(vector).max()

    assert loudest(after) < loudest(before)
    refused = apply_asks(
        None, analyse(exact.Case.of("opt").model), [resolve(Step(f"{FILE}:Reflect"))], exact.Case.of("opt").data
    )[1]
    assert "LayerNorm" in str(refused)


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) < 50
    assert FILE.read_text() in (FILE.parents[1] / "docs" / "transforms.md").read_text(), "the page shows the file"


def test_the_page_names_every_transform():
    from qcompile.transforms import list_transforms

    page = (FILE.parents[1] / "docs" / "transforms.md").read_text()
    learned = {name for name in list_transforms() if "learn" in registered_asks()[name].__module__}
    assert all(f"`{name}`" in page for name in list_transforms().keys() - learned)
