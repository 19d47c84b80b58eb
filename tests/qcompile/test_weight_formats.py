"""Every weight format from a float model to program and `model.onnx`, which compute with the same bytes."""

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")

import qcompile
from qcompile import ort
from qcompile.errors import TargetError
from qcompile.recipes import Override, Recipe

K, N = 53, 37
FORMATS = {
    "ternary/g16": 0.5, "fixed<8>": 0.03, "fixed<5>": 0.12, "dual4/g16": 0.12, "nf4/g16": 0.11, "nf3": 0.3, "mxfp4": 0.14,
    "nvfp4": 0.12, "codebook4/g20": 0.1, "pow2sum1/g32": 0.24, "bitplane2/g20": 0.35, "bitplane3": 0.25,
    "q3_k": 0.2, "q4_k": 0.09, "mxfp6": 0.07, "mxfp8": 0.04, "e4m3/g20": 0.04, "e5m2": 0.07, "e2m3/g16": 0.03,
    "nf5/g16": 0.06, "nf8": 0.02, "pow2sum2/g32": 0.06, "e3m2": 0.07, "nf6/g20": 0.03,
}  # fmt: skip
"""Formats, and the largest relative error that rounding normal weights to them may make."""

FLOAT = ("nf3", "fixed<5>", "nf6/g20", "e3m2")
"""Those of them that multiply float activations."""


def model(text, **shapes):
    """The graph of ``text`` with normal weights."""
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return made


def results(compiled, source, folder, width):
    """What the program, ``model.onnx`` and the float model make of the same rows, by output."""
    feed = {"x": np.random.default_rng(1).normal(size=(7, width)).astype(np.float32)}
    onnx.save(source, folder / "float.onnx")
    program, emitted = compiled.run(feed), ort.run(ort.session(compiled.onnx_path, settings={}), feed)
    exact = ort.run(ort.session(folder / "float.onnx"), feed)
    return [(name, program[name], emitted[name], exact[name]) for name in exact]


def test_program_and_onnx_agree_and_are_near_the_float_model(tmp_path):
    """One product per format, all of them in one model."""
    nodes, outputs, shapes = [], [], {}
    for i in range(len(FORMATS)):
        nodes.append(f"[product{i}] y{i} = MatMul (x, w{i})")
        outputs.append(f"float[m, {N}] y{i}")
        shapes[f"w{i}"] = (K, N)
    text = f"net (float[m, {K}] x) => ({', '.join(outputs)}) {{ {chr(10).join(nodes)} }}"
    source = model(text, **shapes)
    overrides = tuple(
        Override(f"product{i}", weight=spelling, activation="none" if spelling in FLOAT else None)
        for i, spelling in enumerate(FORMATS)
    )
    recipe = Recipe("mixed", solver="mse", overrides=overrides)
    compiled = qcompile.compile(source, recipe=recipe, output=tmp_path / "out", progress=False)
    layers = {layer.weight_format: layer for layer in compiled.report.layers}
    assert set(layers) == set(FORMATS)
    for spelling, (_, got, emitted, exact) in zip(FORMATS, results(compiled, source, tmp_path, K)):
        np.testing.assert_allclose(got, emitted, rtol=0, atol=1e-5 * np.abs(emitted).max(), err_msg=spelling)
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert FORMATS[spelling] / 3 < error < FORMATS[spelling], f"{spelling}: {error}"
        assert layers[spelling].kernel.startswith("x86-") and layers[spelling].kernel_reason


@pytest.mark.parametrize("spelling", ["nvfp4", "codebook4/g16", "bitplane2/g16"])
def test_products_of_one_activation_are_merged_where_their_parameters_allow(spelling, tmp_path):
    """Scales of columns lie side by side; two learned tables cannot share a register."""
    text = f"""net (float[m, {K}] x) => (float[m, {K}] y)
    {{
        g = MatMul (x, wg)
        s = Sigmoid (g)
        a = Mul (g, s)
        u = MatMul (x, wu)
        h = Mul (a, u)
        d = MatMul (h, wd)
        y = Add (d, b)
    }}"""
    source = model(text, wg=(K, N), wu=(K, N), wd=(N, K), b=(K,))
    recipe = Recipe("rtn", weight=spelling)
    compiled = qcompile.compile(source, recipe=recipe, output=tmp_path / "out", progress=False)
    ((_, got, emitted, _),) = results(compiled, source, tmp_path, K)
    # A value at the edge of a step of the activation quantizer may fall to either side.
    assert np.linalg.norm(got - emitted) < 5e-3 * np.linalg.norm(emitted)
    kernels = sum(count for name, count in compiled.report.kernels.items() if name.startswith("x86-"))
    assert kernels == (3 if spelling.startswith("codebook") else 2)


def test_a_convolution_takes_tables_and_planes(tmp_path):
    text = """net (float[1, 5, 9, 9] x) => (float[1, 13, 7, 7] y, float[1, 5, 7, 7] z)
    {
        [table] y = Conv (x, w)
        [planes] z = Conv <group = 5> (x, d)
    }"""
    source = model(text, w=(13, 5, 3, 3), d=(5, 1, 3, 3))
    overrides = (Override("table", weight="nf4"), Override("planes", weight="bitplane3"))
    recipe = Recipe("mixed", solver="mse", overrides=overrides)
    compiled = qcompile.compile(source, recipe=recipe, output=tmp_path / "out", progress=False)
    feed = {"x": np.random.default_rng(1).normal(size=(1, 5, 9, 9)).astype(np.float32)}
    program, emitted = compiled.run(feed), ort.run(ort.session(compiled.onnx_path, settings={}), feed)
    for name in "yz":
        np.testing.assert_allclose(program[name], emitted[name], rtol=0, atol=1e-5 * np.abs(emitted[name]).max())


def test_a_format_without_a_kernel_is_refused_with_the_reasons(tmp_path):
    """A group whose sums exceed the accumulators of all families."""
    k = 1 << 17
    source = model(f"net (float[m, {k}] x) => (float[m, 1] y) {{ y = MatMul (x, w) }}", w=(k, 1))
    with pytest.raises(TargetError, match=r"no kernel on .* multiplies int8 weights .*overflow"):
        qcompile.compile(source, recipe=Recipe("rtn", weight="int8"), output=tmp_path / "out", progress=False)
