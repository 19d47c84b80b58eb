"""Conversion as a whole: constants, parameters, functions, control flow, refusals, the converter registry."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from qcompile.codegen.relax import converter, registry, to_relax
from qcompile.codegen.relax.ops._kernels import elementwise
from qcompile.codegen.relax.testing import Compiled, check, parse
from qcompile.errors import ModelError, UnsupportedOperatorError
from qcompile.targets.target import Target

RNG = np.random.default_rng(1)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_with(weight: np.ndarray, body: str) -> onnx.ModelProto:
    model = parse(body)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


MATMUL = "g (float[n, 40] x) => (float[n, m] y) { y = MatMul(x, w) }"


def test_large_initializers_become_parameters_small_ones_constants() -> None:
    weight = f32(40, 30)
    large = Compiled(model_with(weight, MATMUL))
    assert list(large.program.params) == ["w"]
    assert large.program.params["w"].shape == (40, 30)
    small = Compiled(model_with(weight, MATMUL), params_threshold=10_000)
    assert not small.program.params
    x = f32(3, 40)
    np.testing.assert_allclose(large(x)[0], x @ weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small(x)[0], x @ weight, rtol=1e-4, atol=1e-5)


def test_a_parameter_is_the_models_own_array() -> None:
    """Nothing is copied, so that weights mapped from a file stay in the file."""
    weight = f32(40, 30)
    model = ir.from_proto(model_with(weight, MATMUL))
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    assert np.shares_memory(to_relax(model).params["w"], weight)


def test_parameters_nobody_reads_are_dropped() -> None:
    program = Compiled(
        model_with(f32(40, 30), "g (float[n, 40] x) => (float[n, 40] y) { u = MatMul(x, w) y = Exp(x) }")
    ).program
    assert not program.params


def test_constant_subgraphs_are_folded() -> None:
    model = Compiled(
        parse(
            """g (float[2] x) => (float[2] y) {
              a = Constant<value_floats=[1.0, 4.0]>()
              b = Sqrt(a)
              c = Neg(b)
              y = Add(x, c)
            }"""
        )
    )
    assert sum(not isinstance(f, type(model.program.mod["main"])) for f in model.program.mod.functions.values()) == 1
    model.check(f32(2))


def test_quantized_weights_are_not_folded_to_floats() -> None:
    model = parse("g (float[n, 64] x) => (float[n, m] y) { d = DequantizeLinear<axis=1>(w, s) y = MatMul(x, d) }")
    codes = RNG.integers(-128, 128, (64, 32)).astype(np.int8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(codes, "w"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.abs(f32(32)), "s"))
    compiled = Compiled(model)
    assert compiled.program.params["w"].dtype == np.int8
    compiled.check(f32(3, 64))


def test_local_functions_are_expanded_with_attributes_and_absent_inputs() -> None:
    function = oh.make_function(
        "local",
        "Scale",
        ["x", "low"],
        ["y"],
        [
            oh.make_node("Clip", ["x", "low"], ["c"]),
            oh.make_node("LeakyRelu", ["c"], ["y"], name="leak"),
        ],
        [oh.make_opsetid("", 23)],
        ["alpha"],
    )
    reference = function.node[1].attribute.add()
    reference.name, reference.ref_attr_name, reference.type = "alpha", "alpha", onnx.AttributeProto.FLOAT
    graph = oh.make_graph(
        [oh.make_node("Scale", ["x", ""], ["y"], domain="local", alpha=0.3)],
        "g",
        [oh.make_tensor_value_info("x", 1, ["n"])],
        [oh.make_tensor_value_info("y", 1, ["n"])],
    )
    model = oh.make_model(
        graph, opset_imports=[oh.make_opsetid("", 23), oh.make_opsetid("local", 1)], functions=[function]
    )
    x = f32(9)
    np.testing.assert_allclose(Compiled(model)(x)[0], np.where(x < 0, 0.3 * x, x), rtol=1e-6)


@pytest.mark.parametrize("condition", [True, False])
def test_both_branches_of_a_condition_known_at_run_time(condition: bool) -> None:
    check(
        """g (float[n, 4] x, bool c) => (float[m, 4] y) {
          q = Exp(x)
          z = If (c) <
            then_branch = t () => (float[p, 4] a) { a = Concat<axis=0>(q, q) },
            else_branch = e () => (float[n, 4] b) { b = Identity(x) }
          >
          y = Relu(z)
        }""",
        f32(3, 4),
        np.array(condition),
    )


def test_a_loop_of_known_length_is_unrolled() -> None:
    check(
        """g (float[n] x) => (float[n] y, float[3, n] all) {
          three = Constant<value_int=3>()
          go = Constant<value = bool {1}>()
          y, all = Loop (three, go, x) <
            body = b (int64 i, bool c, float[n] v) => (bool c2, float[n] w, float[n] s) {
              f = Cast<to=1>(i)
              w = Add(v, f)
              s = Mul(w, w)
              c2 = Identity(c)
            }
          >
        }""",
        f32(5),
    )


def test_scan_accumulates() -> None:
    check(
        """g (float[2] s, float[4, 2] x) => (float[2] f, float[4, 2] y) {
          f, y = Scan <num_scan_inputs=1, body = b (float[2] a, float[2] e) => (float[2] o, float[2] t) {
            o = Add(a, e)
            t = Neg(o)
          }> (s, x)
        }""",
        f32(2),
        f32(4, 2),
    )


def test_an_unknown_operator_is_refused_with_node_and_module() -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Identity(x) }"))
    node = model.graph[0]
    bad = ir.Node(
        "custom",
        "Nope",
        list(node.inputs),
        name="layer7",
        num_outputs=1,
        metadata_props={"pkg.torch.onnx.name_scopes": "['', 'model', 'model.layers.7.mlp', 'nope']"},
    )
    model.graph.insert_before(node, bad)
    node.replace_input_with(0, bad.outputs[0])
    with pytest.raises(UnsupportedOperatorError, match=r"custom::Nope \(node 'layer7', module model\.layers\.7\.mlp\)"):
        to_relax(model)


def test_text_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="'x' has type"):
        Compiled(parse("g (string[2] x) => (string[2] y) { y = Identity(x) }"))


def test_shapes_that_cannot_fit_are_a_model_error() -> None:
    with pytest.raises(ModelError, match="MatMul"):
        Compiled(parse("g (float[2, 3] x, float[4, 5] y) => (float[2, 5] z) { z = MatMul(x, y) }"))


def test_a_specialised_converter_goes_first_and_can_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CONVERTERS", {k: list(v) for k, v in registry._CONVERTERS.items()})

    @converter("", "Relu", kinds=("arm",), priority=1)
    def special(ctx, node, x):
        if ctx.rank(x) != 1:
            return NotImplemented
        return elementwise(ctx, lambda v: v * v, x, name="square")

    vector, matrix = (parse(f"g (float[{s}] x) => (float[{s}] y) {{ y = Relu(x) }}") for s in ("3", "1, 3"))
    arm, x86 = Target("arm", "cortex-a76"), Target("x86", "x86-64-v3")
    assert "square" in to_relax(ir.from_proto(vector), target=arm).mod.script()
    assert "square" not in to_relax(ir.from_proto(matrix), target=arm).mod.script()
    assert "square" not in to_relax(ir.from_proto(vector), target=x86).mod.script()
    assert "square" not in to_relax(ir.from_proto(vector)).mod.script()


def test_conversion_is_deterministic_and_leaves_the_model_alone() -> None:
    model = ir.from_proto(
        parse(
            "g (float[a, b] x, float[b, a] y) => (float[n] z) { m = MatMul(x, y) s = Constant<value_ints=[-1]>() z = Reshape(m, s) }"
        )
    )
    before = ir.to_proto(model).SerializeToString()
    first, second = to_relax(model).mod.script(), to_relax(model).mod.script()
    assert first == second
    assert ir.to_proto(model).SerializeToString() == before
