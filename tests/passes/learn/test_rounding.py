"""Simulated rounding: the numbers of the real quantizers, and gradients that pass through."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError
from qcompile.formats import parse_activation, parse_format
from qcompile.passes.learn.rounding import round_tokens, round_weight, snap


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5), width=st.integers(1, 33), bits=st.integers(2, 8), clip=st.sampled_from([1.0, 0.8, 0.55]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_round_as_the_format_says(rows, width, bits, clip, seed):
    """Every width, number of bits and clipping; rows of zeros stay zeros."""
    x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    x[0] = 0
    fmt = parse_activation(f"int{bits}/token")
    simulated = round_tokens(torch.from_numpy(x), fmt, clip).numpy()
    np.testing.assert_allclose(simulated, fmt.round(x, clip=clip), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 40), n=st.integers(1, 7), bits=st.integers(2, 8), group=st.sampled_from(["", "/g8", "/g16"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_round_as_the_format_says(k, n, bits, group, seed):
    """Asymmetric grids over the range of each group, the last one shorter."""
    weight = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    fmt = parse_format(f"int{bits}{group}/asym")
    simulated = round_weight(torch.from_numpy(weight), fmt).numpy()
    np.testing.assert_allclose(simulated, fmt.decode(fmt.encode(weight)), rtol=1e-5, atol=1e-5)


def test_symmetric_weights_err_by_at_most_half_a_step():
    """The grid of max|w| / qmax in every group."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 6)))
    rounded = round_weight(weight, parse_format("int4/g8"))
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        step = weight[part].abs().amax(0) / 7
        assert bool(((rounded - weight)[part].abs() <= step / 2 + 1e-12).all())


def test_gradients_pass_where_nothing_is_clipped():
    """Ones inside, zeros outside; the clipped share gets the gradient of what it cuts off."""
    x = torch.tensor([[0.1, -0.4, 2.0, 10.0]], dtype=torch.float64, requires_grad=True)
    snap(x, -3, 3).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 0]]
    clip = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    round_tokens(x.detach(), parse_activation("int4/token"), clip)[0, 3].backward()
    # The largest entry is represented by clip * max|x| exactly.
    assert float(clip.grad) == pytest.approx(10.0)


def test_other_formats_are_refused_by_name():
    """Nothing is learned through a codebook."""
    with pytest.raises(FormatError, match="nf4"):
        round_weight(torch.ones(4, 4), parse_format("nf4/g64"))
