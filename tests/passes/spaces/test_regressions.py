"""Rewrites that look right and are wrong, each seen in a tool that decides by module names. Removing the guard in the
rule breaks the test: the error of the proof, or of the wrong rewrite done by hand, is of the order of 1."""

import numpy as np
import onnx_ir as ir
import oracle
import pytest
import torch

from qcompile.passes.execute import run
from qcompile.passes.spaces import analyse, prove
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.groups import random_orthogonal
from qcompile.passes.spaces.prove import random_inputs, run_folded

N = 4
RNG = np.random.default_rng(0)


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parse(body, constants, inputs=None, output=(3, N)):
    return oracle.parse(body, inputs or {"x": (3, N)}, constants, output)


def error(before, after):
    return float((before - after).abs().max() / before.abs().max())


def test_mean_is_not_subtracted_from_a_stream_that_rms_norm_reads():
    """RMSNorm sees the mean: no element may remove it, the group is O(n) and not the matrices that kill the ones vector."""
    body = "a = MatMul(x, w) n = RMSNormalization(a, g) y = MatMul(n, v)"
    model = parse(body, {"w": matrix(N, N), "g": np.abs(matrix(N, seed=1)) + 0.5, "v": matrix(N, N, seed=2)})
    spaces = analyse(model)
    assert str(spaces.of("a").blocks[0][1]) == f"R+.O({N})"
    feeds = random_inputs(model, np.random.default_rng(0))
    centred = torch.from_numpy(matrix(N, N).astype(np.float64) @ (np.eye(N) - 1 / N))
    assert error(run(model, feeds)["y"], run(model, feeds, constants={"w": centred})["y"]) > 0.1


def test_the_bias_of_values_rotates_with_their_weight():
    body = (
        "q = MatMul(x, wq) k = MatMul(x, wk) u = MatMul(x, wv) v = Add(u, b)"
        " a = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) y = MatMul(a, wo)"
    )
    constants = {n: matrix(N, N, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))} | {"b": matrix(N, seed=9)}
    model = parse(body, constants, {"x": (1, 3, N)}, (1, 3, N))
    spaces = analyse(model)
    values = spaces.of("v")
    assert any(m.name == "b" for m in values.members)
    assert prove(spaces).holds
    rng = np.random.default_rng(1)
    element = spaces.identity()
    for cell in np.unique(spaces.solution.cell_of[values.classes]):
        element.blocks[int(cell)] = random_orthogonal(2, rng)
    feeds = random_inputs(model, rng)
    before = run(spaces.model, feeds)["y"]
    assert error(before, run_folded(spaces, element, feeds)["y"]) < 1e-12
    spaces.constants.pop("b")
    assert error(before, run_folded(spaces, element, feeds)["y"]) > 1e-2


@pytest.mark.parametrize("reader", ["router", "shared expert"])
def test_every_reader_of_a_norm_is_compensated(reader):
    """Experts, the shared expert and the router all read the norm; leaving one out is what naming modules leads to."""
    body = (
        "e = MatMul(x, we) n = RMSNormalization(e, g) r = MatMul(n, router) p = Softmax(r)"
        " h1 = MatMul(n, up) s1 = Sigmoid(h1) o1 = MatMul(s1, down) h2 = MatMul(n, shared) s2 = Sigmoid(h2)"
        " o2 = MatMul(s2, sdown) w, rest = Split<axis=1, num_outputs=2>(p) t = Mul(o1, w) z = Add(t, o2) f = Add(z, e)"
        " m = RMSNormalization(f, g2) y = MatMul(m, head)"
    )
    shapes = {
        "we": (N, N),
        "router": (N, 2),
        "up": (N, 3),
        "down": (3, N),
        "shared": (N, 3),
        "sdown": (3, N),
        "head": (N, N),
    }
    constants = {n: matrix(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    constants |= {"g": np.abs(matrix(N, seed=20)) + 0.5, "g2": np.abs(matrix(N, seed=21)) + 0.5}
    spaces = analyse(parse(body, constants))
    names = {r.weight for r in spaces.readers(spaces.of("n"))}
    assert names == {"router", "up", "shared"}
    assert prove(spaces).holds
    feeds = random_inputs(spaces.model, np.random.default_rng(0))
    element = Element.random(spaces.solution, np.random.default_rng(0))
    spaces.constants.pop({"router": "router", "shared expert": "shared"}[reader])
    assert error(run(spaces.model, feeds)["y"], run_folded(spaces, element, feeds)["y"]) > 1e-2


def test_the_square_of_a_tensor_scales_with_the_square():
    body = "a = MatMul(x, w) r = Relu(a) s = Mul(r, r) y = MatMul(s, v)"
    spaces = analyse(parse(body, {"w": matrix(N, N), "v": matrix(N, N, seed=1)}))
    assert prove(spaces).holds
    r, s = spaces.of("r"), spaces.of("s")
    assert r.index != s.index and r.family == s.family
    logs = spaces.solution.families[r.family].logs
    assert np.allclose(logs[list(s.columns)], 2 * logs[list(r.columns)])


@pytest.mark.parametrize("op", ["Clip(a, lo, hi)", "HardSigmoid(a)"])
def test_clipping_is_not_homogeneous(op):
    constants = {"w": matrix(N, N), "v": matrix(N, N, seed=1)}
    if "lo" in op:
        constants |= {"lo": np.array(-1, np.float32), "hi": np.array(1, np.float32)}
    spaces = analyse(parse(f"a = MatMul(x, w) c = {op} y = MatMul(c, v)", constants))
    assert not spaces.of("a").scalable and spaces.of("a").permutable
    assert prove(spaces).holds


def test_a_writer_with_a_second_reader_outside_the_first_region_is_found():
    """C1, C2 -> Add -> B and C2 -> D: scaling C1 forces C2, hence D; a walk of one round from C1 misses D."""
    body = "c1 = MatMul(x, w1) c2 = MatMul(x, w2) s = Add(c1, c2) b = MatMul(s, wb) d = MatMul(c2, wd) y = Add(b, d)"
    constants = {n: matrix(N, N, seed=i) for i, n in enumerate(("w1", "w2", "wb", "wd"))}
    spaces = analyse(parse(body, constants))
    assert {r.weight for r in spaces.readers(spaces.of("c1"))} == {"wb", "wd"}
    assert prove(spaces).holds
    feeds = random_inputs(spaces.model, np.random.default_rng(0))
    element = Element.random(spaces.solution, np.random.default_rng(0))
    spaces.constants.pop("wd")
    assert error(run(spaces.model, feeds)["y"], run_folded(spaces, element, feeds)["y"]) > 1e-2


def test_a_post_norm_residual_is_not_scaled_by_the_norm_that_feeds_it():
    """The norm's output goes to a linear layer and to the residual sum before the next norm, which sees its scale."""
    body = (
        "e = MatMul(x, we) n = LayerNormalization(e, g1, b1) h = MatMul(n, w1) a = Gelu(h) o = MatMul(a, w2)"
        " s = Add(o, n) m = LayerNormalization(s, g2, b2) y = MatMul(m, head)"
    )
    constants = {n: matrix(N, N, seed=i) for i, n in enumerate(("we", "w1", "w2", "head"))}
    constants |= {n: matrix(N, seed=i + 9) + 1 for i, n in enumerate(("g1", "b1", "g2", "b2"))}
    spaces = analyse(parse(body, constants))
    assert not spaces.of("n").scalable, "smoothing here would change the second norm"
    assert spaces.of("m").scalable
    assert prove(spaces).holds


def test_a_tied_embedding_is_orthogonal_and_needs_the_gamma_out_of_the_way():
    body = (
        "e = Gather(table, ids) n = RMSNormalization(e, g) h = MatMul(n, w) r = Add(h, e) t = Transpose(table)"
        " m = RMSNormalization(r, g2) y = MatMul(m, t)"
    )
    constants = {"table": matrix(9, N), "w": matrix(N, N, seed=1)}
    constants |= {"g": np.abs(matrix(N, seed=2)) + 0.5, "g2": np.abs(matrix(N, seed=3)) + 0.5}
    model = oracle.parse(body, {}, constants | {"ids": np.array([1, 2, 3])}, (3, 9))
    ids = model.graph.initializers.pop("ids")
    ids.const_value = None
    model.graph.inputs.append(ids)
    spaces = analyse(model)
    # The final gamma sits between the stream and the same table: the table cannot follow one side only.
    table = next(s for s in spaces if any(m.name == "table" for m in s.members) and s.size == N)
    assert not table.scalable and not any(g.mixes for _, g in table.blocks)
    assert prove(spaces).holds


def test_a_tied_table_without_gamma_in_between_rotates():
    body = "e = Gather(table, ids) t = Transpose(table) y = MatMul(e, t)"
    model = oracle.parse(body, {}, {"table": matrix(9, N), "ids": np.array([1, 2, 3])}, (3, 9))
    ids = model.graph.initializers.pop("ids")
    ids.const_value = None
    model.graph.inputs.append(ids)
    spaces = analyse(model)
    assert spaces.of("e").group == f"O({N})"
    assert prove(spaces).holds


def test_a_sum_of_two_scaled_streams_follows_neither():
    """g1 a + g2 b = c: the matrix of c would have to be G1 A G1^-1 and G2 B G2^-1 at once."""
    body = "a = MatMul(x, w1) b = MatMul(x, w2) s = Mul(a, g1) t = Mul(b, g2) c = Add(s, t) y = MatMul(c, v)"
    constants = {n: matrix(N, N, seed=i) for i, n in enumerate(("w1", "w2", "v"))}
    constants |= {n: np.abs(matrix(N, seed=i)) + 0.5 for i, n in enumerate(("g1", "g2"), 7)}
    spaces = analyse(parse(body, constants))
    assert spaces.of("c").leader is None
    assert prove(spaces).holds


def test_a_stream_that_meets_itself_scaled_stays_diagonal():
    """x + g x: A = G' A G^-1 has no solution but diagonals and permutations; nothing follows itself."""
    body = "a = MatMul(x, w) s = Mul(a, g) c = Add(a, s) y = MatMul(c, v)"
    constants = {"w": matrix(N, N), "v": matrix(N, N, seed=1), "g": np.abs(matrix(N, seed=2)) + 0.5}
    spaces = analyse(parse(body, constants))
    assert spaces.of("a").index == spaces.of("c").index
    assert spaces.of("a").leader is None and spaces.of("a").group == f"R*^{N} x S"
    assert prove(spaces).holds


def test_an_unknown_operator_pins_and_names_itself():
    model = parse("a = MatMul(x, w) b = Det(a) y = MatMul(a, v)", {"w": matrix(N, N), "v": matrix(N, N)})
    spaces = analyse(model)
    assert spaces.of("a").pinned
    assert any("Det" in reason for reason in spaces.of("a").reasons)


def test_a_value_captured_by_a_sub_graph_is_pinned():
    model = parse("a = MatMul(x, w) y = MatMul(a, v)", {"w": matrix(N, N), "v": matrix(N, N)})
    a = next(o for n in model.graph for o in n.outputs if o.name == "a")
    model.graph.insert_after(a.producer(), [branch_that_reads(model, a)])
    assert analyse(model).of("a").pinned


def test_a_weight_that_a_sub_graph_reads_first_stays():
    model = parse("a = MatMul(x, w) y = MatMul(a, v)", {"w": matrix(N, N), "v": matrix(N, N)})
    first = next(iter(model.graph))
    model.graph.insert_before(first, [branch_that_reads(model, model.graph.initializers["w"])])
    assert analyse(model).of("a").pinned


def branch_that_reads(model, value):
    """An If, on a new input of the model, whose branches capture ``value``."""
    inner = ir.node("Relu", [value], name="inner")
    body = ir.Graph([], inner.outputs, nodes=[inner], opset_imports={"": 23}, name="body")
    condition = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(condition)
    return ir.node(
        "If",
        [condition],
        attributes={"then_branch": body, "else_branch": body.clone(allow_outer_scope_values=True)},
        num_outputs=1,
        name="branch",
    )


def test_kv_cache_inputs_pin_what_they_are_joined_with():
    body = "k = MatMul(x, w) all = Concat<axis=0>(past, k) y = MatMul(all, v)"
    model = parse(body, {"w": matrix(N, N), "v": matrix(N, N)}, {"x": (3, N), "past": (2, N)}, (5, N))
    spaces = analyse(model)
    assert spaces.of("k").pinned and any("past" in r for r in spaces.of("k").reasons)


def test_a_scale_on_copies_of_channels_is_not_peeled():
    """Channel 0 is read twice, and each copy has a factor of its own: a matrix on the originals fixes none on the copies."""
    body = "a = MatMul(x, w) c = Gather<axis=1>(a, i) s = Mul(c, g) y = MatMul(s, v)"
    constants = {"w": matrix(N, N), "v": matrix(N + 1, N, seed=1), "g": np.abs(matrix(N + 1, seed=2)) + 0.5}
    spaces = analyse(parse(body, constants | {"i": np.array([0, 1, 2, 3, 0])}))
    assert not any(s.mixes for s in spaces.spaces_of("a")) and all(s.scalable for s in spaces.spaces_of("s"))
    assert prove(spaces).holds


READ_AS_IT_IS = {
    "before": "t = Tanh(w) b = MatMul(x, w) a = MatMul(b, t)",
    "after": "b = MatMul(x, w) t = Tanh(w) a = MatMul(b, t)",
    "with the model's input": "t = Mul(x, w) b = MatMul(x, w) a = MatMul(t, b)",
}


@pytest.mark.parametrize("case", READ_AS_IT_IS)
def test_a_weight_that_an_operator_reads_as_it_is_stays(case, monkeypatch):
    """Its other readers would like to rewrite it; what is computed from constants cannot be rewritten at all."""
    from qcompile.passes.spaces import prepare

    monkeypatch.setattr(prepare, "LARGEST_FOLDED", 0)
    spaces = analyse(
        parse(
            f"{READ_AS_IT_IS[case]} r = Relu(a) y = MatMul(r, v)",
            {"w": matrix(N, N), "v": matrix(N, N)},
            {"x": (N, N)},
            (N, N),
        )
    )
    assert not any(s.scalable or s.mixes for s in spaces.spaces_of("w", 1))
    for seed in range(3):
        assert prove(spaces, seed).holds
