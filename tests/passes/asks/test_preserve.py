"""Every ask leaves the function alone, in float64, wherever it finds something to do, and it does find something there."""

import logging

import exact
import numpy as np
import pytest

from qcompile.passes.asks import (
    Awq,
    Centre,
    ColumnScale,
    Equalize,
    MoveBias,
    Noise,
    PairScale,
    Permute,
    PromoteClip,
    PromoteSiLU,
    Reparametrize,
    Rotate,
    RotateKeys,
    RotateOnline,
    Smooth,
    SplitChannels,
    Symmetrize,
    apply_asks,
)
from qcompile.passes.execute import run
from qcompile.passes.spaces import analyse
from qcompile.passes.spaces.prove import random_inputs

logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)

CASES = [
    (Smooth(), "llama mixtral glm4_moe gpt_neox opt bert vit swin resnet dit mamba2"),
    (Smooth(search=5), "qwen2 resnet"),
    (Awq(grid=4), "qwen3 opt"),
    (ColumnScale(), "phi3 gemma2"),
    (ColumnScale(1.0, power_of_two=True), "llama"),
    (Equalize(), "mobilenet_v2 resnet llama bert"),
    (Symmetrize(), "llama gpt2 vit phi3"),
    (Symmetrize(online=True), "llama"),
    (Reparametrize(), "vit opt llama"),
    (Noise(), "vit bert"),
    (MoveBias(), "bert gpt2 qwen2 vit"),
    (PairScale(), "llama qwen3 gpt_neox"),
    (Permute("sort"), "llama mamba resnet"),
    (Permute("outliers", 8), "mobilenet_v2 bert"),
    (Permute("importance"), "phi3 mobilenet_v2"),
    (Permute("zigzag", 8), "llama bert mixtral"),
    (Rotate(), "llama glm4_moe looped opt gpt2 vit mobilenet_v2 mamba mamba2"),
    (Rotate("orthogonal"), "qwen2 opt"),
    (Rotate("klt", everywhere=True), "llama bert"),
    (RotateOnline(), "llama bert swin"),
    (RotateOnline(8, everywhere=True, signs=True), "mixtral looped"),
    (RotateOnline(16, everywhere=True, pad=True), "llama_tied"),
    (RotateKeys(), "gemma2 qwen3"),
    (Centre(), "opt gpt2 vit gpt_neox"),
    (PromoteSiLU(), "llama mamba"),
    (PromoteClip(), "mobilenet_v2"),
    (SplitChannels(1.2, 0.5), "llama qwen2"),
    (SplitChannels(1.2, 0.5, online=True), "llama bert"),
]


@pytest.mark.parametrize(("ask", "name"), [(a, n) for a, names in CASES for n in names.split()], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_function_stays(ask, name):
    _, report = exact.Case.of(name, recognised=isinstance(ask, RotateKeys)).apply(ask)
    assert report.applied, [e.text for e in report.entries]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("gemma2", [Smooth(), Symmetrize(), Permute("zigzag", 8), PairScale(), Rotate(), RotateOnline(), RotateKeys()]),
        ("opt", [Centre(), Smooth(), MoveBias(), Rotate("klt"), RotateOnline(8, everywhere=True)]),
        ("mobilenet_v2", [PromoteClip(), Equalize(), Smooth(), Permute("sort"), Rotate()]),
        ("mamba", [PromoteSiLU(), Smooth(), Permute("sort"), Rotate("klt"), RotateOnline(4)]),
        ("bert", [MoveBias(), Smooth(), Rotate(), SplitChannels(1.2, 0.5, online=True), RotateOnline(signs=True)]),
    ],
)
def test_asks_compose(name, asks):
    case = exact.Case.of(name, recognised=True)
    _, report = case.apply(*asks)
    assert {e.ask for e in report.applied} == {a.name for a in asks}


def test_an_ask_without_data_says_so():
    case = exact.Case.of("llama")
    model, report = apply_asks(None, case.spaces, [Smooth(), Symmetrize(), Awq(), Rotate()])
    refused = {e.ask for e in report.entries if not e.done}
    assert refused == {"smooth", "symmetrize", "awq"} and any(e.ask == "rotate" for e in report.applied)
    assert all("calibration" in e.text for e in report.entries if not e.done)
    assert case.error(model) < 1e-10


def test_float32_models_stay_float32():
    import miniatures

    spaces = analyse(miniatures.model("opt"))
    feeds = random_inputs(spaces.model, np.random.default_rng(0))
    case = exact.Case(spaces.model, feeds)
    model, _ = apply_asks(None, spaces, [Symmetrize(), Smooth(), Rotate(), RotateOnline(signs=True)], case.data)
    kinds = {v.const_value.numpy().dtype for v in model.graph.initializers.values()}
    assert np.dtype(np.float64) not in kinds
    before, after = run(spaces.model, feeds), run(model, feeds)
    for name, a in before.items():
        assert float((a - after[name]).abs().max() / a.abs().max()) < 1e-4
