"""Second moments of the inputs of convolutions, and solvers that use them."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile import ort
from qcompile.calibration.patches import PatchMoments
from qcompile.passes.sites import conv_sites


def convolution(weight, channels, spatial, **attributes):
    initializer = onnx.numpy_helper.from_array(weight, "w")
    node = oh.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)
    x = oh.make_tensor_value_info("x", 1, ["batch", channels, *spatial])
    graph = oh.make_graph([node], "g", [x], [oh.make_tensor_value_info("y", 1, None)], [initializer])
    return ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))


@st.composite
def convolutions(draw):
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    inside, outside = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    attributes = {"group": groups, "strides": [draw(st.integers(1, 3)) for _ in range(rank)]}
    padding = draw(st.sampled_from(["none", "pads", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if padding == "pads":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    elif padding != "none":
        attributes["auto_pad"] = padding
    if not padding.startswith("SAME"):
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    spatial = [draw(st.integers(5, 8)) for _ in range(rank)]
    return (outside * groups, inside, *kernel), inside * groups, spatial, attributes, draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_patches_times_the_weight_are_the_convolution(case):
    shape, channels, spatial, attributes, seed = case
    rng = np.random.default_rng(seed)
    model = convolution(rng.standard_normal(shape).astype(np.float32), channels, spatial, **attributes)
    x = rng.standard_normal((2, channels, *spatial)).astype(np.float32)
    expected = np.moveaxis(ort.run(model, {"x": x})["y"], 1, -1).reshape(-1, shape[0])
    (site,) = conv_sites(model)
    moments = PatchMoments(site)
    rows = moments.unfold(x)
    columns = np.split(site.matrix(), moments.groups, axis=1)
    np.testing.assert_allclose(np.concatenate([r @ w for r, w in zip(rows, columns)], 1), expected, atol=1e-4)
    moments.update(x[:1])
    moments.update(x[1:])
    np.testing.assert_allclose(moments.hessian, np.einsum("gtk,gtl->gkl", rows, rows) / rows.shape[1], atol=1e-4)


# Nine weights of a depthwise convolution can make up for less than many.
@pytest.mark.parametrize(("groups", "hessian", "ratio"), [(1, "float", 0.8), (2, "corrected", 0.8), (16, "float", 0.9)])
def test_second_order_solvers_see_the_patches(groups, hessian, ratio, tmp_path):
    rng = np.random.default_rng(groups)
    weight = rng.standard_normal((32, 16 // groups, 3, 3)).astype(np.float32)
    model = convolution(weight, 16, (9, 9), group=groups, pads=[1, 1, 1, 1])
    mixing = rng.standard_normal((16, 16)) * np.geomspace(3, 0.01, 16)

    def images(count):
        smooth = np.cumsum(rng.standard_normal((count, 16, 9, 9)), axis=3)
        return np.einsum("bchw,cd->bdhw", smooth, mixing).astype(np.float32)

    samples, held_out = [{"x": images(1)} for _ in range(6)], {"x": images(4)}
    exact = ort.run(model, held_out)["y"]
    errors, claimed = {}, {}
    for solver in ("rtn", "gptq"):
        recipe = qcompile.Recipe("test", weight="int3", activation="none", solver=solver, hessian=hessian)
        compiled = qcompile.compile(model.clone(), recipe=recipe, calibration=samples, output=tmp_path / solver)
        errors[solver] = np.linalg.norm(compiled(held_out) - exact) / np.linalg.norm(exact)
        claimed[solver] = compiled.report.layers[0].output_error
    assert errors["gptq"] < ratio * errors["rtn"]
    assert claimed["rtn"] is None
    assert claimed["gptq"] == pytest.approx(errors["gptq"], rel=0.3)
