"""Every linear input and output of the miniatures lies in a space with the group that the rule table promises."""

from collections import Counter

import miniatures
import pytest

from qcompile.passes.recognise import recognise
from qcompile.passes.spaces import Spaces, analyse
from qcompile.passes.spaces.groups import Limit

pytestmark = pytest.mark.filterwarnings("ignore")


def spaces_of(name: str) -> Spaces:
    return analyse(miniatures.model(name))


def groups(spaces: Spaces) -> list[str]:
    return [s.group for s in spaces if s.members or s.values]


def linear_weights(spaces: Spaces):
    for node in spaces.model.graph:
        if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            for value in node.inputs[:2]:
                if value is not None and value.is_initializer() and value.shape is not None and len(value.shape) > 1:
                    yield node, value.name


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen2", "phi3", "mixtral", "glm4_moe", "looped", "opt", "gpt2", "gpt_neox", "vit"]
)
def test_the_residual_stream_of_pre_norm_transformers_rotates(name):
    first = next(s for s in spaces_of(name) if s.size == 24 and not s.pinned)
    assert first.limit & Limit.ORTHOGONAL and first.group.startswith("R+.O(24)")
    assert len({c for c in first.cells}) == 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "mixtral", "gemma2", "qwen3"])
def test_llama_like_models_have_all_promised_groups(name):
    found = groups(spaces_of(name))
    heads = [g for g in found if g.startswith("GL(")]
    assert len(heads) == 2, "values and output projection, per key-value head"
    hidden = 3 * 40 if name == "mixtral" else 40
    assert sum(g.startswith(f"R*^{hidden} x S") for g in found) == 4, "up-projection and input of the down-projection"
    assert "S" in found, "the gate is permuted with them and not scaled"
    pairs = [g for g in found if g.startswith("SO(2)xR+^") or (name == "qwen3" and g.startswith("R*^16"))]
    assert len(pairs) == 2, "queries and keys, per rotated pair"


def kind(space) -> str:
    """The promised group of a space of a decoder, without its size."""
    if space.leader is not None:
        return "diagonal behind a rotation" if space.scalable and space.signed else "?"
    if space.pinned:
        return "pinned"
    (first, *_) = space.group.replace("^", " ").split(" ")
    return {"R+.O(24)": "rotation", "GL(6)": "matrix per head", "SO(2)xR+": "pairs", "S": "permutation"}.get(
        first, "diagonal and permutation" if first == "R*" and space.permutable else "?"
    )


def test_every_linear_input_and_output_of_a_decoder_has_the_promised_group():
    """Counted by kind of input and output: the projections of two layers, and the head."""
    spaces = spaces_of("llama")
    found = Counter()
    for node, weight in linear_weights(spaces):
        sides = {
            role: [s for s in spaces for m in s.members if (m.name, m.role) == (weight, role)]
            for role in ("reader", "writer")
        }
        assert all(len(s) == 1 for s in sides.values()), f"{node.name} has a side in no space or in several"
        found[kind(sides["reader"][0]), kind(sides["writer"][0])] += 1
    assert found == {
        ("diagonal behind a rotation", "pairs"): 4,  # queries, keys
        ("diagonal behind a rotation", "matrix per head"): 2,  # values
        ("matrix per head", "rotation"): 2,  # output projection
        ("diagonal behind a rotation", "permutation"): 2,  # gate
        ("diagonal behind a rotation", "diagonal and permutation"): 2,  # up
        ("diagonal and permutation", "rotation"): 2,  # down
        ("diagonal behind a rotation", "pinned"): 1,  # head
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "mixtral", "glm4_moe", "opt", "gpt2", "gpt_neox", "vit"])
def test_outputs_of_norms_take_any_diagonal(name):
    spaces = spaces_of(name)
    followers = [s for s in spaces if s.leader is not None]
    assert followers and all(s.scalable and s.signed for s in followers)
    assert all(spaces.readers(s) for s in followers)


def test_up_projection_scales_with_the_down_projection_and_the_gate_does_not():
    spaces = spaces_of("llama")
    for column in [s for s in spaces if s.group.startswith("R*^40")]:
        family = [s for s in spaces if s.family == column.family]
        assert len(family) == 4 and sum(s.scalable for s in family) == 2


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "swin", "convnext"])
def test_every_linear_source_and_sink_of_vision_models_is_covered(name):
    """Covered: a space that is not pinned. Pinned are only what reads the image and what writes the class scores."""
    spaces = spaces_of(name)
    sources = sinks = pinned_sources = pinned_sinks = 0
    for node, weight in linear_weights(spaces):
        writer = [s for s in spaces if any(m.name == weight and m.role == "writer" for m in s.members)]
        reader = [s for s in spaces if any(m.name == weight and m.role == "reader" for m in s.members)]
        assert writer and reader, f"{node.name} has a side without a space"
        sources, sinks = sources + 1, sinks + 1
        pinned_sources += all(s.pinned for s in writer)
        pinned_sinks += all(s.pinned for s in reader)
    assert pinned_sources == 1 and pinned_sinks == 1
    assert sources > 5


def test_relu_networks_admit_one_positive_scale_per_channel():
    assert [s.group for s in spaces_of("resnet") if not s.pinned] == [f"R+^{n} x S" for n in (6, 12, 12, 12, 20, 20)]


def test_heads_of_one_projection_are_separate_spaces_in_fused_weights():
    spaces = spaces_of("gpt_neox")
    fused = [s for s in spaces if any(m.name == "val_149" and m.role == "writer" for m in s.members)]
    assert sorted(s.size for s in fused) == [8, 16, 24]


def test_the_state_of_a_selective_scan_has_a_dual_diagonal():
    state = [s for s in spaces_of("mamba") if s.size == 4 and s.scalable]
    assert len(state) == 2 and all(s.group == "R*^4 x S" for s in state)


@pytest.mark.parametrize("recognised", [False, True], ids=["exported", "recognised"])
def test_channels_of_a_state_space_head_are_permuted_with_all_that_belongs_to_them(recognised):
    """Gate, filter and its bias, norm and output projection; D is one number per head, the group norm's gain is shared."""
    model = miniatures.model("mamba2")
    spaces = analyse(recognise(model)[0] if recognised else model)
    inner = [s for s in spaces if s.size == 24 and s.members]
    assert len(inner) >= 4 and all(s.permutable and s.units == 2 for s in inner)
    assert len({s.family for s in inner}) == 1
    names = {m.name.rpartition("mixer.")[2] for s in inner for m in s.members}
    assert {"conv1d.bias", "norm.weight"} <= names and len(names) >= 4, "gate and inputs, filter, bias, norm"


@pytest.mark.parametrize("name", sorted(miniatures.BUILDERS))
def test_what_is_pinned_says_why(name):
    for space in analyse(recognise(miniatures.model(name))[0]):
        if space.pinned:
            assert space.reasons and all(len(reason) > 10 for reason in space.reasons), str(space)


def test_modulation_of_adaptive_norms_absorbs_diagonals():
    spaces = spaces_of("dit")
    shifts = [s for s in spaces if any("modulation.weight" in m.name and m.role == "writer" for m in s.members)]
    assert any(s.scalable for s in shifts)


def test_a_spaces_object_explains_itself():
    spaces = spaces_of("llama")
    text, data = str(spaces), spaces.to_json()
    assert "R+.O(24)" in text and "graph output" in text
    assert len(data["spaces"]) == len(spaces)
    pinned = next(s for s in data["spaces"] if s["group"] == "1")
    assert pinned["reasons"]
