"""Mixtures of experts from a Hugging Face directory: they compile, and all their weights are quantized."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompile
from qcompile import ort
from qcompile.calibration.experts import ExpertMoments
from qcompile.passes.recognise import recognise
from qcompile.passes.sites import expert_sites
from qcompile.recipes.recipe import Override

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "num_experts_per_tok": 2}  # fmt: skip
MODELS = {
    "Qwen2Moe": {"intermediate_size": 52, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
                 "num_experts": 5},
    "DeepseekV3": {"intermediate_size": 52, "moe_intermediate_size": 20, "num_key_value_heads": 4, "n_routed_experts": 4,
                   "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 12,
                   "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_quantized_and_the_report_has_them_as_layers(name, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    module.save_pretrained(tmp_path / "model")
    model = qcompile.compile(tmp_path / "model", recipe="w8a8-rtn", output=tmp_path / "out", progress=False)
    ids = np.random.default_rng(0).integers(0, 97, (2, 7))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = model(feed)
    expected = module(torch.from_numpy(ids)).logits.detach().numpy()
    # A router that is nearly undecided may pick another expert than the float model for single tokens.
    assert np.median(np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)) < 0.05
    emitted = next(iter(ort.run(ort.session(model.onnx_path), feed).values()))
    np.testing.assert_allclose(logits, emitted, atol=1e-4)

    stacks = [p for key, p in module.named_parameters() if ".experts." in key and p.ndim == 3]
    layers = [layer for layer in model.report.layers if layer.kind == "experts"]
    assert len(layers) == len(stacks) > 0 and all("experts" in layer.name for layer in layers)
    assert sum(math.prod(layer.shape) for layer in layers) == sum(p.numel() for p in stacks)
    routers = {r.where for r in model.report.refusals if "this router" in r.reason}
    gates = [p for key, p in module.named_parameters() if key.endswith("mlp.gate.weight")]
    assert len(routers) == len(gates) > 0 and all("gate" in name for name in routers)
    assert model.report.float_weights == sum(p.numel() for p in gates)
    assert not [r for r in model.report.refusals if "stay float" in r.reason]
    assert all(layer.kernel for layer in layers)
    left = {tuple(i.dims) for i in onnx.load(model.onnx_path, load_external_data=False).graph.initializer}
    assert not left & {shape for p in stacks for shape in (tuple(p.shape), (p.shape[0], p.shape[2], p.shape[1]))}


def test_steps_of_a_cache_continue_the_prompt(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, intermediate_size=52, num_local_experts=3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    options = {"capture_options": {"kv_cache": True}, "output": tmp_path / "out", "progress": False}
    step = qcompile.compile(tmp_path / "model", recipe="w8a8-rtn", **options)
    names = [s.name for s in step.inputs if s.name.startswith("past")]

    def run(ids, past):
        before = past[0].shape[2]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), before + ids.shape[1]), np.int64),
            "position_ids": np.tile(np.arange(before, before + ids.shape[1]), (len(ids), 1)),
        }
        out = step.run({**feed, **dict(zip(names, past))})
        return out.pop("logits"), list(out.values())

    ids = np.random.default_rng(0).integers(0, 97, (2, 9))
    past = [np.zeros((2, 2, 0, 10), np.float32)] * len(names)
    whole, _ = run(ids, past)
    for position in range(9):
        logits, past = run(ids[:, position : position + 1], past)
        expected = whole[:, position]
        assert np.abs(logits[:, 0] - expected).max() < 0.05 * np.abs(expected).max()


ROUTED = """
<ir_version: 10, opset_import: ["" : 21]>
routed (float[batch, 12] x) => (float[batch, 9] y) {
    scores = MatMul (x, router)
    best, picked = TopK <axis=-1> (scores, two)
    ids = Reshape (picked, rest)
    middle = Unsqueeze (x, one)
    spread = Expand (middle, each)
    repeated = Reshape (spread, wide)
    row = Unsqueeze (repeated, one)
    w = Gather <axis=0> (stack, ids)
    product = MatMul (row, w)
    flat = Squeeze (product, one)
    pairs = Reshape (flat, back)
    y = ReduceSum <keepdims=0> (pairs, one)
}
"""


def routed(experts=4):
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(ROUTED)
    weights = {
        "router": rng.standard_normal((12, experts)).astype(np.float32),
        "stack": rng.standard_normal((experts, 12, 9)).astype(np.float32),
        "two": np.array([2]), "rest": np.array([-1]), "one": np.array([1]), "each": np.array([1, 2, 1]),
        "wide": np.array([-1, 12]), "back": np.array([-1, 2, 9]),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    return model, weights


def test_each_expert_is_solved_for_the_rows_it_gets(tmp_path):
    model, weights = routed()
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((400, 4)) @ rng.standard_normal((4, 12)) + 0.1 * rng.standard_normal((400, 12))).astype(
        "f"
    )
    done = {}
    for solver in ("rtn", "gptq"):
        done[solver] = qcompile.compile(
            model, recipe="w4a8", solver=solver, weight="int2", transforms=(), calibration=[{"x": x}], progress=False,
            output=tmp_path / solver,
        )  # fmt: skip
    exact = _reference(x, weights)

    def error(solver):
        return np.linalg.norm(done[solver]({"x": x}) - exact)

    assert error("gptq") < 0.9 * error("rtn")
    (layer,) = [layer for layer in done["gptq"].report.layers if layer.kind == "experts"]
    assert layer.output_error is not None and layer.shape == (12, 4 * 9)
    assert not [r for r in done["gptq"].report.refusals if "Hessian" in r.what]


def test_a_router_stays_float_unless_an_override_names_it(tmp_path):
    model, weights = routed()
    options = {"recipe": "w8a8-rtn", "weight": "int2", "activation": "none", "progress": False}
    x = np.random.default_rng(3).standard_normal((64, 12)).astype(np.float32)
    spared = qcompile.compile(model, output=tmp_path / "spared", **options)
    (router,) = [r.where for r in spared.report.refusals if "this router" in r.reason]
    named = (Override(router, weight="int2"),)
    rounded = qcompile.compile(model, output=tmp_path / "all", overrides=named, **options)
    assert len(spared.report.layers) + 1 == len(rounded.report.layers)
    exact = _reference(x, weights)
    assert np.linalg.norm(spared({"x": x}) - exact) < 0.8 * np.linalg.norm(rounded({"x": x}) - exact)


def test_the_report_names_experts_that_saw_too_little(tmp_path):
    model, _ = routed()
    x = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32)
    done = qcompile.compile(model, recipe="w4a8", solver="gptq", calibration=[{"x": x}], progress=False)
    (said,) = [r for r in done.report.refusals if r.what == "Hessian of each expert"]
    assert "4 of 4 experts" in said.reason


def test_moments_are_those_of_an_experts_own_rows():
    site = expert_sites(recognise(ir.from_proto(routed()[0]))[0])[0]
    assert (site.experts, site.repeat, site.x.name) == (4, 2, "x")
    moments, rng = ExpertMoments(site), np.random.default_rng(2)
    rows = [rng.standard_normal((n, 12)).astype(np.float32) for n in (30, 41)]
    ids = [rng.integers(0, 3, (len(r), 2)) for r in rows]  # nobody asks for the last expert
    for some, to in zip(rows, ids):
        moments.see_ids(to)
        moments.see_rows(some)
    x, expert = np.concatenate(rows).repeat(2, axis=0), np.concatenate(ids).reshape(-1)
    for e in range(3):
        mine = x[expert == e]
        np.testing.assert_allclose(moments.hessian[e], mine.T @ mine / len(mine), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.hessian[3], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert list(moments.scarce) == [3]


def _reference(x, weights):
    best = np.argsort(-(x @ weights["router"]), axis=-1)[:, :2]
    return np.einsum("tk,tjkn->tn", x, weights["stack"][best])


CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[batch, 12] x, int64[batch] i) => (float[batch, 9] y) {
    row = Unsqueeze (x, one)
    a = Gather <axis=0> (A, i)
    p = MatMul (row, a)
    b = Gather <axis=0> (B, i)
    q = MatMul (p, b)
    y = Squeeze (q, one)
}
"""


@pytest.mark.parametrize("activation", ["int8/token", "none"])
@pytest.mark.parametrize("between", ["", "s = Squeeze (p, one)\n r = Unsqueeze (s, one)"])
def test_a_stack_behind_a_stack(tmp_path, between, activation):
    text = CHAIN.replace("b = Gather", f"{between}\n    b = Gather")
    model = onnx.parser.parse_model(text.replace("MatMul (p,", "MatMul (r,") if between else text)
    rng = np.random.default_rng(0)
    weights = {"A": rng.standard_normal((5, 12, 8)), "B": rng.standard_normal((5, 8, 9))}
    constants = {name: array.astype(np.float32) for name, array in weights.items()} | {"one": np.array([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    options = {"recipe": "w8a8-rtn", "activation": activation, "output": tmp_path / "out", "progress": False}
    done = qcompile.compile(model, **options)
    x, ids = rng.standard_normal((6, 12)).astype(np.float32), np.array([0, 4, 1, 1, 2, 0])
    expected = np.einsum("tk,tkm,tmn->tn", x, weights["A"][ids], weights["B"][ids])
    for feed, want in (({"x": x, "i": ids}, expected), ({"x": x[:0], "i": ids[:0]}, expected[:0])):
        emitted = next(iter(ort.run(ort.session(done.onnx_path), feed).values()))
        for y in (done(feed), emitted):
            assert y.shape == want.shape and np.linalg.norm(y - want) <= 0.03 * np.linalg.norm(want)


def test_transposed_stacks_leave_others_and_the_callers_model_alone(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    right (float[batch, 12] x, int64[batch] i) => (float[batch, 7] y, float[batch, 12, 7] z) {
        column = Unsqueeze (x, last)
        w = Gather <axis=0> (stack, i)
        p = MatMul (w, column)
        y = Squeeze (p, last)
        z = Gather <axis=0> (stack.T, i)
    }
    """.replace("stack.T", "other")
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    stack, other = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7, 12), (5, 12, 7)))
    for name, array in (("stack", stack), ("stack.T", other), ("last", np.array([-1]))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.node[-1].input[0] = "stack.T"
    before = model.SerializeToString(deterministic=True)
    done = qcompile.compile(model, recipe="w8a8-rtn", activation="none", output=tmp_path / "out", progress=False)
    assert model.SerializeToString(deterministic=True) == before
    x, ids = rng.standard_normal((6, 12)).astype(np.float32), np.array([0, 4, 1, 1, 2, 0])
    y, z = done({"x": x, "i": ids})
    expected = np.einsum("tnk,tk->tn", stack[ids], x)
    assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)
    np.testing.assert_array_equal(z, other[ids])


def test_experts_that_are_chosen_beforehand_have_a_hessian(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    fixed (float[3, 1, 40] x) => (float[3, 1, 30] y) { w = Gather <axis=0> (stack, i) y = MatMul (x, w) }
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    stack, ids = rng.standard_normal((64, 40, 30)).astype(np.float32), np.array([3, 3, 60])
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in (("stack", stack), ("i", ids)))
    feeds = [{"x": rng.standard_normal((3, 1, 40)).astype(np.float32)} for _ in range(3)]
    options = {"recipe": "w4a8", "solver": "gptq", "transforms": (), "progress": False, "output": tmp_path / "out"}
    done = qcompile.compile(model, calibration=feeds, **options)
    expected = feeds[0]["x"] @ stack[ids]
    assert np.linalg.norm(done(feeds[0]) - expected) < 0.2 * np.linalg.norm(expected)


def test_hessians_of_the_float_model_are_reported_where_others_were_asked_for(tmp_path):
    model, _ = routed()
    x = np.random.default_rng(1).standard_normal((200, 12)).astype(np.float32)
    for hessian in ("float", "quantized"):
        done = qcompile.compile(
            model, recipe="w4a8", solver="gptq", hessian=hessian, transforms=(), calibration=[{"x": x}], progress=False,
            output=tmp_path / hessian,
        )  # fmt: skip
        told = [r for r in done.report.refusals if r.what == "Hessian of the quantized model"]
        assert len(told) == (hessian == "quantized") and all("float model" in r.reason for r in told)
