"""The proof of the analysis on every miniature: all groups at once, in float64."""

import logging

import miniatures
import pytest

from qcompile.passes.recognise import recognise
from qcompile.passes.spaces import analyse, prove

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)

ARCHITECTURES = {
    "rms norm, gated": ["llama", "qwen2", "qwen3", "gemma2", "phi3", "llama_tied"],
    "layer norm": ["opt", "gpt2", "gpt_neox", "bert", "albert"],
    "mixture of experts": ["mixtral", "glm4_moe"],
    "state space": ["mamba", "mamba2"],
    "vision": ["vit", "swin", "mobilenet_v2", "resnet", "convnext", "dit"],
    "looped": ["looped"],
}


def test_all_kinds_of_architectures_are_there():
    listed = [name for names in ARCHITECTURES.values() for name in names]
    assert sorted(listed) == sorted(miniatures.BUILDERS) and len(listed) >= 18


@pytest.mark.parametrize("recognised", [False, True], ids=["exported", "recognised"])
@pytest.mark.parametrize("name", sorted(miniatures.BUILDERS))
def test_a_random_element_of_all_groups_preserves_the_function(name, recognised):
    model = miniatures.model(name)
    spaces = analyse(recognise(model)[0] if recognised else model)
    proof = prove(spaces, seed=int(recognised))
    assert proof.holds, f"{name}: relative error {proof.error:.1e}"
    assert proof.spaces > 2
