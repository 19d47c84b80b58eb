"""Weights that are codes already: channels trade places, scales per channel take factors, and the codes stay integers."""

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import oracle
import pytest

from qcompile.passes.execute import run
from qcompile.passes.spaces import Element, analyse, fold, prove
from qcompile.passes.spaces.prove import random_inputs

N, K = 4, 8
"""Channels of the input and of the output; hidden channels."""
RNG = np.random.default_rng(0)


def model_of(body, dtype=ir.DataType.INT8, **more):
    """``body`` with codes ``q (N, K)`` and ``p (K, N)``, steps and zero points per channel, and a float matrix ``v (K, N)``."""
    floats = {
        "v": RNG.standard_normal((K, N)),
        "sq": RNG.uniform(0.1, 0.5, K),
        "sp": RNG.uniform(0.1, 0.5, N),
        "one": np.array(0.3),
        "blocks": RNG.uniform(0.1, 0.5, (2, N)),
    }
    codes = {"q": RNG.integers(-7, 8, (N, K)), "p": RNG.integers(-7, 8, (K, N)), "zq": RNG.integers(-3, 4, K)}
    model = oracle.parse(
        body, {"x": (3, N)}, {k: v.astype(np.float32) for k, v in floats.items()} | codes | more, (3, N)
    )
    for name in codes:
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(codes[name].astype(dtype.numpy()), dtype=dtype, name=name)
        value.dtype = dtype
    return model


def hidden_of(model):
    spaces = analyse(model)
    for seed in range(3):
        assert prove(spaces, seed).holds
    return spaces, spaces.of("h")


@pytest.mark.parametrize("dtype", [ir.DataType.INT8, ir.DataType.INT4], ids=str)
@pytest.mark.parametrize("zero", ["", ", zq"], ids=["symmetric", "zero points"])
def test_a_scale_per_channel_takes_the_factor_and_codes_move_with_it(dtype, zero):
    body = f"w = DequantizeLinear<axis=1>(q, sq{zero}) h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)"
    spaces, hidden = hidden_of(model_of(body, dtype))
    assert hidden.group == f"R+^{K} x S"
    element = Element.random(spaces.solution, np.random.default_rng(1))
    folded = fold(spaces, element).graph.initializers
    old, new = (np.array(t["q"].const_value.numpy()).astype(int) for t in (spaces.model.graph.initializers, folded))
    assert folded["q"].const_value.dtype == dtype
    assert sorted(map(tuple, old.T)) == sorted(map(tuple, new.T)) and not np.array_equal(old, new)
    assert not np.allclose(
        np.sort(folded["sq"].const_value.numpy()), np.sort(spaces.model.graph.initializers["sq"].const_value.numpy())
    )
    feeds = random_inputs(spaces.model, np.random.default_rng(2))
    before, after = (run(m, feeds)["y"] for m in (spaces.model, fold(spaces, element)))
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


def test_a_scale_per_channel_of_a_square_matrix_belongs_to_one_axis():
    codes = RNG.integers(-7, 8, (N, N))
    model = model_of(
        "w = DequantizeLinear<axis=1>(a, sp) h = MatMul(x, w) r = Relu(h) y = MatMul(r, c)",
        a=codes,
        c=RNG.standard_normal((N, N)).astype(np.float32),
    )
    value = model.graph.initializers["a"]
    value.const_value, value.dtype = ir.tensor(codes.astype(np.int8), name="a"), ir.DataType.INT8
    _, hidden = hidden_of(model)
    assert hidden.group == f"R+^{N} x S"


@pytest.mark.parametrize("step", ["one", "sp"], ids=["one scale", "a scale per output"])
def test_what_reads_codes_admits_no_scale(step):
    body = f"h = Gemm<transB=1>(x, v) r = Relu(h) w = DequantizeLinear<axis=1>(p, {step}) y = MatMul(r, w)"
    _, hidden = hidden_of(model_of(body))
    assert hidden.group == "S"


def test_channels_stay_in_their_block():
    body = f"h = Gemm<transB=1>(x, v) r = Relu(h) w = DequantizeLinear<axis=0, block_size={K // 2}>(p, blocks) y = MatMul(r, w)"
    spaces, hidden = hidden_of(model_of(body))
    orbit = spaces.solution.families[hidden.family].orbit[spaces.solution.row_of[hidden.classes]]
    halves = orbit[spaces.index_in_space(spaces.layouts["h"][0].flat, hidden)].reshape(2, -1)
    assert [len(set(half)) for half in halves] == [1, 1] and halves[0, 0] != halves[1, 0]


@pytest.mark.parametrize("step", ["one", "one, z"], ids=["unsigned", "signed"])
def test_a_quantized_activation_is_permuted_only(step):
    body = (
        f"w = DequantizeLinear<axis=1>(q, sq) h = MatMul(x, w) c = QuantizeLinear(h, {step}) d = DequantizeLinear(c, {step})"
        " y = MatMul(d, v)"
    )
    model = model_of(body, z=np.array(0))
    zero = model.graph.initializers["z"]
    zero.const_value, zero.dtype = ir.tensor(np.array(3, np.int8), name="z"), ir.DataType.INT8
    spaces, hidden = hidden_of(model)
    assert hidden.group == "S"
    # What float64 computes is what ONNX says.
    feeds = {"x": RNG.standard_normal((3, N)).astype(np.float32)}
    proto = ir.to_proto(spaces.model)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, None))
    (known,) = onnx.reference.ReferenceEvaluator(proto).run(["d"], feeds)
    assert np.abs(run(spaces.model, feeds, ["d"])["d"].numpy() - known).max() < 1e-5


def test_one_step_of_codes_that_two_layers_share_moves_for_both():
    """What dequantizes once and is read twice, and what is read as codes by another operator, is one constant."""
    body = (
        "w = DequantizeLinear<axis=1>(q, sq) h = MatMul(x, w) g = MatMul(x, w) r = Relu(h) t = Sigmoid(g) m = Mul(r, t)"
        " y = MatMul(m, v)"
    )
    _, hidden = hidden_of(model_of(body))
    assert hidden.group == "S"
