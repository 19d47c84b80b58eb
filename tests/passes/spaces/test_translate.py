"""Translations: what takes them back, and what stands in the way."""

import numpy as np
import oracle
import pytest

from qcompile.passes.execute import run
from qcompile.passes.spaces import analyse
from qcompile.passes.spaces.prove import random_inputs
from qcompile.passes.spaces.translate import Translator, Untranslatable

N = 4


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def translated(body, constants, name, inputs=None, output=(3, N), insert=True):
    """Translate a value at random; returns the error of the outputs, and whether nodes were inserted."""
    spaces = analyse(oracle.parse(body, inputs or {"x": (3, N)}, constants, output))
    feeds = random_inputs(spaces.model, np.random.default_rng(0))
    model = spaces.model.clone()
    size = spaces.layouts[name][0].size
    inserted = Translator(spaces.rebase(model), insert=insert).translate(
        name, np.random.default_rng(1).standard_normal(size)
    )
    before, after = run(spaces.model, feeds)["y"], run(model, feeds)["y"]
    return float((before - after).abs().max() / before.abs().max()), inserted


HEADS = " a = Attention<q_num_heads=2, kv_num_heads=2{}>(q, k, v) y = MatMul(a, wo)"
QKV = "q = MatMul(x, wq) k0 = MatMul(x, wk) k = Add(k0, bk) v0 = MatMul(x, wv) v = Add(v0, bv)"
WEIGHTS = {n: matrix(N, N, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
WEIGHTS |= {"bk": matrix(N, seed=8), "bv": matrix(N, seed=9)}
TOKENS = {"inputs": {"x": (1, 3, N)}, "output": (1, 3, N)}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_bias_of_any_rank_takes_it(rank):
    constants = {"w": matrix(N, N), "v": matrix(N, N, seed=1), "b": matrix(*(1,) * (rank - 1), N, seed=2)}
    constants["c"] = matrix(*(1,) * (rank - 1), N, seed=3)
    body = "a = MatMul(x, w) h = Add(a, b) m = MatMul(h, v) y = Add(m, c)"
    error, inserted = translated(body, constants, "h", **TOKENS, insert=False)
    assert error < 1e-6 and not inserted


def test_without_a_bias_an_addition_is_inserted_or_it_is_refused():
    body, constants = "a = MatMul(x, w) y = MatMul(a, v)", {"w": matrix(N, N), "v": matrix(N, N, seed=1)}
    error, inserted = translated(body, constants, "a")
    assert error < 1e-6 and inserted, "behind the graph's output too"
    with pytest.raises(Untranslatable, match="no constant"):
        translated(body, constants, "a", insert=False)


def test_values_pass_attention_and_keys_vanish_in_the_softmax():
    assert translated(QKV + HEADS.format(""), WEIGHTS, "v", **TOKENS)[0] < 1e-6
    error, inserted = translated(QKV + HEADS.format(""), WEIGHTS, "k", **TOKENS)
    assert error < 1e-6 and not inserted


def test_capped_scores_see_a_translation_of_the_keys():
    with pytest.raises(Untranslatable, match="Attention"):
        translated(QKV + HEADS.format(", softcap=2.0"), WEIGHTS, "k", **TOKENS)
    assert translated(QKV + HEADS.format(", softcap=2.0"), WEIGHTS, "v", **TOKENS)[0] < 1e-6


def test_an_output_of_attention_is_translated_through_the_values():
    error, _ = translated(QKV + HEADS.format(""), WEIGHTS, "a", **TOKENS)
    assert error < 1e-6
    shared = QKV + " a = Attention<q_num_heads=2, kv_num_heads=1>(q, k, v) y = MatMul(a, wo)"
    narrow = WEIGHTS | {"wk": matrix(N, 2), "wv": matrix(N, 2, seed=5), "bk": matrix(2), "bv": matrix(2, seed=6)}
    assert translated(shared, narrow, "a", **TOKENS)[0] < 1e-6


def test_a_part_of_a_fused_projection_is_translated_alone():
    body = "f0 = MatMul(x, w) f = Add(f0, b) p, q = Split<axis=1, num_outputs=2>(f) s = Sigmoid(p) m = MatMul(q, v) y = Add(m, s)"
    constants = {"w": matrix(N, 2 * N), "b": matrix(2 * N), "v": matrix(N, N, seed=1)}
    error, _ = translated(body, constants, "q")
    assert error < 1e-6
    with pytest.raises(Untranslatable, match="Sigmoid"):
        translated(body, constants, "p")


@pytest.mark.parametrize(
    ("attributes", "possible"), [("", True), ("<pads=[1,1]>", False), ('<auto_pad="SAME_UPPER">', False)]
)
def test_padding_shows_where_a_convolution_has_no_translation(attributes, possible):
    length = 5 if not possible else 3
    body = f"c = Conv(x, w, b) d = Conv{attributes}(c, v, b2) y = Identity(d)"
    constants = {"w": matrix(N, N, 1), "v": matrix(N, N, 3, seed=1), "b": matrix(N), "b2": matrix(N, seed=2)}
    arguments = (body, constants, "c", {"x": (1, N, 5)}, (1, N, length))
    if possible:
        assert translated(*arguments, insert=False)[0] < 1e-6
    else:
        with pytest.raises(Untranslatable, match="Conv"):
            translated(*arguments)


def test_a_row_picked_out_is_translated_with_the_others():
    body = "h0 = MatMul(x, w) h = Add(h0, b) c = Gather<axis=0>(h, i) m = MatMul(c, v) y = Sigmoid(m)"
    constants = {"w": matrix(N, N), "b": matrix(N), "v": matrix(N, N, seed=1), "i": np.array([0])}
    assert translated(body, constants, "c", output=(1, N))[0] < 1e-6
