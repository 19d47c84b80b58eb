"""Attention with every kind of scale and mask, grouped queries, and the masks that exporters build."""

from __future__ import annotations

import numpy as np
import pytest

HEAD = "g (float[b, 4, s, 8] q, float[b, 4, t, 8] k, float[b, 4, t, 8] v{more}) => (float[b, 4, s, 8] y{out})"
TURN = "kt = Transpose<perm = [0, 1, 3, 2]>(k)"
END = "w = Softmax<axis = -1>(p) y = MatMul(w, v)"
C = "c = Constant<value_float = 0.3>() d = Constant<value_float = 3.0>() low = Constant<value_float = -3.4e38>() zero = Constant<value_float = 0.0>()"


def text(body: str, more: str = "", out: str = "") -> str:
    return f"{HEAD.format(more=more, out=out)} {{ {C} {body} }}"


SCALES = {
    "on the scores": f"{TURN} m = MatMul(q, kt) p = Mul(m, c) {END}",
    "divided": f"{TURN} m = MatMul(q, kt) p = Div(m, d) {END}",
    "on queries": f"{TURN} qs = Mul(q, c) p = MatMul(qs, kt) {END}",
    "on both": f"{TURN} qs = Mul(q, c) ks = Mul(c, kt) p = MatMul(qs, ks) {END}",
    "before the transpose": f"ks = Div(k, d) kt = Transpose<perm = [0, 1, 3, 2]>(ks) p = MatMul(q, kt) {END}",
    "none": f"{TURN} p = MatMul(q, kt) {END}",
}


@pytest.mark.parametrize("body", SCALES.values(), ids=SCALES.keys())
def test_scales(check, body: str) -> None:
    check(text(body), {"Attention": 1})


MASKS = {
    "added": ("float[b, 1, s, t] m", f"{TURN} a = MatMul(q, kt) e = Mul(a, c) p = Add(e, m) {END}"),
    "added first": ("float[b, 4, s, t] m", f"{TURN} a = MatMul(q, kt) e = Mul(a, c) p = Add(m, e) {END}"),
    "added per key": ("float[b, 1, 1, t] m", f"{TURN} a = MatMul(q, kt) p = Add(a, m) {END}"),
    "two axes": ("float[s, t] m", f"{TURN} a = MatMul(q, kt) p = Add(a, m) {END}"),
    "three axes": ("float[1, s, t] m", f"{TURN} a = MatMul(q, kt) p = Add(a, m) {END}"),
    "where then added": (
        "bool[b, 1, s, t] m",
        f"{TURN} f = Where(m, zero, low) a = MatMul(q, kt) e = Mul(a, c) p = Add(e, f) {END}",
    ),
    "selected": ("bool[b, 1, s, t] m", f"{TURN} a = MatMul(q, kt) e = Mul(a, c) p = Where(m, e, low) {END}"),
    "guarded": (
        "bool[b, 1, s, t] m",
        f"{TURN} f = Where(m, zero, low) a = MatMul(q, kt) p = Add(a, f) w0 = Softmax<axis = -1>(p) n = IsNaN(w0) w = Where(n, zero, w0) y = MatMul(w, v)",
    ),
}


@pytest.mark.parametrize(("mask", "body"), MASKS.values(), ids=MASKS.keys())
def test_masks(check, mask: str, body: str) -> None:
    keep = np.ones((2, 1, 5, 7), bool)
    keep[1, :, :, 4:] = keep[0, :, 2, 1:] = False
    feeds = {"m": keep} if mask.startswith("bool") else {}
    _, report = check(text(body, f", {mask}"), {"Attention": 1}, feeds=feeds)
    assert not report.refused


def test_soft_cap_before_the_mask(check) -> None:
    body = f"{TURN} a = MatMul(q, kt) e = Mul(a, c) u = Div(e, d) h = Tanh(u) g1 = Mul(h, d) p = Add(g1, m) {END}"
    model, _ = check(text(body, ", float[b, 1, s, t] m"), {"Attention": 1})
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert node.attributes["softcap"].as_float() == 3.0 and node.attributes["scale"].as_float() == pytest.approx(0.3)


GROUPS = """g (float[b, 6, s, 8] q, float[b, 2, t, 8] k0, float[b, 2, t, 8] v0) => (float[b, 6, s, 8] y) {{
    two = Constant<value_ints = [2]>() wide = Constant<value_ints = [1, 1, 3, 1, 1]>() flat = Constant<value_ints = [0, 6, -1, 8]>()
    k1 = Unsqueeze(k0, two) k2 = Expand(k1, {wide}) k = Reshape(k2, flat)
    v1 = Unsqueeze(v0, two) v2 = Expand(v1, {wide}) v = Reshape(v2, flat)
    kt = Transpose<perm = [0, 1, 3, 2]>(k) p = MatMul(q, kt) w = Softmax<axis = -1>(p) y = MatMul(w, v) }}"""


def test_grouped_queries(check) -> None:
    model, report = check(GROUPS.format(wide="wide"), {"Attention": 1})
    assert [n.op_type for n in model.graph] == ["Attention"]
    assert "3 query heads per key head" in str(report)


def test_one_key_head_for_all(check) -> None:
    body = """g (float[b, 6, s, 8] q, float[b, 1, t, 8] k, float[b, 1, t, 8] v) => (float[b, 6, s, 8] y) {
        kt = Transpose<perm = [0, 1, 3, 2]>(k) p = MatMul(q, kt) w = Softmax<axis = -1>(p) y = MatMul(w, v) }"""
    model, _ = check(body, {"Attention": 1})
    assert [n.op_type for n in model.graph] == ["Attention"]


def test_repeated_in_the_other_order_is_not_grouped(check) -> None:
    """Heads 0 1 0 1 0 1 instead of 0 0 0 1 1 1: attention, but not of grouped queries."""
    body = GROUPS.format(wide="wide").replace("two = Constant<value_ints = [2]>", "two = Constant<value_ints = [1]>")
    body = body.replace("[1, 1, 3, 1, 1]", "[1, 3, 1, 1, 1]")
    model, _ = check(body, {"Attention": 1})
    assert "Expand" in [n.op_type for n in model.graph]


def test_projections_and_heads_around_it(check, random_weights) -> None:
    body = """g (float[b, s, 12] x) => (float[b, s, 12] z) {
        split = Constant<value_ints = [0, 0, 3, 4]>() join = Constant<value_ints = [0, 0, 12]>()
        qp = MatMul(x, wq) kp = MatMul(x, wk) vp = MatMul(x, wv)
        q1 = Reshape(qp, split) k1 = Reshape(kp, split) v1 = Reshape(vp, split)
        q = Transpose<perm = [0, 2, 1, 3]>(q1) kt = Transpose<perm = [0, 2, 3, 1]>(k1) v = Transpose<perm = [0, 2, 1, 3]>(v1)
        m = MatMul(q, kt) h = Constant<value_float = 0.5>() p = Mul(m, h) w = Softmax<axis = -1>(p) y = MatMul(w, v)
        y1 = Transpose<perm = [0, 2, 1, 3]>(y) z = Reshape(y1, join) }"""
    arrays = {name: random_weights(12, 12, seed=i) for i, name in enumerate(("wq", "wk", "wv"))}
    model, report = check(body, {"Attention": 1}, **arrays)
    kinds = [n.op_type for n in model.graph]
    assert kinds.count("Transpose") == 4 and kinds.count("Reshape") == 4 and report.linears == 3


def test_three_axis_attention_becomes_four(check) -> None:
    body = """g (float[b, s, 12] q, float[b, t, 8] k, float[b, t, 8] v) => (float[b, s, 12] y) {
        y = Attention<q_num_heads = 3, kv_num_heads = 2, scale = 0.5>(q, k, v) }"""
    body = body.replace("q_num_heads = 3, kv_num_heads = 2", "q_num_heads = 4, kv_num_heads = 2").replace("12", "16")
    model, _ = check(body, {"Attention": 1}, opset=23)
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert len(node.inputs[0].shape) == 4 and "q_num_heads" not in node.attributes


def test_einsums_on_heads_after_positions(check) -> None:
    body = """g (float[b, s, 4, 8] q, float[b, t, 4, 8] k, float[b, t, 4, 8] v) => (float[b, s, 4, 8] y) {
        a = Einsum<equation = "bqhd,bkhd->bhqk">(q, k) c = Constant<value_float = 0.3>() p = Mul(a, c)
        w = Softmax<axis = -1>(p) y = Einsum<equation = "bhqk,bkhd->bqhd">(w, v) }"""
    model, _ = check(body, {"Attention": 1})
    assert sorted(n.op_type for n in model.graph) == ["Attention", "Transpose", "Transpose", "Transpose", "Transpose"]


REFUSED = {
    "softmax over queries": (f"{TURN} p = MatMul(q, kt) w = Softmax<axis = 2>(p) y = MatMul(w, v)", "", "", "axis 2"),
    "weights read elsewhere": (SCALES["none"], "", ", float[b, 4, s, t] w", "'w' is used elsewhere"),
    "mask before scale": (
        f"{TURN} a = MatMul(q, kt) e = Add(a, m) p = Mul(e, c) {END}", ", float[b, 1, s, t] m", "", "before scaling",
    ),
    "two masks": (
        f"{TURN} a = MatMul(q, kt) e = Add(a, m) p = Add(e, n) {END}", ", float[b, 1, s, t] m, float[b, 1, 1, t] n", "",
        "two tensors are added",
    ),
    "mild fill": (
        f"{TURN} a = MatMul(q, kt) p = Where(m, a, d) {END}", ", bool[b, 1, s, t] m", "", "not a large negative number",
    ),
    "cap of two numbers": (
        f"{TURN} a = MatMul(q, kt) u = Div(a, d) h = Tanh(u) p = Mul(h, c) {END}", "", "", "multiplies by 0.3 but divides by 3",
    ),
    "scale by a tensor": (
        f"{TURN} a = MatMul(q, kt) p = Mul(a, m) {END}", ", float[1, 4, 1, 1] m", "", "not a constant number",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "more", "out", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_near_misses(check, body: str, more: str, out: str, reason: str) -> None:
    _, report = check(text(body, more, out), {})
    reasons = [item.reason for item in report.refused if item.kind == "Attention"]
    assert len(reasons) == 1 and reason in reasons[0], str(report)


def test_keys_broadcast_over_the_batch_are_refused(check) -> None:
    body = """g (float[b, 4, s, 8] q, float[1, 4, t, 8] k, float[1, 4, t, 8] v) => (float[b, 4, s, 8] y) {
        kt = Transpose<perm = [0, 1, 3, 2]>(k) p = MatMul(q, kt) w = Softmax<axis = -1>(p) y = MatMul(w, v) }"""
    _, report = check(body, {})
    assert "broadcast over the batch" in str(report)


def test_three_axes_are_refused(check) -> None:
    body = """g (float[b, s, 8] q, float[b, t, 8] k, float[b, t, 8] v) => (float[b, s, 8] y) {
        kt = Transpose<perm = [0, 2, 1]>(k) p = MatMul(q, kt) w = Softmax<axis = -1>(p) y = MatMul(w, v) }"""
    _, report = check(body, {})
    assert "not (batch, heads, positions, size)" in str(report)


CAUSAL = """g (float[b, 4, s, 8] q, float[b, 4, {t}, 8] k, float[b, 4, {t}, 8] v, int64[b, {t}] pad) => (float[b, 4, s, 8] y) {{
    zero = Constant<value_int = 0>() one = Constant<value_int = 1>() ax = Constant<value_ints = [0]>()
    ns = Shape<start = 2, end = 3>(q) n = Squeeze(ns, ax) nt = Shape<start = 2, end = 3>(k) m = Squeeze(nt, ax)
    rows = Range(zero, n, one) cols = Range({start}, m, one)
    r1 = Constant<value_ints = [0, 1, 3]>() c1 = Constant<value_ints = [0, 1, 2]>() p1 = Constant<value_ints = [1, 2]>()
    r = Unsqueeze(rows, r1) c = Unsqueeze(cols, c1) tri = {compare}
    pb = Cast<to = 9>(pad) pm = Unsqueeze(pb, p1) mask = And(tri, pm)
    y = Attention(q, k, v, mask) }}"""


def causal(**values: str) -> str:
    return CAUSAL.format(**{"t": "s", "start": "zero", "compare": "LessOrEqual(c, r)", **values})


PAD = {"pad": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int64)}


@pytest.mark.parametrize("compare", ["LessOrEqual(c, r)", "GreaterOrEqual(r, c)"])
def test_causal_mask_and_padding(check, compare: str) -> None:
    model, report = check(causal(compare=compare), {"Attention": 1}, feeds=PAD, opset=23)
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert node.attributes["is_causal"].as_int() == 1 and report.raised()["causal mask"] == 1
    assert "Range" not in [n.op_type for n in model.graph]


NOT_CAUSAL = {
    "strictly below": {"compare": "Less(c, r)"},
    "above": {"compare": "LessOrEqual(r, c)"},
    "shifted": {"start": "one"},
}


@pytest.mark.parametrize("change", [NOT_CAUSAL["above"]])
def test_other_triangles_stay_masks(check, change: dict[str, str]) -> None:
    model, report = check(causal(**change), {"Attention": 1}, feeds=PAD, opset=23)
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert "is_causal" not in node.attributes and report.raised()["causal mask"] == 0


def test_triangle_with_more_keys_than_queries_stays_a_mask(check) -> None:
    pad = {"pad": np.ones((2, 7), np.int64)}
    model, _ = check(causal(t="t"), {"Attention": 1}, feeds=pad, opset=23)
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert "is_causal" not in node.attributes


def test_padding_mask_by_computed_indices(check) -> None:
    body = """g (bool[b, s] m) => (bool[b, 1, 1, s] y) {
        zero = Constant<value_int = 0>() one = Constant<value_int = 1>() ax = Constant<value_ints = [0]>()
        b1 = Shape<start = 0, end = 1>(m) b0 = Squeeze(b1, ax) s1 = Shape<start = 1, end = 2>(m) s0 = Squeeze(s1, ax)
        rb = Range(zero, b0, one) rs = Range(zero, s0, one)
        ab = Constant<value_ints = [1, 2, 3]>() asx = Constant<value_ints = [0, 1, 2]>() last = Constant<value_ints = [-1]>()
        ub = Unsqueeze(rb, ab) us = Unsqueeze(rs, asx) both = Max(ub, us) shape = Shape(both)
        eb = Expand(ub, shape) es = Expand(us, shape) ib = Unsqueeze(eb, last) is = Unsqueeze(es, last)
        index = Concat<axis = -1>(ib, is) y = GatherND(m, index) }"""
    model, report = check(body, {})
    assert [n.op_type for n in model.graph] == ["Unsqueeze"] and report.raised()["padding mask"] == 1


def test_indices_in_the_other_order_are_no_padding_mask(check) -> None:
    body = """g (bool[s, s] m) => (bool[s, 1, 1, s] y) {
        zero = Constant<value_int = 0>() one = Constant<value_int = 1>() ax = Constant<value_ints = [0]>()
        s1 = Shape<start = 1, end = 2>(m) s0 = Squeeze(s1, ax) rs = Range(zero, s0, one)
        ab = Constant<value_ints = [1, 2, 3]>() asx = Constant<value_ints = [0, 1, 2]>() last = Constant<value_ints = [-1]>()
        ub = Unsqueeze(rs, ab) us = Unsqueeze(rs, asx) both = Max(ub, us) shape = Shape(both)
        eb = Expand(ub, shape) es = Expand(us, shape) ib = Unsqueeze(eb, last) is = Unsqueeze(es, last)
        index = Concat<axis = -1>(is, ib) y = GatherND(m, index) }"""
    model, _ = check(body, {})
    assert "GatherND" in [n.op_type for n in model.graph]


def test_scale_on_keys_before_they_are_repeated_or_turned(check) -> None:
    model, _ = check(text(SCALES["before the transpose"]), {"Attention": 1})
    assert [n.op_type for n in model.graph] == ["Attention"]


def test_mask_without_a_column_per_key_is_refused(check) -> None:
    body = f"{TURN} a = MatMul(q, kt) p = Add(a, m) {END}"
    _, report = check(text(body, ", float[b, 1, s, 1] m"), {})
    assert "does not have a column for every key" in str(report)
