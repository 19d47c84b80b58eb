"""LayerNormalization and RMSNormalization: every spelling is raised, every near miss is refused with its reason."""

from __future__ import annotations

import numpy as np
import pytest

TWO = "two = Constant<value_float = 2.0>()"
EPS = "eps = Constant<value_float = 1e-5>()"
LAST = "last = Constant<value_ints = [-1]>()"
HEAD = "g (float[b, s, 8] x) => (float[b, s, 8] y)"


def layer_norm(divide: str, square: str = "q = Pow(d, two)", tail: str = "n = Mul(u, gain)\ny = Add(n, bias)") -> str:
    return f"""{HEAD} {{
        {TWO} {EPS} {LAST}
        m = ReduceMean(x, last)
        d = Sub(x, m)
        {square}
        v = ReduceMean(q, last)
        {divide}
        {tail}
    }}"""


ROOT = "e = Add(v, eps) r = Sqrt(e)"
SPELLINGS = {
    "div": f"{ROOT} u = Div(d, r)",
    "reciprocal": f"{ROOT} i = Reciprocal(r) u = Mul(d, i)",
    "one over root": f"{ROOT} one = Constant<value_float = 1.0>() i = Div(one, r) u = Mul(i, d)",
    "power": "e = Add(eps, v) h = Constant<value_float = -0.5>() i = Pow(e, h) u = Mul(d, i)",
}


@pytest.mark.parametrize("divide", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("square", ["q = Pow(d, two)", "q = Mul(d, d)"])
def test_layer_norm_spellings(check, random_weights, divide: str, square: str) -> None:
    gain, bias = random_weights(8), random_weights(8, seed=4)
    model, _ = check(layer_norm(divide, square), {"LayerNormalization": 1}, gain=gain, bias=bias)
    assert len(model.graph) == 1


def test_layer_norm_of_two_separate_differences(check, random_weights) -> None:
    text = f"""{HEAD} {{
        {TWO} {EPS} {LAST}
        m = ReduceMean(x, last)
        d = Sub(x, m)
        d2 = Sub(x, m)
        q = Pow(d2, two)
        v = ReduceMean(q, last)
        {ROOT}
        u = Div(d, r)
        y = Mul(gain, u)
    }}"""
    check(text, {"LayerNormalization": 1}, gain=random_weights(8))


def test_layer_norm_without_gain_gets_ones(check) -> None:
    model, _ = check(layer_norm(SPELLINGS["div"], tail="y = Identity(u)"), {"LayerNormalization": 1})
    gain = next(iter(model.graph)).inputs[1]
    assert gain is not None and np.all(gain.const_value.numpy() == 1)


def test_layer_norm_over_two_axes(check, random_weights) -> None:
    text = f"""g (float[b, 4, 8] x) => (float[b, 4, 8] y) {{
        {TWO} {EPS} axes = Constant<value_ints = [1, 2]>()
        m = ReduceMean(x, axes)
        d = Sub(x, m)
        q = Pow(d, two)
        v = ReduceMean(q, axes)
        {ROOT}
        u = Div(d, r)
        y = Mul(u, gain)
    }}"""
    model, _ = check(text, {"LayerNormalization": 1}, gain=random_weights(4, 8))
    assert next(iter(model.graph)).attributes["axis"].as_int() == -2


def test_layer_norm_of_an_old_opset(check, random_weights) -> None:
    text = f"""{HEAD} {{
        {TWO} {EPS}
        m = ReduceMean<axes = [-1]>(x)
        d = Sub(x, m)
        q = Pow(d, two)
        v = ReduceMean<axes = [-1]>(q)
        {ROOT}
        u = Div(d, r)
        n = Mul(u, gain)
        y = Add(n, bias)
    }}"""
    gain, bias = random_weights(8), random_weights(8, seed=4)
    check(text, {"LayerNormalization": 1}, opset=13, gain=gain, bias=bias)


def refusal(report, kind: str) -> str:
    reasons = [item.reason for item in report.refused if item.kind == kind]
    assert len(reasons) == 1, str(report)
    return reasons[0]


def test_layer_norm_with_epsilon_outside_the_root(check) -> None:
    divide = "r = Sqrt(v) e = Add(r, eps) u = Div(d, e)"
    _, report = check(layer_norm(divide, tail="y = Identity(u)"), {})
    assert "outside the square root" in refusal(report, "LayerNormalization")


def test_layer_norm_with_different_axes(check) -> None:
    text = layer_norm(SPELLINGS["div"], tail="y = Identity(u)").replace(
        "v = ReduceMean(q, last)", "other = Constant<value_ints = [1]>() v = ReduceMean(q, other)"
    )
    _, report = check(text, {})
    assert "different axes" in refusal(report, "LayerNormalization")


def test_layer_norm_over_the_wrong_axis(check) -> None:
    text = layer_norm(SPELLINGS["div"], tail="y = Identity(u)").replace("value_ints = [-1]", "value_ints = [1]")
    _, report = check(text, {})
    assert "axes [-2], not the last" in refusal(report, "LayerNormalization")


def test_layer_norm_whose_variance_is_read_elsewhere(check) -> None:
    text = layer_norm(SPELLINGS["div"], tail="y = Identity(u)").replace(
        "float[b, s, 8] y)", "float[b, s, 8] y, float[b, s, 1] v)"
    )
    _, report = check(text, {})
    assert "'v' is used elsewhere" in refusal(report, "LayerNormalization")


def test_layer_norm_with_another_divisor_is_no_layer_norm(check) -> None:
    text = layer_norm(SPELLINGS["div"], tail="y = Identity(u)").replace("d = Sub(x, m)", "d = Sub(m, x)")
    model, _ = check(text, {"RMSNormalization": 1})  # x and the mean change places: a norm of (m - x), which is exact
    assert any(node.op_type == "Sub" for node in model.graph)


def test_gain_of_another_shape_stays_outside(check, random_weights) -> None:
    model, _ = check(
        layer_norm(SPELLINGS["div"], tail="y = Mul(u, gain)"), {"LayerNormalization": 1}, gain=random_weights(1)
    )
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Mul"]


def rms_norm(divide: str, square: str = "q = Pow(x, two)", tail: str = "y = Mul(gain, u)") -> str:
    return f"""{HEAD} {{
        {TWO} {EPS} {LAST}
        {square}
        v = ReduceMean(q, last)
        {divide}
        {tail}
    }}"""


@pytest.mark.parametrize("divide", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("square", ["q = Pow(x, two)", "q = Mul(x, x)"])
def test_rms_norm_spellings(check, random_weights, divide: str, square: str) -> None:
    text = rms_norm(divide.replace("(d,", "(x,").replace(", d)", ", x)"), square)
    model, report = check(text, {"RMSNormalization": 1}, gain=random_weights(8))
    assert len(model.graph) == 1 and not report.refused


def test_rms_norm_with_epsilon_outside(check) -> None:
    _, report = check(rms_norm("r = Sqrt(v) e = Add(r, eps) u = Div(x, e)", tail="y = Identity(u)"), {})
    assert "outside the square root" in refusal(report, "RMSNormalization")


def test_rms_norm_over_the_wrong_axis(check) -> None:
    text = rms_norm(f"{ROOT} u = Div(x, r)", tail="y = Identity(u)").replace("[-1]", "[-2]")
    _, report = check(text, {})
    assert "not the last" in refusal(report, "RMSNormalization")


def test_rms_norm_whose_square_is_read_elsewhere(check) -> None:
    text = rms_norm(f"{ROOT} u = Div(x, r)", tail="t = Mul(gain, u) y = Add(t, q)")
    _, report = check(text, {}, gain=np.ones(8, np.float32))
    assert "'q' is used elsewhere" in refusal(report, "RMSNormalization")


def test_rms_norm_with_a_vector_of_epsilons(check) -> None:
    text = rms_norm("e = Add(v, many) r = Sqrt(e) u = Div(x, r)", tail="y = Identity(u)")
    _, report = check(text, {}, many=np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 2, 3], np.float32))
    assert "not a single number" in refusal(report, "RMSNormalization")


def test_mean_that_drops_the_axis_is_refused(check) -> None:
    text = f"""g (float[8, 8] x) => (float[8, 8] y) {{
        {TWO} {EPS} {LAST}
        q = Pow(x, two)
        v = ReduceMean<keepdims = 0>(q, last)
        {ROOT}
        y = Div(x, r)
    }}"""
    _, report = check(text, {})
    assert "drops the reduced axis" in refusal(report, "RMSNormalization")
