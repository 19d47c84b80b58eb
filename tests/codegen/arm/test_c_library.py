"""Plain C libraries: the same numbers as the program, natively and for ARM, memory that suffices, errors as a status."""

import shutil

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from c_library import CLibrary

import qcompile
from qcompile.errors import UnsupportedOperatorError
from qcompile.targets import get_target, x86

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
needs_avx2 = pytest.mark.skipif(not x86.host_features() >= x86.AVX2.features, reason="needs AVX2")


def initializer(rng, name, *shape):
    return onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.2, name)


def model(nodes, inputs, outputs, weights=()):
    values = [
        [oh.make_tensor_value_info(n, t, s) for n, t, s in group] for group in (inputs, outputs)
    ]  # fmt: skip
    graph = oh.make_graph(nodes, "g", *values, initializer=list(weights))
    made = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def network():
    """Two linear operators, a branch, and three outputs, one of which is an input and one a view."""
    rng = np.random.default_rng(0)
    nodes = [
        oh.make_node("MatMul", ["x", "w1"], ["h"]),
        oh.make_node("Relu", ["h"], ["r"]),
        oh.make_node("MatMul", ["r", "w2"], ["g"]),
        oh.make_node("Softmax", ["g"], ["float"], axis=-1),
        oh.make_node("Transpose", ["g"], ["side-ways"], perm=[1, 0, 2]),
        oh.make_node("Identity", ["flag"], ["flag.out"]),
    ]
    f = onnx.TensorProto.FLOAT
    return model(
        nodes,
        [("x", f, ["batch", "n", 33]), ("flag", onnx.TensorProto.INT64, ["batch"])],
        [
            ("float", f, ["batch", "n", 10]),
            ("side-ways", f, ["n", "batch", 10]),
            ("flag.out", onnx.TensorProto.INT64, ["batch"]),
        ],
        [initializer(rng, "w1", 33, 50), initializer(rng, "w2", 50, 10)],
    )


def compiled(source, target, folder, name="net", **changes):
    return qcompile.compile(
        source,
        target=target,
        **changes,
        recipe="w8a8-rtn",
        output=folder,
        emit=["c"],
        options={"name": name},
        progress=False,
    )


@needs_cc
@needs_avx2
def test_the_library_computes_what_the_program_does(tmp_path):
    artifact = compiled(network(), "x86-64-v3", tmp_path / "out")
    library = CLibrary(tmp_path / "out", "net", tmp_path)
    rng = np.random.default_rng(1)
    for batch, n in ((1, 1), (3, 7), (2, 64), (0, 5)):
        x, flag = rng.normal(size=(batch, n, 33)).astype(np.float32), rng.integers(0, 9, batch)
        for got, expected in zip(library.run(x, flag), artifact(x, flag), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_the_library_for_arm_computes_the_same(tmp_path, emulation):
    compiled(network(), "cortex-a53", tmp_path / "out")
    library = CLibrary(tmp_path / "out", "net", tmp_path, get_target("cortex-a53"))
    rng = np.random.default_rng(1)
    x, flag = rng.normal(size=(2, 5, 33)).astype(np.float32), np.array([4, 5])
    from qcompile import ort

    session = ort.session(tmp_path / "out" / "model.onnx")
    expected = list(ort.run(session, {"x": x, "flag": flag}).values())
    for got, want in zip(library.run(x, flag), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    ("weight", "cpu", "kernel"),
    [
        ("int2/g32", "cortex-a72", "arm-tbl"),
        ("bitplane2/g32", "cortex-a76", "arm-tbl"),
        ("mxfp4", "neoverse-n1", "arm-table8"),
        ("nf4/g32", "cortex-a72", "arm-table16-neon"),
    ],
)
def test_weights_that_are_looked_up(weight, cpu, kernel, tmp_path, emulation):
    """From a float model to a program for ARM that agrees with its model.onnx."""
    from qcompile import ort

    f, rng = onnx.TensorProto.FLOAT, np.random.default_rng(0)
    nodes = [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Relu", ["h"], ["y"])]
    source = model(nodes, [("x", f, ["n", 70])], [("y", f, ["n", 128])], [initializer(rng, "w", 70, 128)])
    made = compiled(source, get_target(cpu, cores=1), tmp_path / "out", weight=weight)
    assert made.report.kernels[kernel] == 1
    library = CLibrary(tmp_path / "out", "net", tmp_path, get_target(cpu))
    x = np.random.default_rng(1).normal(size=(3, 70)).astype(np.float32)
    expected = ort.run(ort.session(tmp_path / "out" / "model.onnx"), {"x": x})["y"]
    np.testing.assert_allclose(library.run(x)[0], expected, atol=3e-6 * np.abs(expected).max())


EXPERTS = """
<ir_version: 10, opset_import: ["" : 21]>
experts (float[batch, 12] x, int64[batch, 2] picked) => (float[pairs, 9] y) {
    rest = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    each = Constant <value_ints = [1, 2, 1]> ()
    wide = Constant <value_ints = [-1, 12]> ()
    ids = Reshape (picked, rest)
    middle = Unsqueeze (x, one)
    spread = Expand (middle, each)
    repeated = Reshape (spread, wide)
    row = Unsqueeze (repeated, one)
    w = Gather <axis=0> (stack, ids)
    product = MatMul (row, w)
    y = Squeeze (product, one)
}
"""


@pytest.mark.parametrize(
    ("weight", "cpu", "kernel"), [("int4/g4", "cortex-a53", "arm-smlal"), ("nf4", "cortex-a76", "arm-table16")]
)
def test_experts(weight, cpu, kernel, tmp_path, emulation):
    """Products with matrices that are picked at run time."""
    from qcompile import ort

    source = onnx.parser.parse_model(EXPERTS)
    source.graph.initializer.append(initializer(np.random.default_rng(0), "stack", 4, 12, 9))
    made = compiled(source, get_target(cpu, cores=1), tmp_path / "out", weight=weight)
    assert [(layer.kind, layer.kernel) for layer in made.report.layers] == [("experts", kernel)]
    library = CLibrary(tmp_path / "out", "net", tmp_path, get_target(cpu))
    rng = np.random.default_rng(1)
    x, picked = rng.normal(size=(7, 12)).astype(np.float32), rng.integers(0, 4, (7, 2))
    expected = ort.run(ort.session(tmp_path / "out" / "model.onnx"), {"x": x, "picked": picked})["y"]
    np.testing.assert_allclose(library.run(x, picked)[0], expected, atol=3e-6 * np.abs(expected).max())


@needs_cc
@needs_avx2
def test_a_refused_input_is_a_status_with_a_message(tmp_path):
    nodes = [oh.make_node("Gather", ["table", "ids"], ["y"])]
    rng = np.random.default_rng(0)
    i64 = onnx.TensorProto.INT64
    source = model(
        nodes, [("ids", i64, ["n"])], [("y", onnx.TensorProto.FLOAT, ["n", 8])], [initializer(rng, "table", 5, 8)]
    )
    artifact = compiled(source, "x86-64-v3", tmp_path / "out")
    library = CLibrary(tmp_path / "out", "net", tmp_path)
    ids = np.array([4, 0, -5])
    np.testing.assert_array_equal(library.run(ids)[0], artifact(ids))
    with pytest.raises(ValueError, match="out"):
        library.run(np.array([5]))


def test_sizes_that_depend_on_values_are_refused_by_name(tmp_path):
    nodes = [oh.make_node("NonZero", ["x"], ["y"])]
    source = model(nodes, [("x", onnx.TensorProto.FLOAT, ["n"])], [("y", onnx.TensorProto.INT64, [1, "m"])])
    with pytest.raises(UnsupportedOperatorError, match="C library"):
        compiled(source, "x86-64-v3", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_c_identifier_are_refused(tmp_path):
    with pytest.raises(UnsupportedOperatorError, match="identifier"):
        compiled(network(), "x86-64-v3", tmp_path / "out", name="my-net")
