"""The FPGA target from a float model to C99, by the commands a user types."""

import json
import shutil

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import qcompile
from qcompile.cli import cli
from qcompile.errors import InputError, TargetError

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[batch, 12] x) => (float[batch, 5] y)
{
    h = MatMul (x, w1)
    b = Add (h, b1)
    a = Relu (b)
    y = MatMul (a, w2)
}
"""


@pytest.fixture
def files(tmp_path):
    model, rng = onnx.parser.parse_model(TEXT), np.random.default_rng(0)
    for name, shape in (("w1", (12, 18)), ("b1", (18,)), ("w2", (18, 5))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((40, 12)).astype(np.float32))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_model_becomes_sources_that_equal_its_integer_onnx_model(files):
    out, data = files / "out", files / "data.npz"
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--calibration", data,
               "--pe-budget", 8, "-o", out, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert sum(n["pe"] * n["simd"] for n in report["hardware"]["nodes"] if n["kind"] == "matvec") <= 8
    assert report["quality"]["program_to_onnx_error"] == 0
    assert report["quality"]["onnx_to_float_cosine"] > 0.97
    for name in ("c/model.c", "hls/model.cpp", "verilog/model.v", "verilog/test_bench.v", "hardware.json"):
        assert (out / name).is_file()
    done = run("simulate", out, data, "--with", "c", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"frames": 40, "differences": 0}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_the_program_cannot_take_is_said(files):
    samples = [{"x": x} for x in np.load(files / "data.npz")["x"][:, None]]
    model = qcompile.compile(files / "model.onnx", target="fpga", recipe="fixed-w8a8", calibration=samples,
                             output=files / "out", progress=False)  # fmt: skip
    x = np.zeros((2, 12), np.float32)
    np.testing.assert_array_equal(model(x), model(x=x))
    for args, named, message in (
        ((x, x), {}, "got 2 inputs, the model takes 1"),
        ((x,), {"x": x}, "'x' is given twice"),
        ((x,), {"z": x}, "no input 'z'"),
        ((), {}, "'x' is missing"),
        ((x[:, :3],), {}, r"'x' has shape \(2, 3\), the program takes \(batch, 12\)"),
        ((np.where(np.arange(12) == 3, np.nan, x),), {}, "'x' holds NaN"),
    ):
        with pytest.raises(InputError, match=message):
            model(*args, **named)


@pytest.mark.parametrize("option", ["luts=many", "pe-budget=1.5", "target-cycles=-1", "softmax-bits=2.5"])
def test_options_that_are_no_numbers_are_refused_before_anything_is_computed(files, option):
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--option", option,
               "-o", files / "out", "--quiet")  # fmt: skip
    assert done.exit_code == TargetError.exit_code
    name, _, value = option.partition("=")
    assert name in done.output and repr(value) in done.output and done.output.count("\n") == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("weight", "option", "multipliers"),
    [
        ("e2m1", "products=lut", None),
        ("e3m2/g6", "products=serial", None),
        ("int4/g6", "products=serial", None),
        ("dual4/g6", "products=lut", None),
        ("ternary/channel", "products=serial", None),
        ("pow2sum2", "products=constant", 0),
        ("pow2sum1", "scales=powers", 0),
        ("fixed<6>", "scales=powers", 0),
    ],
)
def test_every_format_whose_levels_are_integers_reaches_hardware(files, weight, option, multipliers):
    out, data = files / "out", files / "data.npz"
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--weight", weight,
               "--calibration", data, "--pe-budget", 8, "--option", option, "-o", out, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["quality"]["program_to_onnx_error"] == 0
    assert report["quality"]["onnx_to_float_cosine"] > 0.75
    if multipliers is not None:
        assert report["hardware"]["estimate"]["multipliers"] == multipliers
    done = run("simulate", out, data, "--with", "c", "--json")
    assert json.loads(done.stdout) == {"frames": 40, "differences": 0}, done.output


def test_nodes_without_the_products_asked_for_are_reported(files):
    rng = np.random.default_rng(2)
    weight = numpy_helper.from_array(rng.standard_normal((3, 1, 2, 2)).astype(np.float32), "w")
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,3,5,5] x) => (float[n,3,4,4] y)'
        "{ y = Conv<group: int = 3>(x, w) }"
    )
    model.graph.initializer.append(weight)
    onnx.save(model, files / "depthwise.onnx")
    np.savez(files / "images.npz", x=rng.standard_normal((8, 3, 5, 5)).astype(np.float32))
    done = run("compile", files / "depthwise.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--calibration",
               files / "images.npz", "--option", "products=serial", "-o", files / "depthwise", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    (refusal,) = [r for r in report["refusals"] if r["what"] == "products=serial"]
    assert "depthwise has no such unit; it takes lut" in refusal["reason"]


def test_levels_that_are_no_integers_are_refused_by_name(files):
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--weight", "nf4",
               "--calibration", files / "data.npz", "-o", files / "out", "--quiet")  # fmt: skip
    assert done.exit_code == 4
    assert "w1.codes" in done.output and "no integers" in done.output


def test_limits_that_cannot_be_met_say_how_near_one_comes(files):
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--calibration",
               files / "data.npz", "--target-cycles", 0, "-o", files / "out", "--quiet")  # fmt: skip
    assert done.exit_code == 8
    said = " ".join(done.output.split())
    assert "0 cycles per frame are not possible; the fewest are 1" in said and "in any folding" in said


def test_a_recipe_with_dynamic_scales_is_refused_by_name(files):
    done = run(
        "compile", files / "model.onnx", "--target", "fpga", "--recipe", "w8a8-rtn", "-o", files / "out", "--quiet"
    )
    assert done.exit_code == TargetError.exit_code and not (files / "out").exists()
    assert "'x' gets its scale at run time" in done.output and "fixed-w8a8" in done.output


@pytest.mark.parametrize("value, reason", [("true", "yes or no, not 'true'"), ("yes", "yosys is needed")])
def test_measuring_is_refused_before_the_model_is_read(value, reason, monkeypatch):
    from qcompile.codegen.verilog import tools

    monkeypatch.setattr(tools, "find", lambda name, **_: None)
    with pytest.raises(TargetError, match=reason):
        qcompile.compile("no/model.onnx", target="fpga", recipe="fixed-w4a8", options={"measure": value})


def test_scales_of_groups_that_vanish_are_reported(files):
    model = onnx.load(files / "model.onnx")
    w1 = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w1[:6] *= 1e-4
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w1, "w1"))
    onnx.save(model, files / "model.onnx")
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--weight", "int4/g6",
               "--calibration", files / "data.npz", "-o", files / "out", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    (refusal,) = [r for r in json.loads(done.stdout)["refusals"] if r["what"] == "scales of groups"]
    assert "w1" in refusal["where"] and "18 of 36 are below 1/510" in refusal["reason"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_groups_need_not_divide_the_channels(files):
    out, data = files / "out", files / "data.npz"
    done = run("compile", files / "model.onnx", "--target", "fpga", "--recipe", "fixed-w4a8", "--weight", "int4/g8",
               "--calibration", data, "--option", "products=serial", "-o", out, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    done = run("simulate", out, data, "--with", "c", "--json")
    assert json.loads(done.stdout) == {"frames": 40, "differences": 0}, done.output
