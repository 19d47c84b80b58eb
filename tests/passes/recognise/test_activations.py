"""Gelu and Swish in the orders and groupings that exporters produce."""

from __future__ import annotations

import pytest

HEAD = "g (float[b, 8] x) => (float[b, 8] y)"
CONSTANTS = """
    half = Constant<value_float = 0.5>() one = Constant<value_float = 1.0>() two = Constant<value_float = 2.0>()
    three = Constant<value_float = 3.0>() root = Constant<value_float = 1.4142135>() inverse = Constant<value_float = 0.70710678>()
    c = Constant<value_float = 0.044715>() k = Constant<value_float = 0.79788456>()
"""

ERF = {
    "x/r, x*(1+erf), *0.5": "a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
    "0.5*x first": "a = Mul(x, inverse) e = Erf(a) p = Add(one, e) m = Mul(half, x) y = Mul(m, p)",
    "0.5*(1+erf) first": "a = Mul(inverse, x) e = Erf(a) p = Add(e, one) m = Mul(p, half) y = Mul(x, m)",
    "divided by two": "a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Div(m, two)",
}
TANH = {
    "pow": "q = Pow(x, three) t = Mul(c, q) s = Add(x, t) a = Mul(k, s) e = Tanh(a) p = Add(one, e) m = Mul(half, x) y = Mul(m, p)",
    "products": "q = Mul(x, x) r = Mul(x, q) t = Mul(r, c) s = Add(x, t) a = Mul(s, k) e = Tanh(a) p = Add(e, one) m = Mul(x, p) y = Mul(half, m)",
    "factored": "q = Mul(x, x) t = Mul(q, c) s = Add(one, t) xk = Mul(x, k) a = Mul(xk, s) e = Tanh(a) p = Add(e, one) m = Mul(half, p) y = Mul(x, m)",
}


def text(body: str, head: str = HEAD) -> str:
    return f"{head} {{ {CONSTANTS} {body} }}"


@pytest.mark.parametrize("body", ERF.values(), ids=ERF.keys())
def test_gelu_erf(check, body: str) -> None:
    model, _ = check(text(body), {"Gelu": 1})
    (node,) = model.graph
    assert node.attributes["approximate"].as_string() == "none"


@pytest.mark.parametrize("body", TANH.values(), ids=TANH.keys())
def test_gelu_tanh(check, body: str) -> None:
    model, _ = check(text(body), {"Gelu": 1})
    (node,) = model.graph
    assert node.attributes["approximate"].as_string() == "tanh"


def test_gelu_of_a_product_keeps_the_product(check) -> None:
    body = "z = Mul(x, x) a = Div(z, root) e = Erf(a) p = Add(e, one) m = Mul(z, p) y = Mul(m, half)"
    model, _ = check(text(body), {"Gelu": 1})
    assert [node.op_type for node in model.graph] == ["Mul", "Gelu"]


NEAR_MISSES = {
    "wrong half": ("a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, c)", "factor is"),
    "no root": ("e = Erf(x) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)", "argument of erf"),
    "wrong cubic": (
        "q = Pow(x, three) t = Mul(half, q) s = Add(x, t) a = Mul(k, s) e = Tanh(a) p = Add(one, e) m = Mul(half, x) y = Mul(m, p)",
        "cubic coefficient",
    ),
    "wrong inner factor": (
        "q = Pow(x, three) t = Mul(c, q) s = Add(x, t) a = Mul(half, s) e = Tanh(a) p = Add(one, e) m = Mul(half, x) y = Mul(m, p)",
        "argument of tanh",
    ),
}


@pytest.mark.parametrize(("body", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_gelu_near_misses(check, body: str, reason: str) -> None:
    _, report = check(text(body), {})
    assert [reason in item.reason for item in report.refused] == [True], str(report)


def test_gelu_of_two_different_values_is_none(check) -> None:
    head = "g (float[b, 8] x, float[b, 8] z) => (float[b, 8] y)"
    body = "a = Div(z, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)"
    check(text(body, head), {})


def test_gelu_whose_erf_is_read_elsewhere(check) -> None:
    head = "g (float[b, 8] x) => (float[b, 8] y, float[b, 8] e)"
    _, report = check(text(ERF["0.5*x first"], head), {})
    assert ["used elsewhere" in item.reason for item in report.refused] == [True]


def test_swish(check) -> None:
    model, _ = check(text("s = Sigmoid(x) y = Mul(x, s)"), {"Swish": 1})
    assert not next(iter(model.graph)).attributes


def test_swish_with_a_factor(check) -> None:
    model, _ = check(
        text("k2 = Constant<value_float = 1.702>() t = Mul(x, k2) s = Sigmoid(t) y = Mul(s, x)"), {"Swish": 1}
    )
    assert next(iter(model.graph)).attributes["alpha"].as_float() == pytest.approx(1.702)


def test_gated_unit_is_counted_and_left_alone(check) -> None:
    head = "g (float[b, 8] x, float[b, 8] up) => (float[b, 8] y)"
    model, report = check(text("s = Sigmoid(x) w = Mul(x, s) y = Mul(w, up)", head), {"Swish": 1})
    assert [node.op_type for node in model.graph] == ["Swish", "Mul"] and report.swiglu == 1


def test_sigmoid_of_another_value_is_no_swish(check) -> None:
    head = "g (float[b, 8] x, float[b, 8] up) => (float[b, 8] y)"
    check(text("s = Sigmoid(x) y = Mul(up, s)", head), {})


def test_swish_whose_sigmoid_is_read_elsewhere(check) -> None:
    head = "g (float[b, 8] x) => (float[b, 8] y, float[b, 8] s)"
    _, report = check(text("s = Sigmoid(x) y = Mul(x, s)", head), {})
    assert ["'s' is used elsewhere" in item.reason for item in report.refused] == [True]
