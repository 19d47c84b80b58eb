"""Weights picked at run time: the hidden channels of every expert have a basis of their own, and where the positions of
two operands part, none. What is claimed too freely shows as an error of the order of 1 in the proof."""

import re

import numpy as np
import oracle
import pytest

from qcompile.passes.spaces import analyse, prepare, prove

E, K, N, TOKENS = 3, 5, 4, 6
"""Experts, hidden channels of each, channels of the stream, positions."""


def constants(**more):
    rng = np.random.default_rng(0)
    shapes = {"wi": (N, N), "up": (E, N, K), "gate": (E, N, K), "down": (E, K, N), "wo": (N, N), "router": (N, E)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made |= {"last": np.array([-1]), "middle": np.array([1]), "one": np.array([1])}
    return made | more


ROUTED = (
    "e = MatMul(x, wi) r = MatMul(e, router) p = Softmax(r) v, i2 = TopK(p, one) i = Squeeze(i2, last)"
    " c = Unsqueeze(e, middle) wu = Gather<axis=0>(up, i) h3 = MatMul(c, wu) h = Squeeze(h3, middle) "
)
BACK = " a3 = Unsqueeze(a, middle) wd = Gather<axis=0>(down, i) o3 = MatMul(a3, wd) o = Squeeze(o3, middle) y = MatMul(o, wo)"


def spaces_of(body, width=N, **more):
    return analyse(oracle.parse(body, {"x": (TOKENS, N)}, constants(**more), (TOKENS, width)))


def of_weight(spaces, name, axes):
    (found,) = [s for s in spaces if any(m.name == name and m.axes == axes for m in s.members)]
    return found


def test_every_expert_has_scales_of_its_own_behind_relu():
    spaces = spaces_of(ROUTED + "a = Relu(h)" + BACK)
    hidden = of_weight(spaces, "up", (0, 2))
    assert hidden.group == f"R+^{E * K} x S" and hidden is of_weight(spaces, "down", (0, 1))
    assert {(m.name, m.role) for m in hidden.members} == {("up", "writer"), ("down", "reader")}
    assert spaces.solution.families[hidden.family].logs.shape[1] == 1, "one free scale per channel of each expert"
    assert prove(spaces).holds


def test_channels_of_two_experts_do_not_trade_places():
    spaces = spaces_of(ROUTED + "a = Gelu(h)" + BACK)
    hidden = of_weight(spaces, "up", (0, 2))
    orbit = spaces.solution.families[hidden.family].orbit[spaces.solution.row_of[hidden.classes]]
    place = spaces.index_in_space(spaces.constants["up"][1].table[:, 0, :], hidden)
    assert [len(set(orbit[row])) for row in place] == [1] * E and len(set(orbit)) == E


def test_experts_keep_their_places_behind_a_transposition(monkeypatch):
    """The whole stack has been claimed before it is indexed; its matrices could trade places but for the index."""
    monkeypatch.setattr(prepare, "LARGEST_FOLDED", 0)
    body = ROUTED.replace("Gather<axis=0>(up, i)", "Gather<axis=0>(turned, i)")
    spaces = spaces_of(
        "turned = Transpose<perm=[0, 2, 1]>(upt) " + body + "a = Relu(h)" + BACK,
        upt=constants()["up"].swapaxes(1, 2).copy(),
    )
    hidden = of_weight(spaces, "upt", (0, 1))
    assert hidden.group == f"R+^{E * K} x S" and not hidden.units
    for seed in range(3):
        assert prove(spaces, seed).holds


def test_a_gated_expert_scales_up_and_down_and_keeps_the_gate():
    body = ROUTED + "wg = Gather<axis=0>(gate, i) g3 = MatMul(c, wg) g = Squeeze(g3, middle) s = Swish(g) a = Mul(s, h)"
    spaces = spaces_of(body + BACK)
    assert of_weight(spaces, "up", (0, 2)).group == of_weight(spaces, "down", (0, 1)).group == f"R*^{E * K} x S"
    assert of_weight(spaces, "gate", (0, 2)).group == "S"
    assert prove(spaces).holds


def test_linear_experts_take_a_matrix_each():
    spaces = spaces_of(ROUTED + "a = Identity(h)" + BACK)
    assert of_weight(spaces, "up", (0, 2)).group == f"GL({K})^{E}"
    assert prove(spaces).holds


def test_the_stream_that_all_experts_read_and_write_has_one_basis():
    spaces = spaces_of(ROUTED + "a = Relu(h)" + BACK)
    assert of_weight(spaces, "up", (0, 1)) is spaces.of("e") and spaces.of("e").size == N
    assert of_weight(spaces, "down", (0, 2)) is spaces.of("o")


SHARED = {
    "positions in another order": "f = Gather<axis=0>(h, back) a = Mul(h, f)",
    "every position with every other": "f = Unsqueeze(h, zero) b = Unsqueeze(h, middle) q = Mul(f, b)"
    " a = ReduceSum<keepdims=0>(q, zero)",
    "a sum over positions": "f = ReduceSum<keepdims=1>(h, zero) a = Add(h, f)",
    "a running sum over positions": "a = CumSum(h, number)",
    "positions merged and split again": "f = Reshape(h, merged) a1 = Relu(f) a = Reshape(a1, split)",
    "a norm, whose epsilon is one number": "a = RMSNormalization<epsilon=0.5>(h, g)",
    "another index": "j = Gather<axis=0>(i, back) wg = Gather<axis=0>(gate, j) g3 = MatMul(c, wg)"
    " f = Squeeze(g3, middle) a = Mul(f, h)",
    "a stack of another height": "wg = Gather<axis=0>(tall, i) g3 = MatMul(c, wg) f = Squeeze(g3, middle) a = Mul(f, h)",
    "a bias that all experts share": "a = Add(h, bias)",
}
BACKWARDS = np.arange(TOKENS)[::-1].copy()
NEEDED = {
    "back": BACKWARDS,
    "tall": np.random.default_rng(1).standard_normal((E + 1, N, K)).astype(np.float32),
    "zero": np.array([0]),
    "number": np.array(0),
    "merged": np.array([2, TOKENS // 2, K]),
    "split": np.array([TOKENS, K]),
    "g": np.array([0.5, 1, 1.5, 2, 2.5], np.float32),
    "bias": np.array([0.5, 1, 1.5, 2, 2.5], np.float32),
}


@pytest.mark.parametrize("case", SHARED)
def test_experts_share_their_basis_where_positions_part(case):
    used = {name: NEEDED[name] for name in NEEDED if name in re.findall(r"\w+", SHARED[case])}
    spaces = spaces_of(ROUTED + SHARED[case] + " a0 = Relu(a)" + BACK.replace("Unsqueeze(a,", "Unsqueeze(a0,"), **used)
    assert of_weight(spaces, "up", (0, 2)).size == K
    for seed in range(3):
        assert prove(spaces, seed).holds


def test_a_stack_that_is_also_read_as_a_whole():
    """Expert 0 is read by everybody too: its channels are then those of the stream behind, for all experts."""
    body = ROUTED + "a = Relu(h)" + BACK.replace("y = MatMul(o, wo)", "")
    body += " w0 = Gather<axis=0>(up, number) s = MatMul(e, w0) t = Relu(s) d0 = Gather<axis=0>(down, number) u = MatMul(t, d0)"
    spaces = spaces_of(body + " z = Add(o, u) y = MatMul(z, wo)", number=np.array(0))
    assert of_weight(spaces, "up", (0, 2)).scalable
    for seed in range(3):
        assert prove(spaces, seed).holds


def test_what_leaves_the_model_pins_every_expert():
    spaces = spaces_of(ROUTED + "y = Relu(h)", width=K)
    assert of_weight(spaces, "up", (0, 2)).pinned and prove(spaces).holds
