"""What every ask is for, measured on the activations and weights it leaves behind."""

import exact
import numpy as np
import onnx_ir as ir
import oracle
import pytest

from qcompile.errors import RecipeError
from qcompile.passes.asks import (
    Awq,
    Centre,
    ColumnScale,
    Context,
    Equalize,
    MoveBias,
    Noise,
    PairScale,
    Permute,
    Precision,
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
from qcompile.passes.asks.equalize import weight_range
from qcompile.passes.asks.online import Kronecker, block_order, insert_online, split
from qcompile.passes.asks.pairs import key_range, key_side, rotated_pairs
from qcompile.passes.asks.permute import channel_order
from qcompile.passes.asks.rounding import RoundingError
from qcompile.passes.spaces import analyse

pytestmark = pytest.mark.filterwarnings("ignore")
N = 16
RNG = np.random.default_rng(3)
SPREAD = np.exp(RNG.normal(0, 1.5, N))
TWO_LOUD = np.where(np.arange(N) < 2, 20.0, 1.0)


def gated(outliers: np.ndarray = SPREAD, rows: int = 64) -> exact.Case:
    """down(silu(gate(n)) * up(n)) behind a norm whose gamma, and an up-projection whose outputs, have outliers."""
    body = (
        "e = MatMul(x, we) n = RMSNormalization(e, g) a = MatMul(n, gate) s = Swish(a) u = MatMul(n, up) h = Mul(s, u)"
        " d = MatMul(h, down) r = Add(e, d) m = RMSNormalization(r, g2) y = MatMul(m, head)"
    )
    random = np.random.default_rng(0)
    constants = {n: random.standard_normal((N, N)) / 4 for n in ("we", "gate", "up", "down", "head")}
    constants["up"] = constants["up"] * outliers
    constants |= {"g": outliers * random.choice([-1, 1], N), "g2": np.ones(N) + 0.1 * random.standard_normal(N)}
    model = exact.widen(oracle.parse(body, {"x": (rows, N)}, constants, (rows, N)))
    return exact.Case(model, {"x": random.standard_normal((rows, N))})


def ranges(case: exact.Case, model: ir.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each channel."""
    rows = case.rows(model, [name])[name]
    return rows.min(0), rows.max(0)


def ratio(values: np.ndarray) -> float:
    return float(values.max() / values.min())


def read_by(model: ir.Model, weight: str) -> str:
    """Name of the activation that a weight multiplies."""
    return next(n.inputs[0].name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].name == weight)


def test_smoothing_moves_outliers_of_activations_into_weights():
    case = gated()
    before = ratio(np.abs(case.rows(case.spaces.model, ["n"])["n"]).max(0))
    model, _ = case.apply(Smooth(1.0))
    assert ratio(np.abs(case.rows(model, ["n"])["n"]).max(0)) < 1.001 < before / 10


@pytest.mark.parametrize(
    ("outliers", "weight", "activation", "best"),
    [(SPREAD, "int4", "int8/token", 0.5), (TWO_LOUD, "int8", "int4/token", 0.75), (TWO_LOUD, "int3", "none", 0.25)],
    ids=["balanced", "activations are coarser", "weights are coarser"],
)
def test_searched_smoothing_takes_the_best_alpha(outliers, weight, activation, best):
    case = gated(outliers)
    quantized = {w: Precision.of(weight, activation) for w in ("gate", "up", "down", "head")}
    context = Context(case.spaces, case.data, quantized)
    space = case.spaces.of("n")
    error = RoundingError(space, context)
    model, _ = case.apply(Smooth(search=5), quantized=quantized)
    chosen = np.abs(case.rows(model, ["n"])["n"]).max(0) / np.abs(case.rows(case.spaces.model, ["n"])["n"]).max(0)
    x, w = context.activation_range(space), context.weight_range(space)
    errors = {alpha: error(w ** (1 - alpha) / x**alpha) for alpha in np.linspace(0, 1, 5)}
    assert min(errors, key=errors.get) == best
    assert error(chosen) <= errors[best] * (1 + 1e-9) < 0.5 * error(np.ones(N))


def test_awq_lowers_the_error_of_three_bit_weights():
    case = gated(TWO_LOUD)
    quantized = {w: Precision.of("int3", "none") for w in ("gate", "up")}
    context = Context(case.spaces, case.data, quantized)
    error = RoundingError(case.spaces.of("n"), context)
    model, _ = case.apply(Awq(), quantized=quantized)
    factor = np.abs(case.rows(model, ["n"])["n"]).max(0) / np.abs(case.rows(case.spaces.model, ["n"])["n"]).max(0)
    assert error(factor) < 0.8 * error(np.ones(N))


def test_column_factors_give_all_channels_one_range():
    case = gated()
    model, _ = case.apply(ColumnScale(1.0))
    assert ratio(np.abs(case.rows(model, ["n"])["n"]).max(0)) < 1 + 1e-9
    half, _ = case.apply(ColumnScale(0.5))
    low = np.abs(case.rows(case.spaces.model, ["n"])["n"]).max(0)
    assert np.isclose(ratio(np.abs(case.rows(half, ["n"])["n"]).max(0)), ratio(low) ** 0.5)


def test_exponent_biases_are_powers_of_two():
    case = gated()
    model, _ = case.apply(ColumnScale(1.0, power_of_two=True))
    old, new = (np.abs(case.rows(m, ["n"])["n"]).max(0) for m in (case.spaces.model, model))
    assert ratio(new) < 2 + 1e-9
    exponents = np.log2(new / old)
    assert np.allclose(exponents, np.rint(exponents), atol=1e-9) and len(set(np.rint(exponents))) > 1


def test_equalization_meets_in_the_middle():
    case = exact.Case.of("resnet")
    spaces = [s for s in case.spaces if s.scalable]
    model, _ = case.apply(Equalize(tolerance=1e-6, rounds=200))
    after = case.spaces.rebase(model)
    for space in spaces:
        writers, readers = (weight_range(after, space, role) for role in ("writer", "reader"))
        assert np.allclose(writers, readers, rtol=1e-3)


def test_relu6_is_equalized_once_its_bounds_are_members():
    case = exact.Case.of("mobilenet_v2")
    plain = case.apply(Equalize())[1]
    promoted = case.apply(PromoteClip(), Equalize())[1]
    assert len(promoted.applied) > len(plain.applied) + 10


def test_symmetrized_channels_lie_around_zero():
    case = exact.Case.of("opt")
    model, _ = case.apply(Symmetrize())
    weight = next(n for n in case.spaces.constants if n.endswith("layers.0.fc1.weight") or "fc1" in n)
    reader = next(
        r for rs in analyse(model).all_readers().values() for r in rs if r.weight == weight or "fc1" in r.weight
    )
    low, high = ranges(case, model, reader.activation)
    assert np.allclose(low, -high, atol=1e-9)


def test_reparametrized_channels_share_scale_and_zero_point():
    case = exact.Case.of("vit")
    model, _ = case.apply(Reparametrize())
    spaces = analyse(model)
    found = 0
    for space in spaces:
        if space.leader is not None:
            low, high = ranges(case, model, spaces.readers(space)[0].activation)
            assert np.allclose(low, low[0]) and np.allclose(high, -low[0])
            found += 1
    assert found == 5, "two norms of each layer and the last"


def test_noise_stays_within_half_a_step():
    case = exact.Case.of("vit")
    model, _ = case.apply(Noise(bits=6))
    space = next(s for s in case.spaces if s.leader is not None)
    name = case.spaces.readers(space)[0].activation
    old, new = (case.rows(m, [read_by(m, case.spaces.readers(space)[0].weight)]) for m in (case.spaces.model, model))
    difference = next(iter(new.values())) - old[name]
    assert np.allclose(difference, difference[0], atol=1e-9) and difference.std() > 0
    assert np.abs(difference).max() <= np.abs(old[name]).max() / 31 / 2 + 1e-9


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_value_biases_end_in_the_output_projection(name):
    case = exact.Case.of(name, recognised=True)
    model, _ = case.apply(MoveBias())
    for node in model.graph:
        if node.op_type == "Attention":
            value = node.inputs[2].name
            old, new = (case.rows(m, [value])[value] for m in (case.spaces.model, model))
            moved = (old - new).reshape(-1, old.shape[-1])
            assert np.abs(moved).max() > 0.01


def test_rotated_keys_get_one_range_per_pair():
    case = exact.Case.of("llama")
    model, report = case.apply(PairScale(1.0))
    assert report.applied
    after = analyse(model)
    context = Context(after, case.data)
    for space in after:
        pair = rotated_pairs(space, context)
        if pair is not None and space.mixes:
            found = np.zeros(pair.max() + 1)
            np.maximum.at(found, pair, key_range(space, context, key_side(space, context)))
            assert ratio(found) < 1 + 1e-6


def test_permutations_sort_what_they_say():
    case = gated()
    for order in ("sort", "outliers", "zigzag"):
        model, _ = case.apply(Permute(order, 4))
        found = np.abs(case.rows(model, ["h"])["h"]).max(0)
        if order == "sort":
            assert (np.diff(found) <= 1e-12).all()
        elif order == "outliers":
            assert found[-4:].min() >= found[:-4].max()
        else:
            top = np.argsort(-found)[:4] // 4
            assert sorted(top) == [0, 1, 2, 3], "the four largest channels lie in four blocks"


def test_importance_is_the_diagonal_of_the_hessian():
    case = gated()
    model, _ = case.apply(Permute("importance"))
    moment = (case.rows(model, ["h"])["h"] ** 2).mean(0)
    assert (np.diff(moment) <= 1e-12).all()


def test_a_stream_that_rotates_can_be_permuted_too():
    case = gated()
    _, report = case.apply(Permute("sort"))
    assert {e.where for e in report.applied} >= {"n"}


def test_zigzag_fills_every_block():
    for size, block in ((24, 8), (20, 8), (7, 8), (128, 16)):
        order = channel_order(np.random.default_rng(0).uniform(size=size), "zigzag", block)
        assert sorted(order) == list(range(size))
    # Back and forth: the block that got the largest of one round gets the smallest of the next.
    assert channel_order(np.arange(8)[::-1], "zigzag", 2).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    with pytest.raises(RecipeError, match="zigzag"):
        Permute("random")


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotation_spreads_an_outlier_of_the_stream(kind):
    case = gated()
    loud = case.spaces.model.clone()
    value = loud.graph.initializers["we"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.where(np.arange(N) == 3, 50, 1), name="we")
    case = exact.Case(loud, case.feeds)
    before = case.rows(case.spaces.model, ["e"])["e"]
    model, _ = case.apply(Rotate(kind))
    after = case.rows(model, ["e"])["e"]
    assert np.allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1))
    assert np.abs(after).max() < 0.75 * np.abs(before).max()


def test_klt_gives_all_channels_the_same_variance():
    """Of all values of the stream together, each with the same weight; a Hadamard matrix alone does not."""
    case = gated()
    names = [name for name, _ in case.spaces.of("e").values]
    assert {"e", "d", "r"} <= set(names)

    def variances(model: ir.Model) -> np.ndarray:
        squares = [(rows**2).mean(0) for rows in case.rows(model, names).values()]
        return sum(s / s.sum() for s in squares)

    klt, hadamard = (case.apply(Rotate(kind))[0] for kind in ("klt", "hadamard"))
    assert ratio(variances(klt)) < 1 + 1e-9 < 1.2 < ratio(variances(hadamard))


def test_centring_leaves_no_layer_norm_and_frees_the_rotation():
    case = exact.Case.of("opt")
    model, _ = case.apply(Centre())
    assert "LayerNormalization" not in {n.op_type for n in model.graph}
    stream = next(s for s in analyse(model) if s.size == 24 and s.mixes)
    assert stream.group.startswith("R+.O(24)") and "|1" not in stream.group


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("n = RMSNormalization(s, g) y = MatMul(n, v)", "RMSNormalization"),
        ("n = LayerNormalization(s, g) a = MatMul(n, v) c = MatMul(s, w3) y = Add(a, c)", "summed"),
    ],
)
def test_a_stream_whose_mean_is_seen_keeps_it(body, reason):
    body = (
        "a0 = MatMul(x, w1) b0 = MatMul(x, w2) s = Add(a0, b0) n0 = LayerNormalization(s, g0) z = MatMul(n0, v0) "
        + body
    )
    random = np.random.default_rng(0)
    body = body.replace("y =", "y0 =") + " y = Add(y0, z)"
    constants = {n: random.standard_normal((N, N)) for n in ("w1", "w2", "w3", "v", "v0") if n in body}
    constants |= {n: np.abs(random.standard_normal(N)) + 0.5 for n in ("g", "g0")}
    model = exact.widen(oracle.parse(body, {"x": (3, N)}, constants, (3, N)))
    case = exact.Case(model, {"x": random.standard_normal((3, N))})
    rewritten, report = case.apply(Centre())
    assert "LayerNormalization" in {n.op_type for n in rewritten.graph}
    assert not report.applied and reason in str(report)


def test_a_promoted_silu_lets_scales_pass():
    case = exact.Case.of("mamba")
    plain = case.apply(Smooth(), Permute("sort"))[1]
    promoted = case.apply(PromoteSiLU(), Smooth())[1]
    assert len([e for e in promoted.applied if e.ask == "smooth"]) > len(
        [e for e in plain.applied if e.ask == "smooth"]
    )


def test_an_online_rotation_goes_where_none_folds():
    case = gated()
    model, report = case.apply(Rotate(), RotateOnline())
    rotated = {n.outputs[0].name for n in model.graph if n.op_type == "BlockRotate"}
    assert read_by(model, "down") in rotated and read_by(model, "up") not in rotated
    assert any(f"{len(rotated)} activations" in e.text for e in report.applied)


def test_signs_keep_the_mean_of_channels_out_of_one_entry():
    """Without them the first entry of a rotated row is sqrt(n) times the mean of its channels."""
    random = np.random.default_rng(0)
    constants = {"w": random.standard_normal((N, 5))}
    model = exact.widen(oracle.parse("r = Relu(x) y = MatMul(r, w)", {"x": (8, N)}, constants, (8, 5)))
    case = exact.Case(model, {"x": 3 + 0.1 * random.standard_normal((8, N))})
    loudest = {}
    for signs in (False, True):
        rotated, _ = case.apply(RotateOnline(everywhere=True, signs=signs))
        name = read_by(rotated, "w")
        loudest[signs] = np.abs(case.rows(rotated, [name])[name]).max()
    assert np.isclose(loudest[False], 3 * np.sqrt(N), rtol=0.1) and loudest[True] < 0.8 * loudest[False]


def test_a_weight_with_another_reader_gets_a_copy():
    body = "a = MatMul(x, w) r = Sigmoid(a) b = MatMul(r, w) t = Transpose(w) y = MatMul(b, t)"
    w = np.random.default_rng(0).standard_normal((N, N)).astype(np.float32)
    case = exact.Case(
        exact.widen(oracle.parse(body, {"x": (3, N)}, {"w": w}, (3, N))), {"x": RNG.standard_normal((3, N))}
    )
    model, _ = case.apply(RotateOnline(everywhere=True))
    kept = [v.const_value.numpy() for v in model.graph.initializers.values()]
    assert any(np.array_equal(a, w.T) for a in kept), "what the transposition reads"
    assert not any(np.array_equal(a, w) for a in kept)


@pytest.mark.parametrize(
    ("width", "most", "order"), [(1408, 0, 1408), (1408, 128, 128), (52, 0, 4), (7, 0, 1), (60, 0, 60)]
)
def test_the_largest_order_that_has_a_matrix(width, most, order):
    assert block_order(width, most) == order


@pytest.mark.parametrize("order", [256, 384, 1408, 1536, 14336])
def test_a_large_hadamard_matrix_is_a_product_of_two(order):
    from qcompile.formats.hadamard import hadamard_signs

    left, right = split(order)
    assert left * right == order
    assert np.array_equal(np.kron(hadamard_signs(left), hadamard_signs(right)), hadamard_signs(order))


def test_rows_without_a_matrix_are_padded():
    random = np.random.default_rng(0)
    constants = {"w": random.standard_normal((7, 5))}
    case = exact.Case(
        exact.widen(oracle.parse("y = MatMul(x, w)", {"x": (3, 7)}, constants, (3, 5))),
        {"x": random.standard_normal((3, 7))},
    )
    refused = case.apply(RotateOnline(everywhere=True))[1]
    assert not refused.applied and "pad" in str(refused)
    model, _ = case.apply(RotateOnline(everywhere=True, pad=True))
    assert model.graph.initializers["w"].const_value.shape == (8, 5)


def test_a_kronecker_map_is_taken_back_by_the_weight():
    random = np.random.default_rng(0)
    case = gated()
    model = case.spaces.model.clone()
    node = next(n.name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].name == "down")
    insert_online(model, {"h": [node]}, Kronecker(random.standard_normal((4, 4)), random.standard_normal((2, 2))))
    assert case.error(model) < 1e-10


def test_split_channels_are_small_enough():
    case = gated(np.where(np.arange(N) == 5, 30.0, 1.0))
    before = np.abs(case.rows(case.spaces.model, ["h"])["h"]).max(0)
    model, report = case.apply(SplitChannels(4.0, 1.0))
    assert report.applied
    after = np.abs(case.rows(model, ["h"])["h"]).max(0)
    assert len(after) > N and after.max() <= 4.01 * np.median(before) < before.max()
    assert {n.op_type for n in model.graph} == {n.op_type for n in case.spaces.model.graph}, (
        "folded, nothing at run time"
    )


def test_merging_keeps_the_width_and_reports_its_error():
    case = gated(np.where(np.arange(N) == 5, 12.0, 1.0))
    ask = SplitChannels(3.0, 0.5, online=True, merge=True)
    model, report = apply_asks(None, case.spaces, [ask], case.data, ["down"])
    (entry,) = report.applied
    assert "pairs merged" in entry.text
    told = float(entry.text.rsplit(" ", 1)[1])
    assert model.graph.initializers["down"].const_value.shape == (N, N)
    old, new = (case.rows(m, ["d"])["d"] for m in (case.spaces.model, model))
    assert np.isclose(np.linalg.norm(new - old) / np.linalg.norm(old), told, rtol=0.6) and told > 0


def test_scores_stay_under_rotated_keys():
    case = exact.Case.of("qwen3", recognised=True)
    model, _ = case.apply(RotateKeys())
    assert sum(n.op_type == "BlockRotate" for n in model.graph) == 4
