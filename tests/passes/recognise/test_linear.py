"""Every linear operator ends as MatMul(x, w (K, N)) and Add; batch norms end in their convolution."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes.recognise import recognise
from qcompile.passes.recognise.einsum import as_product

HEAD = "g (float[b, 6] x) => (float[b, 4] y)"


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.25), (1.0, 0.0)])
def test_gemm(check, random_weights, transposed: int, alpha: float, beta: float) -> None:
    w = random_weights(4, 6) if transposed else random_weights(6, 4)
    text = f"{HEAD} {{ y = Gemm<transB = {transposed}, alpha = {alpha}, beta = {beta}>(x, w, c) }}"
    model, report = check(text, {}, w=w, c=random_weights(4))
    assert kinds(model) == (["MatMul", "Add"] if beta else ["MatMul"]) and report.linears == 1
    weight = next(iter(model.graph)).inputs[1]
    assert weight.const_value.shape == (6, 4)
    np.testing.assert_allclose(weight.const_value.numpy(), alpha * (w.T if transposed else w), rtol=1e-6)


def test_gemm_with_transposed_input(check, random_weights) -> None:
    model, _ = check("g (float[6, b] x) => (float[b, 4] y) { y = Gemm<transA = 1>(x, w) }", {}, w=random_weights(6, 4))
    assert kinds(model) == ["Transpose", "MatMul"]


def test_gemm_of_two_inputs(check) -> None:
    text = "g (float[b, 6] x, float[4, 6] w) => (float[b, 4] y) { y = Gemm<transB = 1, alpha = 0.5>(x, w) }"
    model, report = check(text, {})
    assert kinds(model) == ["Transpose", "MatMul", "Mul"] and report.linears == 0


def test_transposed_weight_keeps_its_name(check, random_weights) -> None:
    text = f"{HEAD} {{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }}"
    model, _ = check(text, {}, w=random_weights(4, 6))
    assert kinds(model) == ["MatMul"] and list(model.graph.initializers) == ["w"]
    assert model.graph.initializers["w"].const_value.shape == (6, 4)


def test_tied_weight_is_transposed_once_and_the_tie_is_noted(check, random_weights) -> None:
    text = """g (int64[b, s] ids, float[b, s, 6] x) => (float[b, s, 8] y, float[b, s, 8] z, float[b, s, 6] e) {
        t = Transpose<perm = [1, 0]>(table) y = MatMul(x, t)
        u = Transpose<perm = [1, 0]>(table) e = Gather(table, ids) z = MatMul(e, u) }"""
    model, report = check(text, {}, table=random_weights(8, 6))
    assert report.linears == 2 and len(model.graph.initializers) == 2
    (copy,) = (v for v in model.graph.initializers.values() if v.name != "table")
    assert copy.metadata_props["qcompile.transpose_of"] == "table"
    assert np.shares_memory(copy.const_value.numpy(), model.graph.initializers["table"].const_value.numpy())


def test_flattening_around_a_linear_operator_goes(check, random_weights) -> None:
    text = """g (float[b, s, 6] x) => (float[b, s, 4] y) {
        flat = Constant<value_ints = [-1, 6]>() f = Reshape(x, flat) m = Gemm(f, w, c)
        shape = Shape<start = 0, end = 2>(x) n = Constant<value_ints = [4]>() target = Concat<axis = 0>(shape, n)
        y = Reshape(m, target) }"""
    model, _ = check(text, {}, w=random_weights(6, 4), c=random_weights(4))
    assert kinds(model) == ["MatMul", "Add"]


def test_flattening_to_another_shape_stays(check, random_weights) -> None:
    text = """g (float[b, 3, 6] x) => (float[b, 12] y) {
        flat = Constant<value_ints = [-1, 6]>() f = Reshape(x, flat) m = MatMul(f, w)
        target = Constant<value_ints = [-1, 12]>() y = Reshape(m, target) }"""
    model, _ = check(text, {}, w=random_weights(6, 4))
    assert kinds(model) == ["Reshape", "MatMul", "Reshape"]


def test_bias_goes_second(check, random_weights) -> None:
    model, _ = check(f"{HEAD} {{ m = MatMul(x, w) y = Add(c, m) }}", {}, w=random_weights(6, 4), c=random_weights(4))
    assert list(model.graph)[1].inputs[0].producer().op_type == "MatMul"


CONV = "g (float[b, 3, 6, 5] x) => (float[b, 4, 6, 5] y)"


def norm_weights(random_weights, channels: int) -> dict[str, np.ndarray]:
    return {
        "gain": random_weights(channels, seed=5),
        "beta": random_weights(channels, seed=6),
        "mean": random_weights(channels, seed=7),
        "var": np.abs(random_weights(channels, seed=8)) + 0.1,
    }


@pytest.mark.parametrize("bias", ["", ", c"])
def test_batch_norm_folds_into_conv(check, random_weights, bias: str) -> None:
    text = f"{CONV} {{ h = Conv<pads = [1, 1, 1, 1]>(x, w{bias}) y = BatchNormalization<epsilon = 0.01>(h, gain, beta, mean, var) }}"
    arrays = {"w": random_weights(4, 3, 3, 3), **({"c": random_weights(4)} if bias else {})}
    model, report = check(text, {}, **arrays, **norm_weights(random_weights, 4))
    assert kinds(model) == ["Conv"] and report.raised()["BatchNorm folded"] == 1
    assert model.graph.initializers["w"].const_value.shape == (4, 3, 3, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_folds_into_transposed_conv(check, random_weights, groups: int) -> None:
    text = f"""g (float[b, 4, 5, 5] x) => (float[b, 6, 7, 7] y) {{
        h = ConvTranspose<group = {groups}>(x, w) y = BatchNormalization(h, gain, beta, mean, var) }}"""
    model, _ = check(text, {}, w=random_weights(4, 6 // groups, 3, 3), **norm_weights(random_weights, 6))
    assert kinds(model) == ["ConvTranspose"]


def test_depthwise_conv_and_batch_norm(check, random_weights) -> None:
    text = """g (float[b, 4, 6, 5] x) => (float[b, 4, 6, 5] y) {
        h = Conv<group = 4, pads = [1, 1, 1, 1]>(x, w) y = BatchNormalization(h, gain, beta, mean, var) }"""
    model, _ = check(text, {}, w=random_weights(4, 1, 3, 3), **norm_weights(random_weights, 4))
    assert kinds(model) == ["Conv"]


def test_batch_norm_after_a_shared_conv_stays(check, random_weights) -> None:
    text = """g (float[b, 3, 6, 5] x) => (float[b, 4, 6, 5] y, float[b, 4, 6, 5] h) {
        h = Conv<pads = [1, 1, 1, 1]>(x, w) y = BatchNormalization(h, gain, beta, mean, var) }"""
    model, report = check(text, {}, w=random_weights(4, 3, 3, 3), **norm_weights(random_weights, 4))
    assert kinds(model) == ["Conv", "BatchNormalization"]
    assert ["'h' is used elsewhere" in item.reason for item in report.refused] == [True]


def test_shared_kernel_is_not_scaled_for_others(check, random_weights) -> None:
    text = """g (float[b, 3, 6, 5] x) => (float[b, 4, 6, 5] y, float[b, 4, 6, 5] z) {
        h = Conv<pads = [1, 1, 1, 1]>(x, w) y = BatchNormalization(h, gain, beta, mean, var)
        z = Conv<pads = [1, 1, 1, 1]>(x, w) }"""
    check(text.replace("z = Conv", "n = Neg(x) z = Conv").replace("(x, w) }", "(n, w) }"), {},
          w=random_weights(4, 3, 3, 3), **norm_weights(random_weights, 4))  # fmt: skip


def test_batch_norm_alone_stays(check, random_weights) -> None:
    text = "g (float[b, 4, 6] x) => (float[b, 4, 6] y) { y = BatchNormalization(x, gain, beta, mean, var) }"
    model, _ = check(text, {}, **norm_weights(random_weights, 4))
    assert kinds(model) == ["BatchNormalization"]


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_linear(check, random_weights, bias: bool) -> None:
    linear = "m = MatMul(x, w) h = Add(m, c)" if bias else "h = MatMul(x, w)"
    arrays = {"w": random_weights(6, 4), **({"c": random_weights(4)} if bias else {})}
    text = f"{HEAD} {{ {linear} y = BatchNormalization(h, gain, beta, mean, var) }}"
    model, _ = check(text, {}, **arrays, **norm_weights(random_weights, 4))
    assert kinds(model) == ["MatMul", "Add"]


def test_batch_norm_over_positions_does_not_fold_into_linear(check, random_weights) -> None:
    """On (batch, positions, channels) the operator normalises axis 1, which is not the output of the linear operator."""
    text = """g (float[b, 4, 6] x) => (float[b, 4, 4] y) { h = MatMul(x, w) y = BatchNormalization(h, gain, beta, mean, var) }"""
    model, _ = check(text, {}, w=random_weights(6, 4), **norm_weights(random_weights, 4))
    assert kinds(model) == ["MatMul", "BatchNormalization"]


def test_weights_stored_twice_are_tied(check, random_weights) -> None:
    text = """g (int64[b, s] ids, float[b, s, 12] x) => (float[b, s, 12] e, float[b, s, 12] y, float[b, s, 12] z) {
        e = Gather(table, ids) y = MatMul(x, copy) z = MatMul(y, other) }"""
    table = random_weights(12, 12)
    other = table.copy()
    other[5, 5] += 1  # as the copy but for one element in the middle
    model, report = check(text, {}, table=table, copy=table.copy(), other=other)
    assert report.raised()["merged weights"] == 1 and set(model.graph.initializers) == {"table", "other"}


EINSUMS = [
    ("bsk,kn->bsn", (2, 3, 4), (4, 5), ["MatMul"]),
    ("bsk,nk->bsn", (2, 3, 4), (5, 4), ["MatMul"]),
    ("bk,nk->nb", (2, 4), (5, 4), ["MatMul", "Transpose"]),
]


@pytest.mark.parametrize(("equation", "left", "right", "expected"), EINSUMS)
def test_einsum_with_a_weight(check, random_weights, equation: str, left, right, expected: list[str]) -> None:
    out = [
        dict(zip(",".join(equation.split("->")[0].split(",")).replace(",", ""), left + right))[c]
        for c in equation.split("->")[1]
    ]
    text = f'g (float{list(left)} x) => (float{out} y) {{ y = Einsum<equation = "{equation}">(x, w) }}'
    model, report = check(text, {}, w=random_weights(*right))
    assert kinds(model) == expected and report.linears == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_einsum_as_matrix_product_in_any_order(data) -> None:
    """Whatever `as_product` accepts is what numpy's einsum computes, and all single-label products are accepted."""
    batch = data.draw(st.sampled_from(["", "b", "bh"]))
    a = "".join(data.draw(st.permutations(batch + "mc")))
    b = "".join(data.draw(st.permutations(batch + "cn")))
    y = "".join(data.draw(st.permutations(batch + "mn")))
    form = as_product(f"{a},{b}->{y}")
    assert form is not None
    sizes = dict(zip("bhmcn", (2, 3, 4, 5, 6)))
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal([sizes[c] for c in labels]) for labels in (a, b))
    got = (left.transpose(form.left) @ right.transpose(form.right)).transpose(form.result)
    np.testing.assert_allclose(got, np.einsum(f"{a},{b}->{y}", left, right))


@pytest.mark.parametrize(
    "equation",
    ["ij,jk", "ii,ij->j", "bsk,kn->bs", "ij,ij->ij", "ij,kl->ijkl", "...k,kn->...n", "ij,jk,kl->il", "bmc,bcn->mn"],
)
def test_other_einsums_are_no_matrix_products(equation: str) -> None:
    assert as_product(equation) is None


@settings(deadline=None, max_examples=25)
@given(
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    batch=st.integers(1, 3),
    transposed=st.booleans(),
    alpha=st.floats(-2, 2).map(lambda v: round(v, 3)),
)
def test_gemm_of_any_shape(k: int, n: int, batch: int, transposed: bool, alpha: float) -> None:
    import onnxruntime

    rng = np.random.default_rng(k * 100 + n)
    w = rng.standard_normal((n, k) if transposed else (k, n)).astype(np.float32)
    x = rng.standard_normal((batch, k)).astype(np.float32)
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[b, {k}] x) => (float[b, {n}] y) '
    text += f"{{ y = Gemm<transB = {int(transposed)}, alpha = {alpha:f}>(x, w) }}"
    model, _ = recognise(ir.from_onnx_text(text, initializers=[ir.tensor(w, name="w")]))
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    expected = alpha * (x @ (w.T if transposed else w))
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)
