"""What a user types: commands, their output, exit codes, and one clear line when something is wrong."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import qcompile
from qcompile.cli import cli
from qcompile.errors import CalibrationError, RecipeError

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[batch, 32] x) => (float[batch, 16] y)
{
    h = MatMul (x, w1)
    a = Relu (h)
    y = MatMul (a, w2)
}
"""


def write_model(path, poison=False, operator=None):
    model = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for name, shape in (("w1", (32, 48)), ("w2", (48, 16))):
        array = random.standard_normal(shape).astype(np.float32)
        if poison and name == "w2":
            array[3, 4] = np.nan
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    if operator:
        model.graph.node[1].op_type = operator
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "net.onnx")


@pytest.fixture
def samples(tmp_path):
    x = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x)
    return tmp_path / "samples.npz"


def call(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_compile_run_bench(model, samples, tmp_path):
    done = call("compile", model, "--recipe", "w8a8", "--calibration", samples, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    for word in ("bits per weight", "cosine to float", "kernels", "artifact:"):
        assert word in done.output
    ran = call("run", tmp_path / "out", samples, "-o", tmp_path / "y.npz", "--json")
    assert json.loads(ran.output)["y"]["shape"] == [8, 16]
    assert np.load(tmp_path / "y.npz")["y"].shape == (8, 16)
    timed = call(
        "bench", tmp_path / "out", "--against", "onnxruntime", "--shape", "batch=4", "--seconds", "0.05", "--json"
    )
    (times,) = json.loads(timed.output).values()
    assert {"qcompile", "ORT float", "ORT int8"} <= times.keys() and min(times.values()) > 0


def test_json_report_and_stages(model, samples, tmp_path):
    done = call(
        "compile", model, "--calibration", samples, "-o", tmp_path / "o", "--json", "--keep-stages", tmp_path / "s"
    )
    report = json.loads(done.output)
    assert len(report["layers"]) == 2 and report["quality"]["program_to_float_cosine"] > 0.999
    stages = sorted(p.name for p in (tmp_path / "s").glob("*.onnx"))
    assert stages == [
        "01-captured.onnx",
        "02-recognised.onnx",
        "03-transformed.onnx",
        "04-quantized.onnx",
        "05-lowered.onnx",
    ]
    from qcompile import ort

    feeds = dict(np.load(samples))
    runs = [ort.run(ort.session(tmp_path / "s" / name), feeds)["y"] for name in stages[:4]]
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-3, atol=1e-4)
    assert 0 < np.linalg.norm(runs[3] - runs[0]) < 0.02 * np.linalg.norm(runs[0])


def test_formats_weights_and_solvers_can_be_changed(model, samples, tmp_path):
    options = ("--weight", "int4/g16/asym", "--solver", "gptq", "--activation", "none")
    done = call("compile", model, "--calibration", samples, "-o", tmp_path / "o", "--json", *options)
    layers = json.loads(done.output)["layers"]
    assert {(layer["weight_format"], layer["activation_format"], layer["solver"]) for layer in layers} == {
        ("int4/g16/asym", "none", "gptq")
    }


def test_weights_in_an_external_file(model, samples, tmp_path):
    """As ``torch.onnx.export`` writes them."""
    net = onnx.load(model)
    (tmp_path / "apart").mkdir()
    apart = tmp_path / "apart" / "net.onnx"
    onnx.save(net, apart, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    done = call("compile", apart, "--calibration", samples, "-o", tmp_path / "o", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["quality"]["program_to_float_cosine"] > 0.999


@pytest.mark.parametrize("reference", ["my_net:build", "{folder}/my_net.py:build"])
def test_a_module_in_the_current_folder_or_a_file(reference, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "my_sizes.py").write_text("WIDTH = 24\n")
    (tmp_path / "my_net.py").write_text(
        "import torch\nfrom my_sizes import WIDTH\n"
        "def build():\n    return torch.nn.Linear(WIDTH, 8), (torch.ones(2, WIDTH),)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_net", "my_sizes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if not reference.startswith("{"):
        monkeypatch.chdir(tmp_path)
    done = call("inspect", reference.format(folder=tmp_path), "--json")
    assert done.exit_code == 0, done.output
    assert [site["shape"] for site in json.loads(done.output)["linears"]] in ([[24, 8]], [[8, 24]])


@pytest.mark.parametrize("command", ["recipes", "formats", "targets"])
def test_lists(command):
    rows = json.loads(call(command, "--json").output)
    assert len(rows) > 3 and call(command).exit_code == 0


def test_inspect(model):
    content = json.loads(call("inspect", model, "--json").output)
    assert content["operators"]["MatMul"] == 2 and len(content["linears"]) == 2
    text = call("inspect", model).output
    assert "MatMul" in text and "x: FLOAT[batch,32]" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.onnx"], 3, "missing.onnx"),
        (["{model}", "--recipe", "w9"], 10, "unknown recipe 'w9'"),
        (["{model}", "--target", "pdp11"], 8, "unknown target 'pdp11'"),
        (["{model}", "--weight", "int99"], 9, "int99"),
        (["{model}", "--solver", "magic"], 10, "magic"),
        (["{model}", "--calibration", "none.npz"], 5, "none.npz"),
        (["{model}", "--recipe", "w8a8-static"], 5, "calibration"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(model, tmp_path, arguments, code, message):
    done = call("compile", *(a.format(model=model) for a in arguments), "-o", tmp_path / "out")
    lines = done.output.strip().splitlines()
    assert done.exit_code == code, done.output
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_nan_weights_and_unknown_operators_are_named(tmp_path):
    done = call(
        "compile", write_model(tmp_path / "nan.onnx", poison=True), "--recipe", "w8a8-rtn", "-o", tmp_path / "o"
    )
    assert done.exit_code == 3 and "w2" in done.output
    done = call(
        "compile",
        write_model(tmp_path / "odd.onnx", operator="Frobnicate"),
        "--recipe",
        "w8a8-rtn",
        "-o",
        tmp_path / "o",
    )
    assert done.exit_code == 4 and "Frobnicate" in done.output
    assert not (tmp_path / "o").exists()


def test_an_existing_output_is_kept(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("dear")
    done = call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out")
    assert done.exit_code == 7 and "exists" in done.output
    assert call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out", "--force").exit_code == 7
    assert (tmp_path / "out" / "letter").read_text() == "dear"


def test_wrong_inputs_at_run_time(model, tmp_path):
    call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out", "--quiet")
    np.savez(tmp_path / "bad.npz", x=np.zeros((2, 31), np.float32))
    done = call("run", tmp_path / "out", tmp_path / "bad.npz")
    assert done.exit_code == 6 and "31 along axis 1" in done.output
    (tmp_path / "junk.npz").write_bytes(b"junk")
    assert call("run", tmp_path / "out", tmp_path / "junk.npz").exit_code == 6
    assert call("run", tmp_path / "nowhere", tmp_path / "bad.npz").exit_code == 7


def test_outputs_go_to_the_file_named_and_json_is_json(model, tmp_path):
    call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out", "--quiet")
    np.savez(tmp_path / "nan.npz", x=np.full((2, 32), np.nan, np.float32))
    ran = call("run", tmp_path / "out", tmp_path / "nan.npz", "-o", tmp_path / "y", "--json")
    facts = json.loads(ran.stdout, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert facts["y"]["shape"] == [2, 16] and (tmp_path / "y").is_file()
    text = tmp_path / "text.npz"
    text.write_text("dear")
    ran = call("run", tmp_path / "out", text)
    assert ran.exit_code == 6 and "zip" in ran.output and "pickle" not in ran.output
    ran = call("run", tmp_path / "out", tmp_path / "nan.npz", "--emulate")
    assert ran.exit_code == 8 and "for ARM" in ran.output and "is for x86" in ran.output


def test_artifacts_that_say_too_little_are_refused(model, samples, tmp_path):
    out = tmp_path / "out"
    call("compile", model, "--recipe", "w8a8-rtn", "-o", out, "--quiet")
    whole = json.loads((out / "manifest.json").read_text())
    for part in ({"target": None}, {"target": "x86"}, {"files": {}}):
        (out / "manifest.json").write_text(json.dumps(whole | part))
        assert call("run", out, samples).exit_code == 7
    for text in ("nope", "[]", "{}"):
        (out / "program.json").write_text(text)
        entry = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}
        files = whole["files"] | {"program.json": entry}
        (out / "manifest.json").write_text(json.dumps(whole | {"files": files}))
        done = call("run", out, samples)
        assert done.exit_code == 7 and "program.json" in done.output


def test_no_sample_is_not_without_data(model, samples, tmp_path):
    for option in ("--max-samples", "--max-tokens"):
        assert call("compile", model, "--calibration", samples, "-o", tmp_path / "o", option, "0").exit_code == 2
    with pytest.raises(CalibrationError, match="positive"):
        qcompile.compile(model, calibration=samples, max_samples=0)
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_nothing(model, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    command = [
        sys.executable,
        "-m",
        "qcompile",
        "compile",
        str(model),
        "--recipe",
        "w8a8-rtn",
        "-o",
        str(tmp_path / "out"),
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode not in (0, -signal.SIGXFSZ)
    assert "Traceback" not in done.stderr and "error: " in done.stderr
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_control_c_while_compiling_leaves_nothing(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "qcompile",
        "compile",
        str(model),
        "--recipe",
        "w8a8-rtn",
        "-o",
        str(tmp_path / "out"),
        "--quiet",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit that it is ignored
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob(".out.tmp-*")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_bench_refuses_extents_and_models_that_are_not_the_artifacts(model, tmp_path):
    done = call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    for shape, said in (("batch=1,past=2", "no input has an extent 'past'; extents of this model: batch"),
                        ("batch=-1", "cannot be negative")):  # fmt: skip
        wrong = call("bench", tmp_path / "out", "--shape", shape, "--seconds", "0.01")
        assert wrong.exit_code == 6 and said in wrong.output, wrong.output
    other = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch, 3] other) => (float[batch, 3] y) { y = Tanh(other) }""")
    ir.save(other, tmp_path / "other.onnx")
    wrong = call("bench", tmp_path / "out", "--against", "onnxruntime", "--model", tmp_path / "other.onnx")
    assert wrong.exit_code == 6 and "reads other" in wrong.output, wrong.output


def test_options_that_would_have_no_effect_are_refused(model, tmp_path):
    for options, said in ((["--kv-cache"], "Hugging Face directories"),
                          (["--tokenizer", tmp_path / "none.json"], "none.json does not exist")):  # fmt: skip
        done = call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "out", "--quiet", *options)
        assert done.exit_code == 3 and said in done.output, done.output
    (tmp_path / "file").write_text("kept")
    done = call("compile", model, "--recipe", "w8a8-rtn", "-o", tmp_path / "file", "--quiet")
    assert "not an artifact" in done.output and "--force" not in done.output


@pytest.mark.parametrize(
    "arguments", [("synth", "out", "--place", "--seeds", 0), ("spaces", "model.onnx", "--prove", "--seed", -1)]
)
def test_numbers_out_of_range_are_usage_errors(arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and f"{arguments[-1]} is not in the range" in result.stderr


def test_options_of_capture_are_told_from_fields_of_a_recipe(model):
    with pytest.raises(RecipeError, match=r"pass capture_options=\{'example_inputs'"):
        qcompile.compile(model, example_inputs=(1,))
    with pytest.raises(RecipeError, match="no such field"):
        qcompile.compile(model, wieght="int4")
