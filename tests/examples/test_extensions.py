"""The formats and the kernel of examples/ are short files that work without touching the package."""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

import qcompile
from qcompile import extensions
from qcompile.cli import cli
from qcompile.codegen import kernels
from qcompile.codegen.kernels import CPUS, families, register_kernel, select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.errors import ExtensionError, TargetError
from qcompile.formats import base, parse_activation, parse_format
from qcompile.targets import x86

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDENT, LOGARITHM = EXAMPLES / "student_float.py", EXAMPLES / "logarithm.py"


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(96, 160), torch.nn.Linear(160, 39)
        self.example_inputs = (torch.randn(3, 96),)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module", autouse=True)
def registries():
    """What the extensions add is gone after this file's tests, for others list all formats and kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_PARSERS", list(base._PARSERS))
        patch.setattr(base, "_INFO", list(base._INFO))
        patch.setattr(kernels, "_REGISTERED", {kind: list(known) for kind, known in kernels._REGISTERED.items()})
        yield
        for name in [name for name in sys.modules if name.startswith("qcompile_extension_")]:
            del sys.modules[name]
    families.cache_clear()


@pytest.fixture(scope="module", params=["sf4/g32", "sf3", "log4/g32", "log4"])
def compiled(request, tmp_path_factory):
    extensions.load(str(STUDENT if request.param.startswith("sf") else LOGARITHM))
    return request.param, qcompile.compile(
        Mlp().eval(),
        target="x86-64-v3",
        recipe="w8a8-rtn",
        weight=request.param,
        activation="none",
        output=tmp_path_factory.mktemp("out") / "artifact",
        progress=False,
    )


def test_program_and_onnx_model_agree(compiled):
    spelling, model = compiled
    module = Mlp().eval()
    x = module.example_inputs[0]
    mine = model(x.numpy())
    theirs = ort.InferenceSession(str(model.onnx_path)).run(None, {model.inputs[0].name: x.numpy()})[0]
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    expected = module(x).detach().numpy()
    assert np.linalg.norm(mine - expected) < 0.5 * np.linalg.norm(expected), spelling
    assert np.linalg.norm(mine - expected) > 1e-3 * np.linalg.norm(expected), "the format is not in use"


def test_formats_round_trip_and_round_to_the_nearest_level():
    for path, spelling in ((STUDENT, "sf4/g32"), (STUDENT, "sf7"), (LOGARITHM, "log4/g16")):
        extensions.load(str(path))
        fmt = parse_format(spelling)
        assert str(fmt) == spelling
        levels = np.sort(fmt.table)
        assert np.abs(levels).max() == 1
        weight = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
        quantized = fmt.encode(weight)
        step = np.diff(levels).max() * fmt.expand(quantized.scale, 32)
        assert (np.abs(fmt.decode(quantized) - weight) <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("k, n, m, spelling", [(96, 130, 1, "log4/g32"), (72, 1, 7, "log4/g24"), (128, 77, 13, "log4")])
def test_the_kernel_computes_what_the_format_says(k, n, m, spelling):
    extensions.load(str(LOGARITHM))
    rng = np.random.default_rng(k)
    problem = LinearProblem(k, n, parse_format(spelling), parse_activation("none"))
    family = select(problem, x86.AVX2).family
    assert family.name == "x86-logarithm"
    weight, x = problem.weight.encode(rng.normal(size=(k, n))), rng.normal(size=(m, k)).astype(np.float32)
    config = next(c for c in family.configs(problem, x86.AVX2) if c["scales"] == "float32")
    import tvm

    function = tvm.compile(family.build(problem, config, x86.AVX2, "gemm"), target=x86.AVX2.tvm())["gemm"]
    out = np.full((m, n), np.nan, np.float32)
    function(x, *family.pack(problem, config, weight).values(), out)
    np.testing.assert_allclose(out, family.reference(problem, x, None, weight), rtol=1e-4, atol=1e-4)


def test_levels_without_a_zero_are_refused_where_places_must_be_filled():
    extensions.load(str(LOGARITHM))
    problem = LinearProblem(96, 8, parse_format("log4/g20"), parse_activation("none"))
    with pytest.raises(TargetError, match="no level is 0"):
        select(problem, x86.AVX2)


def test_the_command_line_lists_them():
    result = CliRunner().invoke(cli, ["--extension", str(STUDENT), "--extension", str(LOGARITHM), "formats"])
    assert result.exit_code == 0
    assert "sf<2-8>" in result.output and "log4" in result.output


def test_the_environment_names_extensions(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError('from mine')")
    monkeypatch.setenv("QCOMPILE_EXTENSIONS", str(tmp_path / "mine.py"))
    result = CliRunner().invoke(cli, ["formats"])
    assert result.exit_code == ExtensionError.exit_code and "from mine" in result.output


@pytest.mark.parametrize(
    "value, places",
    [
        ("one.py  a.module", ["one.py", "a.module"]),
        ("my own/one.py:a.module", ["my own/one.py", "a.module"]),
        ("my own/one.py:", ["my own/one.py"]),
        ("one.py : a.module", ["one.py", "a.module"]),
    ],
)
def test_the_environment_separates_them_by_blanks_or_as_paths(value, places, monkeypatch):
    loaded = []
    monkeypatch.setattr(extensions, "load", loaded.append)
    monkeypatch.setenv("QCOMPILE_EXTENSIONS", value.replace(":", os.pathsep))
    assert CliRunner().invoke(cli, ["formats"]).exit_code == 0
    assert loaded == places


@pytest.mark.parametrize(
    "text, reason", [(None, "No such file"), ("x = (", "SyntaxError"), ("import nowhere", "nowhere")]
)
def test_a_broken_extension_is_one_line(tmp_path, text, reason):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(cli, ["--extension", str(path), "formats"])
    assert result.exit_code == ExtensionError.exit_code
    assert result.output.startswith(f"error: {path}") and reason in result.output and result.output.count("\n") == 1


def test_an_extension_is_loaded_once(tmp_path):
    path = tmp_path / "count.py"
    path.write_text("import sys\nsys.count_loads = getattr(sys, 'count_loads', 0) + 1\n")
    assert extensions.load(str(path)) is extensions.load(str(path))
    assert sys.count_loads == 1


def test_kernels_are_added_for_cpus_only():
    assert all(families(kind) for kind in CPUS)
    with pytest.raises(TargetError, match="fpga"):
        register_kernel("fpga")


def test_a_kernel_needs_a_name_of_its_own():
    before = families("x86")

    class Unnamed(type(before[0])):
        pass

    with pytest.raises(TargetError, match="give Unnamed a name of its own"):
        register_kernel("x86")(Unnamed)
    assert families("x86") == before


def test_they_are_short():
    assert len(STUDENT.read_text().splitlines()) < 50
    assert len(LOGARITHM.read_text().splitlines()) < 65
