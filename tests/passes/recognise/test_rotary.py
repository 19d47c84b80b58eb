"""RotaryEmbedding in the forms of Llama, GPT-NeoX, GPT-J and hand-written graphs, for any batch."""

from __future__ import annotations

import numpy as np
import pytest

HEAD = "g (float[b, 3, s, 8] x, float[{n}, s, 4] f) => (float[b, 3, s, 8] y)"
FULL = """
    a = Concat<axis = -1>(f, f) c0 = Cos(a) s0 = Sin(a) one = Constant<value_ints = [1]>()
    cos = Unsqueeze(c0, one) sin = Unsqueeze(s0, one)
"""
HALVES = """
    zero = Constant<value_ints = [0]>() four = Constant<value_ints = [4]>() end = Constant<value_ints = [9223372036854775807]>()
    three = Constant<value_ints = [3]>()
    low = Slice(x, zero, four, three) high = Slice(x, four, end, three)
"""
ROTATE = "minus = Neg(high) turned = Concat<axis = -1>(minus, low)"
APPLY = "p = Mul(x, cos) q = Mul(turned, sin) y = Add(p, q)"


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("tables", ["1", "b"])
def test_full_tables(check, batch: int, tables: str) -> None:
    text = f"{HEAD.format(n=tables)} {{ {FULL} {HALVES} {ROTATE} {APPLY} }}"
    _, report = check(text, {"RotaryEmbedding": 1}, dims={"b": batch})
    assert not report.refused


def test_split_instead_of_slices(check) -> None:
    halves = "low, high = Split<axis = -1, num_outputs = 2>(x)"
    check(f"{HEAD.format(n='b')} {{ {FULL} {halves} {ROTATE} {APPLY} }}", {"RotaryEmbedding": 1})


def test_scaled_tables(check) -> None:
    full = FULL.replace("c0 = Cos(a)", "k = Constant<value_float = 1.25>() c1 = Cos(a) c0 = Mul(c1, k)")
    check(f"{HEAD.format(n='b')} {{ {full} {HALVES} {ROTATE} {APPLY} }}", {"RotaryEmbedding": 1})


def test_constant_tables_looked_up_by_position(check) -> None:
    angle = np.arange(16, dtype=np.float32)[:, None] * np.array([1, 0.5, 0.25, 0.125], np.float32)
    full = np.concatenate([angle, angle], -1)
    text = f"""g (float[b, 3, s, 8] x, int64[b, s] ids) => (float[b, 3, s, 8] y) {{
        one = Constant<value_ints = [1]>()
        c0 = Gather(ct, ids) s0 = Gather(st, ids) cos = Unsqueeze(c0, one) sin = Unsqueeze(s0, one)
        {HALVES} {ROTATE} {APPLY} }}"""
    model, _ = check(text, {"RotaryEmbedding": 1}, ct=np.cos(full), st=np.sin(full))
    assert {v.const_value.shape[-1] for v in model.graph.initializers.values() if v.const_value.shape[:1] == (16,)} == {
        4
    }


def test_parts_with_half_tables(check) -> None:
    text = f"""{HEAD.format(n="1")} {{
        c0 = Cos(f) s0 = Sin(f) one = Constant<value_ints = [1]>() cos = Unsqueeze(c0, one) sin = Unsqueeze(s0, one)
        {HALVES}
        ac = Mul(low, cos) bs = Mul(high, sin) first = Sub(ac, bs)
        bc = Mul(high, cos) as = Mul(low, sin) second = Add(bc, as)
        y = Concat<axis = -1>(first, second) }}"""
    check(text, {"RotaryEmbedding": 1})


EVEN_ODD = """
    zero = Constant<value_ints = [0]>() one = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>()
    three = Constant<value_ints = [3]>() end = Constant<value_ints = [9223372036854775807]>() last = Constant<value_ints = [-1]>()
    even = Slice(x, zero, end, three, two) odd = Slice(x, one, end, three, two)
"""


def test_interleaved_with_full_tables(check) -> None:
    text = f"""{HEAD.format(n="b")} {{
        {EVEN_ODD}
        f1 = Unsqueeze(f, last) pair = Constant<value_ints = [1, 1, 1, 2]>() f2 = Expand(f1, pair)
        flat = Constant<value_ints = [0, 0, 8]>() a = Reshape(f2, flat)
        c0 = Cos(a) s0 = Sin(a) cos = Unsqueeze(c0, one) sin = Unsqueeze(s0, one)
        minus = Neg(odd) m1 = Unsqueeze(minus, last) e1 = Unsqueeze(even, last) both = Concat<axis = -1>(m1, e1)
        shape = Constant<value_ints = [0, 0, 0, 8]>() turned = Reshape(both, shape)
        {APPLY} }}"""
    model, _ = check(text, {"RotaryEmbedding": 1})
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].as_int() == 1


def test_interleaved_parts(check) -> None:
    text = f"""{HEAD.format(n="b")} {{
        {EVEN_ODD} c0 = Cos(f) s0 = Sin(f) cos = Unsqueeze(c0, one) sin = Unsqueeze(s0, one)
        ac = Mul(even, cos) bs = Mul(odd, sin) first = Sub(ac, bs)
        bc = Mul(odd, cos) as = Mul(even, sin) second = Add(as, bc)
        f1 = Unsqueeze(first, last) s1 = Unsqueeze(second, last) both = Concat<axis = -1>(f1, s1)
        shape = Constant<value_ints = [0, 0, 0, 8]>() y = Reshape(both, shape) }}"""
    check(text, {"RotaryEmbedding": 1})


def test_heads_after_positions(check) -> None:
    text = f"""g (float[b, s, 3, 8] x, float[b, s, 4] f) => (float[b, s, 3, 8] y) {{
        {FULL.replace("[1]", "[2]")} {HALVES} {ROTATE} {APPLY} }}"""
    check(text, {"RotaryEmbedding": 1})


def test_part_of_each_head(check) -> None:
    text = f"""g (float[b, 3, s, 12] z, float[b, s, 4] f) => (float[b, 3, s, 12] w) {{
        eight = Constant<value_ints = [8]>() nil = Constant<value_ints = [0]>() axis = Constant<value_ints = [-1]>()
        stop = Constant<value_ints = [12]>()
        x = Slice(z, nil, eight, axis) rest = Slice(z, eight, stop, axis)
        {FULL} {HALVES} {ROTATE} {APPLY}
        w = Concat<axis = -1>(y, rest) }}"""
    model, _ = check(text, {"RotaryEmbedding": 1})
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].as_int() == 8


def test_three_axes_become_four(check) -> None:
    text = """g (float[b, s, 24] x, float[b, s, 4] c, float[b, s, 4] d) => (float[b, s, 24] y) {
        y = RotaryEmbedding<num_heads = 3>(x, c, d) }"""
    model, _ = check(text, {"RotaryEmbedding": 1}, opset=23)
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert len(node.inputs[0].shape) == 4


def test_part_of_each_head_with_heads_after_positions(check) -> None:
    text = f"""g (float[b, s, 3, 12] z, float[b, s, 4] f) => (float[b, s, 3, 12] w) {{
        eight = Constant<value_ints = [8]>() nil = Constant<value_ints = [0]>() axis = Constant<value_ints = [-1]>()
        stop = Constant<value_ints = [12]>()
        x = Slice(z, nil, eight, axis) rest = Slice(z, eight, stop, axis)
        {FULL.replace("[1]", "[2]")} {HALVES} {ROTATE} {APPLY}
        w = Concat<axis = -1>(y, rest) }}"""
    model, _ = check(text, {"RotaryEmbedding": 1})
    assert "Slice" not in [n.op_type for n in model.graph]


def refused(report) -> str:
    reasons = [item.reason for item in report.refused if item.kind == "RotaryEmbedding"]
    assert len(reasons) == 1, str(report)
    return reasons[0]


def test_table_with_unequal_halves(check) -> None:
    full = FULL.replace("Concat<axis = -1>(f, f)", "Concat<axis = -1>(f, g2)").replace("a =", "g2 = Neg(f) a =", 1)
    _, report = check(f"{HEAD.format(n='b')} {{ {full} {HALVES} {ROTATE} {APPLY} }}", {})
    assert "could not be proven equal" in refused(report)


def test_constant_table_with_unequal_halves(check, random_weights) -> None:
    text = f"""g (float[b, 3, 5, 8] x) => (float[b, 3, 5, 8] y) {{ {HALVES} {ROTATE} {APPLY} }}"""
    _, report = check(text, {}, cos=random_weights(1, 1, 5, 8), sin=random_weights(1, 1, 5, 8))
    assert "could not be proven equal" in refused(report)


def test_rotation_in_the_other_direction_is_none(check) -> None:
    check(f"{HEAD.format(n='b')} {{ {FULL} {HALVES} {ROTATE.replace('(minus, low)', '(low, minus)')} {APPLY} }}", {})


def test_rotation_without_minus_is_none(check) -> None:
    check(f"{HEAD.format(n='b')} {{ {FULL} {HALVES} turned = Concat<axis = -1>(high, low) {APPLY} }}", {})


def test_halves_of_unequal_size_are_none(check) -> None:
    halves = HALVES.replace("value_ints = [4]", "value_ints = [3]")
    check(f"{HEAD.format(n='b')} {{ {FULL} {halves} {ROTATE} {APPLY} }}", {})


def test_rotated_half_read_elsewhere(check) -> None:
    head = HEAD.format(n="b").replace("8] y)", "8] y, float[b, 3, s, 8] turned)")
    _, report = check(f"{head} {{ {FULL} {HALVES} {ROTATE} {APPLY} }}", {})
    assert "'turned' is used elsewhere" in refused(report)


def test_table_that_varies_with_heads(check) -> None:
    text = f"""g (float[b, 3, s, 8] x, float[b, 3, s, 4] f) => (float[b, 3, s, 8] y) {{
        a = Concat<axis = -1>(f, f) cos = Cos(a) sin = Sin(a) {HALVES} {ROTATE} {APPLY} }}"""
    _, report = check(text, {})
    assert "does not vary with position alone" in refused(report)
