"""Unfolding and depthwise convolution against numpy, over odd shapes, strides, dilations and padding."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from qcompile.codegen.kernels.cpu.convolution import Depthwise, Geometry, Unfold
from qcompile.codegen.kernels.x86.harness import TARGETS, run
from qcompile.errors import TargetError

FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
RNG = np.random.default_rng(0)

pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
geometries = st.builds(Geometry, pair, pair, pair, st.tuples(st.integers(0, 3), st.integers(0, 3)))
channels = st.sampled_from([1, 3, 8, 17, 35, 64])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14))
outputs = st.tuples(st.integers(1, 9), st.integers(1, 9))


def extents(x, rows, columns):
    return {"batch": x.shape[0], "height": x.shape[1], "width": x.shape[2], "rows": rows, "columns": columns}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@FEW
@given(g=geometries, c=channels, size=sizes, out=outputs)
def test_unfold_copies_every_window(target, dtype, g, c, size, out):
    """Also where most of the windows lie outside of the tensor."""
    kernel = Unfold(c, g, dtype)
    x = RNG.integers(0, 256, (*size, c)).astype(dtype)
    got = run(kernel, target, extents(x, *out), x)["out"]
    np.testing.assert_array_equal(got, kernel.reference(x, *out))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@FEW
@given(
    g=geometries,
    c=channels,
    size=sizes,
    out=outputs,
    bias=st.booleans(),
    activation=st.sampled_from(["", "relu", "silu"]),
)
def test_depthwise_sums_are_exact(target, g, c, size, out, bias, activation):
    kernel = Depthwise(c, g, bias, activation)
    x = RNG.integers(0, 256, (*size, c)).astype(np.uint8)
    weight = RNG.integers(-255, 256, (g.kernel[0] * g.kernel[1], c)).astype(np.int16)
    scale, x_scale = RNG.uniform(0.01, 0.1, c).astype(np.float32), RNG.uniform(0.01, 0.1, size[0]).astype(np.float32)
    b = [RNG.standard_normal(c).astype(np.float32)] if bias else []
    got = run(kernel, target, extents(x, *out), x, x_scale, weight, Depthwise.starts(weight), scale, *b)["out"]
    step = (scale * x_scale[:, None])[:, None, None]
    want = kernel.reference(x, weight, *out).astype(np.float32) * step + (b[0] if bias else 0)
    want = {"": want, "relu": np.maximum(want, 0), "silu": want / (1 + np.exp(-want.astype(np.float64)))}[activation]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("limits", [(0.02, -128, 127), (0.05, 0, 90)])
def test_depthwise_stores_codes(target, limits):
    """What a static quantizer would make of the float result, ties and clipped values included."""
    g = Geometry((3, 2), (1, 2), (1, 1), (1, 0))
    x = RNG.integers(0, 256, (2, 9, 11, 21)).astype(np.uint8)
    weight = RNG.integers(-127, 128, (6, 21)).astype(np.int16)
    ones, steps = np.ones(2, np.float32), np.full(21, 2.0**-12, np.float32)
    given_ = (x, ones, weight, Depthwise.starts(weight), steps)
    exact = run(Depthwise(21, g), target, extents(x, 9, 6), *given_)["out"]
    got = run(Depthwise(21, g, codes=True), target, extents(x, 9, 6), *given_, np.array(limits, np.float32))["out"]
    step, lowest, highest = (np.float32(limit) for limit in limits)
    np.testing.assert_array_equal(got, np.clip(np.rint(exact / step), lowest, highest) + 128)
    assert len(np.unique(got)) > 50


def test_sums_that_may_overflow_are_refused():
    with pytest.raises(TargetError, match="overflow"):
        Depthwise(8, Geometry((200, 200)))
