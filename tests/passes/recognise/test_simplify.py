"""Shape arithmetic disappears where shapes are known, and only there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.recognise import recognise

SPLIT = """g (float[b, s, 12] x) => (float[b, s, 3, 4] y) {
    b1 = Shape<start = 0, end = 1>(x) s1 = Shape<start = 1, end = 2>(x) n = Constant<value_ints = [-1, 4]>()
    target = Concat<axis = 0>(b1, s1, n) y = Reshape(x, target) }"""


def kinds(model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_reshape_by_computed_shape(check) -> None:
    model, _ = check(SPLIT, {})
    assert kinds(model) == ["Reshape"]
    shape = next(iter(model.graph)).inputs[1].const_value.numpy().tolist()
    assert shape == [0, 0, 3, 4]


def test_shape_by_gather_and_unsqueeze(check) -> None:
    text = """g (float[b, s, 12] x) => (float[b, s, 3, 4] y) {
        sh = Shape(x) zero = Constant<value_int = 0>() one = Constant<value_int = 1>() ax = Constant<value_ints = [0]>()
        b0 = Gather(sh, zero) s0 = Gather(sh, one) b1 = Unsqueeze(b0, ax) s1 = Unsqueeze(s0, ax)
        n = Constant<value_ints = [3]>() m = Constant<value_ints = [-1]>()
        target = Concat<axis = 0>(b1, s1, n, m) y = Reshape(x, target) }"""
    model, _ = check(text, {})
    assert kinds(model) == ["Reshape"]


def test_two_moved_dimensions_stay_computed(check) -> None:
    text = """g (float[b, s, 4] x) => (float[s, b, 4] y) {
        b1 = Shape<start = 0, end = 1>(x) s1 = Shape<start = 1, end = 2>(x) n = Constant<value_ints = [4]>()
        target = Concat<axis = 0>(s1, b1, n) y = Reshape(x, target) }"""
    model, _ = check(text, {})
    assert kinds(model)[-1] == "Reshape" and "Shape" in kinds(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_expand_with_the_guard_of_older_exporters(check, batch: int) -> None:
    text = """g (float[b, 2, 1, s, 4] x) => (float[b, 2, 3, s, 4] y) {
        b1 = Shape<start = 0, end = 1>(x) s1 = Shape<start = 3, end = 4>(x)
        two = Constant<value_ints = [2]>() three = Constant<value_ints = [3]>() four = Constant<value_ints = [4]>()
        want = Concat<axis = 0>(b1, two, three, s1, four)
        n = Shape(want) ones = ConstantOfShape<value = int64[1] {1}>(n) m = Constant<value_int = -1>() minus = Mul(ones, m)
        is = Equal(want, minus) target = Where(is, ones, want) y = Expand(x, target) }"""
    model, _ = check(text, {}, dims={"b": batch})
    assert kinds(model) == ["Expand"]


def test_expand_to_a_dynamic_size_stays_computed(check) -> None:
    text = """g (float[1, 4] x, float[s, 2] z) => (float[s, 4] y) {
        s1 = Shape<start = 0, end = 1>(z) four = Constant<value_ints = [4]>()
        target = Concat<axis = 0>(s1, four) y = Expand(x, target) }"""
    model, _ = check(text, {})
    assert kinds(model)[-1] == "Expand" and "Shape" in kinds(model)


def test_transposes_merge_and_cancel(check) -> None:
    text = """g (float[b, 2, s, 4] x) => (float[b, 4, 2, s] y, float[b, 2, s, 4] z) {
        a = Transpose<perm = [0, 2, 1, 3]>(x) y = Transpose<perm = [0, 3, 2, 1]>(a) c = Transpose<perm = [0, 2, 1, 3]>(a) z = Neg(c) }"""
    model, _ = check(text, {})
    assert sorted(kinds(model)) == ["Neg", "Transpose"]


def test_transpose_through_a_flattened_batch(check) -> None:
    text = """g (float[b, 2, s, 4] x) => (float[b, 2, 4, s] y) {
        sh = Shape<start = 2, end = 4>(x) m = Constant<value_ints = [-1]>() flat = Concat<axis = 0>(m, sh) f = Reshape(x, flat)
        t = Transpose<perm = [0, 2, 1]>(f) lead = Shape<start = 0, end = 2>(x) d = Shape<start = 3, end = 4>(x)
        s1 = Shape<start = 2, end = 3>(x) back = Concat<axis = 0>(lead, d, s1) y = Reshape(t, back) }"""
    model, _ = check(text, {})
    assert kinds(model) == ["Transpose"]


NO_OPS = {
    "identity": "y = Identity(r)",
    "dropout": "y = Dropout(r)",
    "cast": "y = Cast<to = 1>(r)",
    "times one": "o = Constant<value_float = 1.0>() y = Mul(o, r)",
    "over one": "o = Constant<value_float = 1.0>() y = Div(r, o)",
    "plus zero": "o = Constant<value_float = 0.0>() y = Add(r, o)",
    "slice of all": "a = Constant<value_ints = [0]>() e = Constant<value_ints = [9223372036854775807]>() x1 = Constant<value_ints = [1]>() y = Slice(r, a, e, x1)",
    "transpose of nothing": "y = Transpose<perm = [0, 1]>(r)",
    "concat of one": "y = Concat<axis = 0>(r)",
    "reshape to itself": "n = Constant<value_ints = [-1, 6]>() y = Reshape(r, n)",
    "reshape to itself but for one": "b1 = Shape<start = 0, end = 1>(r) m = Constant<value_ints = [-1]>() n = Concat<axis = 0>(b1, m) y = Reshape(r, n)",
    "expand to itself": "n = Constant<value_ints = [1, 6]>() y = Expand(r, n)",
}


@pytest.mark.parametrize("body", NO_OPS.values(), ids=NO_OPS.keys())
def test_no_ops_go(check, body: str) -> None:
    model, _ = check(f"g (float[b, 6] x) => (float[b, 6] y) {{ r = Relu(x) {body} }}", {})
    assert kinds(model) == ["Relu"] and model.graph.outputs[0].name == "y"


NOT_NO_OPS = {
    "one over": "o = Constant<value_float = 1.0>() y = Div(o, r)",
    "zero minus": "o = Constant<value_float = 0.0>() y = Sub(o, r)",
    "cast away and back": "i = Cast<to = 6>(r) y = Cast<to = 1>(i)",
    "part": "a = Constant<value_ints = [0]>() e = Constant<value_ints = [5]>() x1 = Constant<value_ints = [1]>() p = Slice(r, a, e, x1) q = Concat<axis = 1>(p, l)",
}


@pytest.mark.parametrize("name", ["one over", "zero minus", "cast away and back"])
def test_what_only_looks_like_nothing_stays(check, name: str) -> None:
    model, _ = check(f"g (float[b, 6] x) => (float[b, 6] y) {{ r = Exp(x) {NOT_NO_OPS[name]} }}", {})
    assert len(model.graph) > 1


def test_adding_a_constant_that_widens_the_shape_stays(check) -> None:
    model, _ = check(
        "g (float[6] x) => (float[1, 6] y) { r = Relu(x) y = Add(r, z) }", {}, z=np.zeros((1, 1), np.float32)
    )
    assert kinds(model) == ["Relu", "Add"]


def test_input_passed_through_keeps_both_names(make, execute) -> None:
    model, _ = recognise(
        make("g (float[b, 6] x) => (float[b, 6] y, float[b, 6] z) { y = Identity(x) r = Relu(x) z = Identity(r) }")
    )
    assert [v.name for v in model.graph.inputs] == ["x"] and [v.name for v in model.graph.outputs] == ["y", "z"]
    x = np.array([[-1, 1, 2, 3, 4, 5]], np.float32)
    y, z = execute(model, {"x": x})
    assert (y == x).all() and (z == np.maximum(x, 0)).all()


def test_the_given_model_is_not_changed(make) -> None:
    model = make(SPLIT)
    before = kinds(model)
    recognise(model)
    assert kinds(model) == before


def test_recognising_twice_changes_nothing(make) -> None:
    first, _ = recognise(make(SPLIT))
    second, report = recognise(first)
    assert kinds(first) == kinds(second) and not report.found


def test_lookup_with_one_index_for_all(check, random_weights) -> None:
    text = """g (int64[b, s] ids) => (float[b, s, 6] y) {
        n = Shape(ids) types = ConstantOfShape<value = int64[1] {1}>(n)
        e = Gather(words, ids) t = Gather(kinds, types) y = Add(e, t) }"""
    model, _ = check(text, {}, words=random_weights(5, 6), kinds=random_weights(2, 6))
    assert kinds(model) == ["Gather", "Add"]


def test_rows_by_constant_indices(check) -> None:
    text = """g (float[4, b] x) => (float[2, b] y, float[2, b] z) {
        i = Constant<value = int64[2, 1] {-2, -1}>() y = GatherND(x, i)
        j = Constant<value = int64[2, 1] {2, 0}>() z = GatherND(x, j) }"""
    model, _ = check(text, {})
    assert sorted(kinds(model)) == ["GatherND", "Slice"]


def test_large_weights_are_not_read() -> None:
    """Recognition of a model larger than memory: matrices stay where they are unless a rewrite changes them."""

    def read() -> ir.Tensor:
        raise AssertionError("a weight was read")

    def lazy(name: str, *shape: int) -> ir.Value:
        tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)

    ids = ir.Value(name="ids", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64))
    table, matrix, scale = lazy("table", 4000, 512), lazy("matrix", 512, 3000), lazy("scale", 2, 3000)
    x = ir.node("Gather", [table, ids])
    y = ir.node("MatMul", [x.outputs[0], matrix])
    z = ir.node("Mul", [y.outputs[0], y.outputs[0]])
    sums = ir.node("Add", [z.outputs[0], ir.node("Relu", [z.outputs[0]]).outputs[0]])
    sums.outputs[0].name = "y"
    sums.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    relu = sums.inputs[1].producer()
    graph = ir.Graph(
        [ids],
        [sums.outputs[0]],
        nodes=[x, y, z, relu, sums],
        initializers=[table, matrix, scale],
        opset_imports={"": 18},
    )
    result, report = recognise(ir.Model(graph, ir_version=9))
    assert report.linears == 1 and [n.op_type for n in result.graph] == ["Gather", "MatMul", "Mul", "Relu", "Add"]


def test_what_the_constant_folder_cannot_evaluate_is_reported(make, execute) -> None:
    text = """g (float[6] x) => (float[2] y) {
        n = Constant<value_int = 2>() parts = SplitToSequence(x, n) i = Constant<value_int = 1>() y = SequenceAt(parts, i) }"""
    model = make(text)
    result, _ = recognise(model)
    x = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(execute(result, {"x": x})[0], [2, 3])


def test_flattened_size_split_again(check) -> None:
    text = """g (float[b, s] x) => (int64[s] y) {
        b1 = Shape<start = 0, end = 1>(x) s1 = Shape<start = 1, end = 2>(x) all = Mul(b1, s1) back = Div(all, b1)
        ax = Constant<value_ints = [0]>() n = Squeeze(back, ax) zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
        y = Range(zero, n, one) }"""
    model, _ = check(text, {})
    assert "Div" not in kinds(model) and "Mul" not in kinds(model)


def test_dimension_names_that_are_no_expressions_are_made_readable() -> None:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 18]> {SPLIT}')
    model.graph.inputs[0].shape = ir.Shape(["batch size", "N:0", 12])
    model.graph.outputs[0].shape = ir.Shape(["batch size", "N:0", 3, 4])
    result, _ = recognise(model)
    assert kinds(result) == ["Reshape"]
    first, second, _ = result.graph.inputs[0].shape
    assert (str(first), str(second)) == ("batch_size", "N_0")
    assert result.graph.outputs[0].shape[:2] == (first, second)


def test_a_loop_without_a_condition_starts(check) -> None:
    text = """g (float[b, 4] x) => (float[b, 4] y) {
        three = Constant<value_int = 3>()
        y = Loop (three, , x) <body = step (int64 i, bool on, float[b, 4] a) => (bool go, float[b, 4] o) {
            go = Identity(on)  o = Tanh(a) }> }"""
    check(text, {})
